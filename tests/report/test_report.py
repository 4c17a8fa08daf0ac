"""The page holds what the workdir holds, asks nothing of the network, and survives broken files."""

import argparse
import base64
import hashlib
import html.parser
import json
import math
import re

import numpy as np
import pytest

from helpers import fake_run
from vlp.cli import report as cli
from vlp.core import check
from vlp.report import (
    axes,
    curves,
    gallery,
    load,
    numbers,
    summary,
    svg,
    tables,
    traces,
)
from vlp.report import html as page

EVIL = '"><script>alert(1)</script><img src=x onerror=alert(1)>'
# Attributes through which a browser would fetch something.
FETCHING = {
    "src",
    "href",
    "srcset",
    "xlink:href",
    "action",
    "poster",
    "data",
    "formaction",
    "background",
}
VOID = {"meta", "img", "input", "br"}


class Page(html.parser.HTMLParser):
    """Collects a page's elements, text and problems: unbalanced tags, anything from outside."""

    def __init__(self, text: str):
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.fetches: list[str] = []
        self.texts: list[str] = []
        self._open: list[str] = []
        self.feed(text)
        assert not self._open, f"never closed: {self._open}"

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self.fetches += [str(v) for k, v in attrs if k in FETCHING]
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert [self._open.pop() if self._open else None] == [tag]

    def handle_data(self, data):
        if not {"script", "style"} & set(self._open[-1:]):
            self.texts.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.texts).split())

    def count(self, tag: str, cls: str = "") -> int:
        classes = [(a.get("class") or "").split() for t, a in self.tags if t == tag]
        return sum(not cls or cls in c for c in classes)


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    return fake_run.write(tmp_path_factory.mktemp("run") / "full", num_rows=70)


@pytest.fixture(scope="module")
def full(workdir) -> str:
    return page.write(workdir).read_text("utf-8")


def _metrics(path, *rows: dict, tail: str = "") -> load.Run:
    path.mkdir(exist_ok=True)
    (path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + tail)
    return load.load(path)


def _train(step: int, **values) -> dict:
    return {"kind": "train", "step": step, "samples": 8 * step, "stage": "main"} | values


# --- the whole page


def test_page_is_self_contained(full):
    """No attribute fetches from outside: links stay in the page, images are inline."""
    parsed = Page(full)
    assert parsed.fetches
    assert all(url.startswith(("#", "data:image/png;base64,")) for url in parsed.fetches)
    assert not re.search(r"@import|url\(|<link|<iframe", full)
    assert "default-src 'none'" in full
    outside = re.findall(r"https?://[^\s<\"]+", full)
    assert set(outside) <= {"https://openmoji.org)"}  # the attribution's own text


def test_page_policy_allows_exactly_its_script(full):
    scripts = re.findall(r"<script>(.*?)</script>", full, re.DOTALL)
    assert len(scripts) == 1
    digest = base64.b64encode(hashlib.sha256(scripts[0].encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in full


def test_page_tells_the_run_in_words(full):
    text = Page(full).text
    for words in (
        "coca-emoji-S16 has seen 179k samples",
        "two stages (masked, then unmasked)",
        "chance is 0.10%",
        "so it reads the image",
        "4 × NVIDIA H100 80GB HBM3",
        "3f2c9a1 (clean)",
        "optim.warmup_steps",
        "OpenMoji, CC BY-SA 4.0",
    ):
        assert words in text


def test_page_shows_every_section_and_links_to_it(full):
    ids = {a.get("id") for t, a in Page(full).tags if t == "section"}
    links = {a["href"].removeprefix("#") for t, a in Page(full).tags if t == "a"}
    assert {name for name, _, _ in page.SECTIONS} == links
    assert links <= ids
    assert "Left out" not in full


def test_everything_from_the_workdir_is_escaped(tmp_path):
    """Text from every file: config, versions, stage and metric names, captions, keys."""
    run = tmp_path / "evil"
    fake_run.write(run, num_rows=3)
    _metrics(
        run,
        _train(1, stage=EVIL, loss=1.0, **{EVIL: 2.0, "<img onerror=a>": 3.0}),
        _train(2, stage="b", loss=1.0),
        {
            "kind": "eval",
            "step": 2,
            "eval": EVIL,
            "split": EVIL,
            "i2t/R@1": 0.5,
            EVIL: 1.0,
            "caption_loss": 1.0,
        },
        {"kind": "eval", "step": 1, "eval": EVIL, "split": EVIL, "i2t/R@1": 0.5, EVIL: 1.0},
    )
    (run / "config.json").write_text(
        json.dumps({"name": EVIL, EVIL: EVIL, "attribution": [EVIL, {EVIL: EVIL}]})
    )
    (run / "versions.json").write_text(json.dumps({EVIL: EVIL, "devices": [EVIL]}))
    query = {"image": EVIL, "caption": EVIL, "key": EVIL, "rank_i2t": 2, "rank_t2i": 1}
    query["top_texts"] = [{"caption": EVIL, "score": 1.0, "right": True}]
    query["top_images"] = [
        {"image": fake_run.picture("red", "circle"), "caption": EVIL, "score": EVIL, "right": False}
    ]
    item = {
        "image": "https://evil.example/x.png",
        "caption": EVIL,
        "generated": EVIL + "x",
        "key": EVIL,
    }
    for name, value in (
        ("retrieval_a", {"kind": "retrieval", "step": EVIL, "queries": [query]}),
        ("retrieval_<b>", {"kind": "retrieval", "step": 1, "queries": [query]}),
        ("captions_a", {"kind": "captions", "step": 1, "items": [item]}),
    ):
        (run / "evals" / f"{name}.json").write_text(json.dumps(value))
    text = page.write(run).read_text("utf-8")
    parsed = Page(text)
    assert parsed.count("script") == 1
    assert "<script>alert" not in text
    assert not any("onerror" in attrs for _, attrs in parsed.tags)
    assert "alert(1)" in parsed.text  # it is shown, as text
    assert all(url.startswith(("#", "data:image/png;base64,")) for url in parsed.fetches)
    assert "evil.example" not in text


def test_lone_surrogates_are_written(tmp_path):
    fake_run.write(tmp_path / "r", num_rows=2)
    (tmp_path / "r" / "config.json").write_text('{"name": "half \\ud800 pair"}')
    assert "half \N{REPLACEMENT CHARACTER} pair" in page.write(tmp_path / "r").read_text("utf-8")


def test_same_workdir_gives_the_same_bytes(workdir, full, tmp_path):
    assert page.write(workdir, tmp_path / "b.html").read_text("utf-8") == full


# --- broken and missing files


def test_half_written_last_line_costs_only_itself(tmp_path):
    run = _metrics(
        tmp_path / "r", _train(1, loss=2.0), _train(2, loss=1.0), tail='{"kind": "train", "st'
    )
    assert [row.step for row in run.train] == [1, 2]
    assert run.notes == ("metrics.jsonl: 1 of 3 lines could not be read and were skipped",)
    assert "1 of 3 lines" in Page(page.page(run)).text


@pytest.mark.parametrize(
    "line",
    ["[1]", "3", "null", '"a"', '{"kind": "train"}', '{"step": "x"}', '{"step": 1e999}', "\x00"],
)
def test_a_line_that_is_no_row_is_skipped(tmp_path, line):
    run = _metrics(tmp_path / "r", _train(1, loss=2.0), tail=line)
    assert len(run.train) == 1
    assert len(run.notes) == 1


def test_missing_artefacts_leave_a_note(tmp_path):
    fake_run.write(tmp_path / "r", num_rows=4, artefacts=False)
    for name in ("config.json", "versions.json"):
        (tmp_path / "r" / name).unlink()
    text = Page(page.write(tmp_path / "r").read_text("utf-8")).text
    for what in (
        "evals/retrieval_….json",
        "evals/captions_….json",
        "no config.json",
        "no versions.json",
    ):
        assert what in text


def test_only_training_rows_and_only_evaluation_rows_make_a_page(tmp_path):
    train = page.page(_metrics(tmp_path / "a", _train(1, loss=2.0)))
    assert "It was not evaluated" in train
    assert "no time/… values" in train
    only_eval = page.page(
        _metrics(tmp_path / "b", {"kind": "eval", "step": 1, "eval": "x", "top1": 0.5})
    )
    assert "no training rows" in only_eval


def test_broken_json_is_noted(tmp_path):
    fake_run.write(tmp_path / "r", num_rows=4)
    (tmp_path / "r" / "config.json").write_text("[]")
    (tmp_path / "r" / "evals" / "captions_test.json").write_text('{"kind": "cap')
    run = load.load(tmp_path / "r")
    assert [note.split(":")[0] for note in run.notes] == ["config.json", "evals/captions_test.json"]
    assert set(run.artefacts) == {"retrieval_test", "zeroshot_shape_test"}
    Page(page.page(run))


def test_artefacts_of_the_wrong_shape_are_survived():
    for bad in (
        {},
        {"queries": None},
        {"queries": [1, {}]},
        {"queries": [{"top_texts": {}, "rank_i2t": "x"}]},
    ):
        Page(gallery.retrieval("a", bad))
    for bad in ({}, {"items": "x"}, {"items": [None, {"generated": None, "image": 3}]}):
        Page(gallery.captions("a", bad))


def test_no_workdir_no_metrics_and_no_row_are_user_errors(tmp_path):
    with pytest.raises(check.UserError, match="an existing folder"):
        page.write(tmp_path / "nowhere")
    with pytest.raises(check.UserError, match=r"no metrics\.jsonl"):
        page.write(tmp_path)
    (tmp_path / "metrics.jsonl").write_text('{"kind": "tr')
    with pytest.raises(check.UserError, match="1 lines and no readable row"):
        page.write(tmp_path)
    assert not list(tmp_path.glob("*.html"))


def test_failed_write_leaves_the_old_report(workdir, tmp_path, monkeypatch):
    out = tmp_path / "r.html"
    out.write_text("old")
    monkeypatch.setattr(page.os, "replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(check.UserError, match="disk full"):
        page.write(workdir, out)
    assert [p.name for p in tmp_path.iterdir()] == ["r.html"]
    assert out.read_text() == "old"


# --- numbers that are none


@pytest.mark.parametrize(
    ("raw", "want"),
    [
        (None, math.nan),
        ("NaN", math.nan),
        ("-Infinity", -math.inf),
        ("inf", math.inf),
        (True, 1.0),
        pytest.param(10**400, math.inf, id="big"),
        ("main", None),
        ([1], None),
    ],
)
def test_what_is_no_number_is_read_as_none(raw, want):
    assert (
        load.number(raw) == pytest.approx(want, nan_ok=True)
        if want is not None
        else load.number(raw) is None
    )


def test_nan_breaks_the_line_and_is_marked(tmp_path):
    values = [2.0, "NaN", 1.5, None, math.inf, 1.0]
    run = _metrics(tmp_path / "r", *(_train(i + 1, loss=v) for i, v in enumerate(values)))
    text = page.page(run)
    loss = re.search(r'<path class="line s0" d="(M[^"]+)"/>', text.split('id="training"')[1])
    assert loss[1].count("M") == 3
    assert "nan" not in loss[1]
    assert text.count('class="lost"') == 3
    assert "✕ 3 values not finite" in Page(text).text


def test_nan_everywhere_makes_a_page(tmp_path):
    run = _metrics(tmp_path / "r", *(_train(i, loss=math.nan, lr=math.nan) for i in range(100)))
    Page(page.page(run))
    nan = dict.fromkeys(("i2t/R@1", "num", "caption_loss", "caption_loss_shuffled", "exact_match"))
    rows = ({"kind": "eval", "step": i, "eval": "e", **nan} for i in (1, 2))
    text = Page(page.page(_metrics(tmp_path / "s", *rows))).text
    assert "NaN" in text


# --- what is drawn


def test_two_stages_are_bands_and_one_is_none(workdir, tmp_path):
    run = load.load(workdir)
    masked, unmasked = curves.stages(run)
    assert (masked.label, unmasked.label) == ("masked", "unmasked")
    assert masked.start == 0
    assert masked.end == unmasked.start == 56 * 10 * fake_run.BATCH
    assert unmasked.end == run.train[-1].samples
    text = page.page(run)
    assert (
        text.count('class="band b0"') == text.count('class="band b1"') == text.count('data-chart="')
    )
    one = fake_run.write(tmp_path / "one", num_rows=2, two_stages=False)
    assert 'class="band' not in page.write(one).read_text("utf-8")


def test_losses_share_a_chart_and_a_term_that_is_the_loss_is_dropped(tmp_path):
    run = _metrics(
        tmp_path / "r",
        *(
            _train(i, loss=3.0 * i, contrastive=i, sigmoid=3.0 * i, new_thing=2 * i, lr=0.1)
            for i in (1, 2)
        ),
    )
    charts = {chart.title: [s.label for s in chart.series] for chart in curves.train_charts(run)}
    assert charts == {
        "Loss": ["loss", "contrastive", "new thing"],
        "Learning rate": ["learning rate"],
    }


def test_unknown_metrics_get_a_chart_each(tmp_path):
    run = _metrics(
        tmp_path / "r",
        *(_train(i, **{"odd/one": 1.0, "odd/two": i, "time/odd": 1}) for i in (1, 2)),
    )
    assert [chart.title for chart in curves.train_charts(run)] == ["Odd one", "Odd two"]
    assert [chart.title for chart in curves.time_charts(run)] == ["Odd"]


def test_repeated_steps_keep_the_last(tmp_path):
    """A run resumed from step 1 logs steps 2 and 3 again."""
    rows = [_train(s, loss=v) for s, v in ((1, 9.0), (2, 8.0), (3, 7.0), (2, 1.0), (3, 0.5))]
    assert [row.values["loss"] for row in _metrics(tmp_path / "r", *rows).train] == [9.0, 1.0, 0.5]


def test_evaluations_mark_the_training_curves(workdir):
    run = load.load(workdir)
    marks = {float(row.samples) for row in run.evals}
    assert len(marks) == 10
    assert all(set(chart.marks) == marks for chart in curves.train_charts(run))
    assert svg.figure(curves.train_charts(run)[0]).count('class="mark"') == 10
    assert len(curves.eval_charts(run, "retrieval", "test")) == 3


def test_hover_data_matches_the_drawing(workdir):
    chart = curves.eval_charts(load.load(workdir), "retrieval", "test")[0]
    hover = json.loads(dict(Page(svg.figure(chart)).tags)["figure"]["data-chart"])
    assert [s["label"] for s in hover["series"]] == ["R@1", "R@5", "R@10"]
    assert hover["series"][0]["text"][-1] == numbers.percent(float(chart.series[0].y[-1]))
    dots = [a for t, a in Page(svg.figure(chart)).tags if t == "circle"]
    assert [float(a["cx"]) for a in dots[:10]] == hover["series"][0]["x"]
    assert [float(a["cy"]) for a in dots[:10]] == hover["series"][0]["y"]


def test_a_long_run_is_thinned_and_keeps_its_spikes():
    y = np.ones(50_000)
    y[31_415] = 40.0
    text = svg.figure(svg.Chart("a", (traces.Series("a", np.arange(50_000.0), y),)))
    assert len(text) < 40_000
    heights = [
        float(h) for h in re.findall(r"[ML][\d.]+ ([\d.]+)", re.search(r'd="(M[^"]+)"', text)[1])
    ]
    assert heights[0] - min(heights) > 100


def test_running_mean_stays_in_its_stage_and_keeps_gaps():
    y = np.concatenate([np.zeros(50), np.ones(50)]) + 0.01 * np.resize([1, -1], 100)
    y[70] = np.nan
    mean = traces.mean(
        traces.Series("a", np.arange(100.0), y),
        (traces.Band("a", 0.0, 49.0), traces.Band("b", 49.0, 99.0)),
    )
    assert np.abs(mean.y[:50]).max() < 0.011
    assert np.nanmin(mean.y[50:]) > 0.989
    assert np.flatnonzero(np.isnan(mean.y)).tolist() == [70]


def test_values_over_decades_get_a_log_axis():
    x = np.arange(1.0, 40.0)
    assert "log scale" in svg.figure(svg.Chart("a", (traces.Series("a", x, 10 ** (x / 6)),)))
    assert "log scale" not in svg.figure(svg.Chart("a", (traces.Series("a", x, x),)))
    assert "log scale" not in svg.figure(
        svg.Chart("a", (traces.Series("a", x, 10 ** (x / 6) - 2),))
    )


@pytest.mark.parametrize(
    ("low", "high"), [(0, 1), (0, 1.024e6), (-5.2, 0.3), (1e-5, 3e-5), (97, 98), (0, 1e12)]
)
def test_ticks_are_round_few_and_inside(low, high):
    at = axes.ticks(float(low), float(high))
    assert 3 <= len(at) <= 7
    assert low - 1e-9 * (high - low) <= at[0] < at[-1] <= high + 1e-9 * (high - low)
    assert len({numbers.si(value) for value in at}) == len(at)


# --- galleries, tables, words


def test_right_answers_are_marked_without_colour(workdir):
    artefact = load.load(workdir).artefacts["retrieval_test"]
    parsed = Page(gallery.retrieval("a", artefact))
    found = [f for q in artefact["queries"] for f in q["top_texts"] + q["top_images"]]
    assert parsed.text.count("✓ right") == sum(f["right"] for f in found) > 0
    assert parsed.count("article", "query") == len(artefact["queries"])
    assert "right one is 27th" in parsed.text
    assert parsed.count("article", "hit") == sum(
        q["rank_i2t"] == q["rank_t2i"] == 1 for q in artefact["queries"]
    )


def test_the_heat_map_of_a_small_sample():
    """Rows are captions, columns images; shades from the lowest to the highest; nothing where numbers do not fit."""
    queries = [
        {"caption": f"<{name}>", "image": fake_run.picture("red", "circle")} for name in "ab"
    ]
    text = gallery.heat(queries, [[0.9, 0.1], [0.5, 0.3]])
    cells = re.findall(r'class="heat( diagonal)?" style="--share:([0-9.]+)">([0-9.]+)<', text)
    assert cells == [(" diagonal", "1.000", "0.90"), ("", "0.500", "0.50"),
                     ("", "0.000", "0.10"), (" diagonal", "0.250", "0.30")]  # fmt: skip
    assert "&lt;a&gt;" in text and "1 images are nearest to their own caption" in text
    for bad in (None, "x", [[1.0]], [[1.0, 2.0], [3.0]], [[float("nan")] * 2] * 2):
        assert gallery.heat(queries, bad) == ""
    assert gallery.heat([], []) == ""
    shown = gallery.heat([queries[0]] * 40, np.eye(40).tolist())
    assert shown.count("<tr>") == gallery.MAX_HEAT + 1


def test_exact_captions_are_marked_and_others_show_the_difference():
    items = [
        {"caption": "A red  circle", "generated": "a red circle"},
        {"caption": "a red circle", "generated": "a blue round circle"},
        {"caption": "a red circle", "generated": ""},
    ]
    text = gallery.captions("a", {"step": 3, "items": items})
    assert text.count("✓ exact") == 1
    assert "a <mark>blue round</mark> circle" in text
    assert "<i>nothing</i>" in text
    assert "1 exact (up to" in text


def test_a_long_gallery_is_cut_and_says_so():
    items = [{"caption": "a", "generated": "b"}] * (gallery.MAX_ITEMS + 5)
    text = gallery.captions("a", {"items": items})
    assert f"The first {gallery.MAX_ITEMS} of {gallery.MAX_ITEMS + 5} images" in text
    assert text.count("<article") == gallery.MAX_ITEMS


def test_chance_needs_the_number_of_candidates(workdir):
    row = load.load(workdir).latest()["retrieval", "test"]
    assert summary.chance(row, "i2t/R@5") == 0.005
    assert "0.50%" in tables.evaluation([row])
    del row.values["num"]
    assert summary.chance(row, "i2t/R@5") is None
    assert "chance" not in tables.evaluation([row])
    for key, want in (("accuracy", 0.125), ("top5", 0.625), ("R@0x5", None), ("loss", None)):
        row.values["num_classes"] = 8.0
        assert summary.chance(row, key) == want


def test_config_is_flat_and_complete():
    parsed = Page(tables.config(fake_run.CONFIG))
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
        _train(i, loss=1.0, **{"time/elapsed_s": t}) for i, t in enumerate((100, 3600, 50, 3650), 1)
    )
    assert "2 h 1 min" in page.page(_metrics(tmp_path / "r", *rows))


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
def test_large_numbers_have_si_suffixes(value, want):
    assert numbers.si(float(value)) == want


@pytest.mark.parametrize(
    ("secs", "want"), [(42.3, "42 s"), (600, "10 min"), (7980, "2 h 13 min"), (200_000, "2 d 7 h")]
)
def test_durations_are_told_in_two_units(secs, want):
    assert numbers.duration(float(secs)) == want


# --- the command


def test_command_prints_the_path(workdir, tmp_path, capsys):
    parser = argparse.ArgumentParser()
    cli.add_parser(parser.add_subparsers())
    args = parser.parse_args(["report", str(workdir), "--out", str(tmp_path / "new" / "r.html")])
    assert args.run(args) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'new' / 'r.html'}\n"
    assert (tmp_path / "new" / "r.html").stat().st_size > 10_000
    assert parser.parse_args(["report", "a"]).out is None
