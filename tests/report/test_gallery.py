"""Galleries, tables and figures of the page, and numbers as text."""

import dataclasses
import math
import re

import numpy as np
import pytest

from helpers import fake_run
from helpers.page_parser import Page
from vlp.report import gallery, load, numbers, summary, tables
from vlp.report import html as page


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    return fake_run.write(tmp_path_factory.mktemp("run") / "full", num_rows=70)


def _section(name: str, run: load.Run, artefact: dict) -> str:
    """The HTML of one section of the page of a run that has only this artefact."""
    text = page.page(dataclasses.replace(run, artefacts={"a": artefact | {"kind": name}}))
    return re.search(rf'<section id="{name}">(.*?)</section>\s*<section id=', text, re.DOTALL)[1]


def test_right_answers_are_marked_without_colour(workdir):
    run = load.load(workdir)
    artefact = run.artefacts["retrieval_test"]
    parsed = Page(_section("retrieval", run, artefact))
    found = [f for q in artefact["queries"] for f in q["top_texts"] + q["top_images"]]
    assert parsed.text.count("✓ right") == sum(f["right"] for f in found) > 0
    assert parsed.count("article", "query") == len(artefact["queries"])
    assert "right one is 27th" in parsed.text
    assert parsed.count("article", "hit") == sum(
        q["rank_i2t"] == q["rank_t2i"] == 1 for q in artefact["queries"]
    )


def test_the_heat_map_of_a_small_sample(workdir):
    """Rows are captions, columns images; shades from the lowest to the highest; nothing where numbers do not fit."""
    queries = [
        {"caption": f"<{name}>", "image": fake_run.picture("red", "circle")} for name in "ab"
    ]
    run = load.load(workdir)
    artefact = {"queries": queries, "similarity": [[0.9, 0.1], [0.5, 0.3]]}
    text = _section("retrieval", run, artefact)
    cells = re.findall(r'class="heat( diagonal)?" style="--share:([0-9.]+)">([0-9.]+)<', text)
    assert cells == [(" diagonal", "1.000", "0.90"), ("", "0.500", "0.50"),
                     ("", "0.000", "0.10"), (" diagonal", "0.250", "0.30")]  # fmt: skip
    assert "&lt;a&gt;" in text and "1 images are nearest to their own caption" in text
    for bad in (None, "x", [[1.0]], [[1.0, 2.0], [3.0]], [[float("nan")] * 2] * 2):
        assert gallery.heat(queries, bad) is None
    assert gallery.heat([], []) is None
    shown = gallery.heat([queries[0]] * 40, np.eye(40).tolist())
    assert shown and len(shown.heads) == len(shown.lines) == gallery.MAX_HEAT


def test_exact_captions_are_marked_and_others_show_the_difference(workdir):
    items = [
        {"caption": "A red  circle", "generated": "a red circle"},
        {"caption": "a red circle", "generated": "a blue round circle"},
        {"caption": "a red circle", "generated": ""},
    ]
    text = _section("captions", load.load(workdir), {"step": 3, "items": items})
    assert text.count("✓ exact") == 1
    assert "a <mark>blue round</mark> circle" in text
    assert "<i>nothing</i>" in text
    assert "1 exact (up to" in text


def test_a_long_gallery_is_cut_and_says_so(workdir):
    items = [{"caption": "a", "generated": "b"}] * (gallery.MAX_ITEMS + 5)
    text = _section("captions", load.load(workdir), {"items": items})
    assert f"The first {gallery.MAX_ITEMS} of {gallery.MAX_ITEMS + 5} images" in text
    assert text.count("<article") == gallery.MAX_ITEMS


def test_chance_needs_the_number_of_candidates(workdir):
    row = load.load(workdir).latest()["retrieval", "test"]
    assert summary.chance(row, "i2t/R@5") == 0.005
    assert "0.50%" in [line[-1] for line in tables.evaluation([row]).lines]
    del row.values["num"]
    assert summary.chance(row, "i2t/R@5") is None
    assert "chance" not in tables.evaluation([row]).heads
    for key, want in (("accuracy", 0.125), ("top5", 0.625), ("R@0x5", None), ("loss", None)):
        row.values["num_classes"] = 8.0
        assert summary.chance(row, key) == want


def test_config_is_flat_and_complete(workdir):
    text = page.page(load.load(workdir))
    parsed = Page(re.search(r'<section id="config">.*?</section>', text, re.DOTALL)[0])
    assert parsed.count("tr") == 28
    for words in (
        "28 settings",
        "stages[1].name unmasked",
        "model.image.patch_px 16",
        "data[0].path data/emoji",
    ):
        assert words in parsed.text


def test_clock_that_a_restart_set_back_counts_on(tmp_path):
    rows = (
        fake_run.train_row(i, loss=1.0, **{"time/elapsed_s": t})
        for i, t in enumerate((100, 3600, 50, 3650), 1)
    )
    assert "2 h 1 min" in page.page(fake_run.metrics(tmp_path / "r", *rows))


@pytest.mark.parametrize(
    ("value", "want"),
    [
        (0, "0"),
        (12_800_000, "12.8M"),
        (999_999, "1M"),
        (0.5, "0.5"),
        (-4.25, "−4.25"),
        (3e-5, "3e−5"),
        (1234, "1.23k"),
        (9.999e-4, "1e−3"),
        (100, "100"),
        (-math.inf, "−∞"),
        (math.nan, "NaN"),
    ],
)
def test_numbers_get_si_prefixes(value, want):
    assert numbers.si(float(value)) == want


@pytest.mark.parametrize(
    ("secs", "want"), [(42.3, "42 s"), (600, "10 min"), (7980, "2 h 13 min"), (200_000, "2 d 7 h")]
)
def test_durations_are_in_words(secs, want):
    assert numbers.duration(float(secs)) == want
