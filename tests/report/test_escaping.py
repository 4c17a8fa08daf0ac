"""What a page shows cannot become part of the page: every template escapes every value."""

import json
import pathlib
import re

import numpy as np
import pytest

import vlp
from helpers import fake_run
from helpers.page_parser import Page
from vlp.core import pages
from vlp.report import gallery, html, load, summary, svg, tables, traces

EVIL = "'\"><script>alert(1)</script><img src=x onerror=alert(1)>{{ 7 * 7 }}\x1b[31m\u202e"
TEMPLATES = {path.name: path for path in pathlib.Path(vlp.__file__).parent.rglob("*.j2")}
QUERY = {
    "image": EVIL, "caption": EVIL, "key": EVIL, "rank_i2t": 2, "rank_t2i": 1,
    "top_texts": [{"caption": EVIL, "score": 1.0, "right": True}],
    "top_images": [{"image": fake_run.picture("red", "circle"), "caption": EVIL, "score": EVIL}],
}  # fmt: skip
RETRIEVAL = {"kind": "retrieval", "step": EVIL, "queries": [QUERY], "similarity": [[0.5]]}
ITEM = {"image": "https://evil.example/x.png", "caption": EVIL, "key": EVIL}
ITEMS = [ITEM | {"generated": EVIL + "x"}, ITEM | {"generated": EVIL}]
CAPTIONS = {"kind": "captions", "step": 1, "items": ITEMS}
CONFUSION = {
    "kind": "zeroshot", "label": EVIL, "split": EVIL, "classes": [EVIL, "b"], "confusion": [[3, 1], [0, 5]],
}  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> load.Run:
    """A run with hostile texts in every file: config, versions, stage and metric names, captions, keys."""
    path = fake_run.write(tmp_path_factory.mktemp("evil") / "run", num_rows=3)
    row = {"kind": "eval", "eval": EVIL, "split": EVIL, "i2t/R@1": 0.5, EVIL: 1.0}
    fake_run.metrics(
        path,
        fake_run.train_row(1, stage=EVIL, loss=1.0, **{EVIL: 2.0, "<img onerror=a>": 3.0}),
        *(fake_run.train_row(i, stage="b", loss=1.0, **{EVIL: i}) for i in (2, 3)),
        *(row | {"step": i, "caption_loss": 1.0} for i in (1, 2, 3)),
        tail=EVIL,
    )
    config = {"name": EVIL, EVIL: EVIL, "attribution": [EVIL, {EVIL: EVIL}]}
    (path / "config.json").write_text(json.dumps(config))
    (path / "versions.json").write_text(json.dumps({EVIL: EVIL, "devices": [EVIL]}))
    artefacts = {"retrieval_a": RETRIEVAL, "retrieval_<b>": RETRIEVAL, "captions_a": CAPTIONS}
    for name, value in (artefacts | {"zeroshot": CONFUSION}).items():
        (path / "evals" / f"{name}.json").write_text(json.dumps(value))
    return load.load(path)


def _macros(template: str):
    return pages._environment("vlp.report").get_template(template).module


def _page(_: load.Run) -> str:
    values = {
        "title": EVIL,
        "kind": EVIL,
        "path": EVIL,
        "sections": [(EVIL, EVIL, EVIL)],
        "end": EVIL,
    }
    return pages.render("vlp.core", "page.html.j2", style="", **values)


def _parts(_: load.Run) -> str:
    parts = _macros("parts.html.j2")
    lines = [[EVIL], [EVIL, EVIL, (EVIL, EVIL)]]
    return parts.tiles([(EVIL, EVIL, EVIL, EVIL)]) + parts.table([EVIL] * 3, lines, [(EVIL, EVIL)])


def _cards(_: load.Run) -> str:
    cards = _macros("cards.html.j2")
    table = tables.Table([EVIL], [[EVIL, EVIL]], title=EVIL, note=EVIL, hint=EVIL)
    heat = tables.Heat([EVIL], [tables.HeatLine(EVIL, [(EVIL, EVIL)], 0, EVIL)], EVIL, EVIL)
    return "".join(
        [
            cards.missing(EVIL),
            cards.cards([EVIL] * 9, EVIL, layout=EVIL),
            cards.points([table]),
            cards.card(table),
            cards.settings([(EVIL, EVIL)], EVIL),
            cards.settings([(EVIL, EVIL)], EVIL, code=False),
            cards.heat(heat, kind=EVIL),
            cards.attribution([EVIL]),
            cards.end([EVIL]),
        ]
    )


def _gallery(_: load.Run) -> str:
    galleries = _macros("gallery.html.j2")
    found = gallery.retrieval(EVIL, RETRIEVAL), gallery.captions(CAPTIONS)
    return galleries.retrieval(found[0]) + galleries.captions(found[1])


def _chart(_: load.Run) -> str:
    series = tuple(traces.Series(EVIL, np.arange(4.0), np.array([1.0, 2.0, np.nan, i])) for i in (3, 4))  # fmt: skip
    bands = (traces.Band(EVIL, 0.0, 3.0), traces.Band("b", 3.0, 4.0))
    return svg.figure(svg.Chart(EVIL, series, EVIL, EVIL, bands=bands, levels=((EVIL, 1.0),)))


def _inspect(_: load.Run) -> str:
    shown = {"image": "", "border": True, "problem": EVIL, "key": EVIL, "captions": [(EVIL, EVIL)]}
    values = {
        "title": EVIL,
        "tiles": [(EVIL, EVIL, EVIL, EVIL)],
        "spreads": [(EVIL, EVIL)],
        "kinds": [(EVIL, [(EVIL, EVIL)])],
        "records": [shown],
    }
    return pages.render("vlp.data.tools", "inspect.html.j2", **values)


HOSTILE = {
    "page.html.j2": _page,
    "parts.html.j2": _parts,
    "inspect.html.j2": _inspect,
    "run.html.j2": html.page,
    "comparison.html.j2": lambda run: html.comparison([run, run]),
    "cards.html.j2": _cards,
    "chart.html.j2": _chart,
    "gallery.html.j2": _gallery,
    "summary.html.j2": lambda run: pages.render("vlp.report", "summary.html.j2", said=summary.sentences(run)),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_a_template_shows_hostile_texts_as_text(run, name):
    text = HOSTILE[name](run)
    parsed = Page(text)
    scripts = re.findall(r"<script>.*?</script>", text, re.DOTALL)
    assert len(scripts) == parsed.count("script") == (name in ("run.html.j2", "comparison.html.j2"))
    assert {key for _, attrs in parsed.tags for key in attrs if key.startswith("on")} == set()
    assert all(url.startswith(("#", "data:image/")) for url in parsed.fetches)
    assert "alert(1)" in parsed.text and "{{ 7 * 7 }}" in parsed.text and "␛[31m" in parsed.text
    assert not set(text) & set("\x1b\u202e")


def test_every_template_is_among_them_and_none_turns_escaping_off():
    assert TEMPLATES.keys() == HOSTILE.keys()
    for path in TEMPLATES.values():
        assert not re.search(r"\|\s*safe|autoescape", path.read_text()), path


def test_hostile_pages_keep_all_their_sections(run):
    text = Page(html.page(run)).text
    for words in (
        "Image × caption similarity",
        "1 exact",
        "is ↓ taken for →",
        "settings",
        "could not be read",
    ):
        assert words in text  # else the tests above see less than they are meant to


def test_images_from_elsewhere_are_left_out(run):
    text = html.page(run)
    assert "evil.example" not in text and text.count("no image") == 4 + 2 * 1
    assert all(url.startswith(("#", "data:image/png;base64,")) for url in Page(text).fetches)
