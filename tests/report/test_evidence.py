"""The page shows what a reader needs, and says no more than the numbers allow."""

import json
import math
import re
from html.parser import HTMLParser

import numpy as np
import pytest

from helpers import fake_run
from helpers.page_parser import Page
from vlp.report import html, load, svg, traces


def _ticks(chart, anchor):
    text = svg.figure(chart)
    return re.findall(rf'class="tick"[^>]*text-anchor="{anchor}"[^>]*>([^<]*)<', text)


RANGES = [
    (0.461, 0.4642), (12_345, 12_352), (1e6, 1e6 + 3), (99.9, 100.05), (-0.0042, -0.0041), (0, 1),
    (1e-5, 1.002e-5), (5, 5), (0, 0), (1e12, 1e12 + 7), (3e-4, 0.2), (1, 1.9), (1, 4e9), (-1e-9, 1e9),
    (0.999, 1.001), (2, 60),
]  # fmt: skip


@pytest.mark.parametrize("percent", [False, True])
@pytest.mark.parametrize("log", [None, True])
@pytest.mark.parametrize("low, high", RANGES)
def test_tick_labels_never_repeat(low, high, log, percent):
    y = np.linspace(low, high, 5)
    x = math.floor(max(low, 0)) + np.arange(5.0)
    chart = svg.Chart("a", (traces.Series("a", x, y),), percent=percent, log=log)
    for anchor in ("end", "middle"):
        labels = _ticks(chart, anchor)
        assert len(labels) == len(set(labels)) >= 2, labels
        assert all(len(label) <= 13 for label in labels), labels


@pytest.mark.parametrize("log", [None, True])
@pytest.mark.parametrize("low, high", [*RANGES, (2, 640), (1, 1e30), (3, 12)])
def test_tick_labels_do_not_overlap(low, high, log):
    y, x = np.linspace(low, high, 5), np.linspace(0, max(high, 4), 5).round()
    text = svg.figure(svg.Chart("a", (traces.Series("a", x, y),), log=log))
    places = re.findall(r'class="tick" x="([^"]*)" y="([^"]*)" text-anchor="(\w+)">([^<]*)<', text)
    ys = [float(y) for _, y, anchor, _ in places if anchor == "end"]
    assert np.abs(np.diff(ys)).min() >= 11  # the size of the letters
    xs = [(float(x), len(label) * 6.5 / 2) for x, _, anchor, label in places if anchor == "middle"]
    assert all(a + wide < b - narrow for (a, wide), (b, narrow) in zip(xs, xs[1:]))


def test_samples_are_whole_numbers_on_the_axis():
    chart = svg.Chart("a", (traces.Series("a", np.arange(1.0, 5.0), np.arange(4.0)),))
    assert _ticks(chart, "middle") == ["0", "1", "2", "3", "4"]


@pytest.mark.parametrize(
    "versions, words",
    [
        ({"platform": "cpu", "device": "cpu", "devices": 1}, "on a CPU "),
        ({"platform": "cpu", "device": "cpu", "devices": 8}, "on 8 × CPU "),
        ({"platform": "tpu", "device": "TPU v5 lite", "devices": 4}, "on 4 × TPU v5 lite "),
        ({"platform": "gpu", "device": "NVIDIA H100", "devices": 1}, "on an NVIDIA H100 "),
        ({"platform": "gpu", "device": "NVIDIA H100", "devices": 16, "processes": 2},
         "on 16 × NVIDIA H100 in 2 processes "),
        ({"platform": "cpu"}, "on a CPU "),
    ],
)  # fmt: skip
def test_the_device_is_named(tmp_path, versions, words):
    run = fake_run.write(tmp_path / "r", num_rows=8)
    (run / "versions.json").write_text(json.dumps(versions))
    (tile,) = re.findall(r'<li><span class="what">time</span>.*?</li>', html.write(run).read_text())
    assert words.removeprefix("on a ").removeprefix("on an ").removeprefix("on ").strip() in tile
    assert words in Page(html.write(run).read_text()).text
    text = html.comparison([load.load(run)] * 2)
    assert words.removeprefix("on a ").removeprefix("on an ").removeprefix("on ").strip() in text


def _titles(text):
    """What stands as a title, a header of rows or columns, or a legend; not settings, not the run's own name."""
    text = re.sub(r"<table class=.settings.*?</table>", "", text, flags=re.DOTALL)
    found = re.findall(r"<(h2|h3|h4|strong|th|dt)\b[^>]*>(.*?)</\1>", text, re.DOTALL)
    found += re.findall(r'<(li)><svg class="swatch".*?</svg>(.*?)</li>', text, re.DOTALL)
    found += re.findall(r'<(span) class="what">(.*?)</span>', text)
    return [re.sub("<[^>]*>", "", title) for _, title in found]


def test_titles_are_words(tmp_path):
    """Metrics, evaluations, splits and artefacts have names to read, known or not."""
    run = fake_run.write(tmp_path / "run", num_rows=40)
    for old, new in (("retrieval", "my_retrieval"), ("captions", "cap_tions")):
        path = run / "metrics.jsonl"
        text = path.read_text().replace(f'"eval": "{old}"', f'"eval": "{new}"')
        path.write_text(text.replace('"split": "test"', '"split": "val_variants+test"'))
    with path.open("a") as f:
        for i in range(1, 5):
            more = {"odd/my_metric": i, "time/host_cores": 1 + i, "time/input_share_read": 0.2}
            f.write(json.dumps(fake_run.train_row(1000 + i, **more)) + "\n")
            tone = {"accuracy": 0.5, "mean_per_class": 0.5, "num": 10, "num_classes": 2}
            row = {"kind": "eval", "step": i, "eval": "skin_tone", "split": "test"} | tone
            f.write(json.dumps(row | {"own_metric": i, "time/eval_s": 1.0}) + "\n")
    (run / "evals" / "retrieval_val_variants.json").write_text(
        (run / "evals" / "retrieval_test.json").read_text()
    )
    one = run.rename(tmp_path / "one")
    text = html.write(one).read_text()
    titles = _titles(text)
    assert [t for t in titles if "_" in t or "/" in re.sub("xamples / s", "", t)] == []
    for title in ("Skin tone", "My retrieval", "Own metric", "Host cores", "Odd my metric"):
        assert any(title in t for t in titles), title
    other = fake_run.write(tmp_path / "other", num_rows=40)
    two = html.comparison([load.load(one), load.load(other)])
    assert [t for t in _titles(two) if "_" in t or "/" in re.sub("xamples / s", "", t)] == []


@pytest.mark.parametrize("num", [1, 2])
def test_a_curve_of_two_points_is_numbers_and_no_chart(tmp_path, num):
    run = fake_run.metrics(tmp_path / "r", *(
        row
        for i in range(1, num + 1)
        for row in (fake_run.train_row(i, loss=7.0 + i, **{"time/examples_per_s": 3.5 + i}),
                    {"kind": "eval", "step": i, "eval": "e", "split": "test", "accuracy": 0.25 * i})
    ))  # fmt: skip
    for text in (html.page(run), html.comparison([run, run])):
        parsed = Page(text)
        assert parsed.count("svg") == 0 and parsed.count("figure") == 0
        for i in range(1, num + 1):
            for value in (f"{7 + i}", f"{3.5 + i}", f"{25 * i}.0%"):
                assert value in parsed.text


def test_a_curve_of_three_points_is_a_chart(tmp_path):
    rows = [fake_run.train_row(i, loss=float(i), lr=0.1 if i < 3 else math.nan) for i in (1, 2, 3)]
    parsed = Page(html.page(fake_run.metrics(tmp_path / "r", *rows)))
    assert parsed.count("figure", "chart") == 1  # of the rate there are two values


def _captions(tmp_path, true, other, se, *, step=5000, num=500):
    row = {"kind": "eval", "step": step, "samples": 8 * step, "eval": "captions", "num": num,
           "caption_loss": true, "caption_loss_shuffled": other}  # fmt: skip
    row |= {} if se is None else {"caption_gap_se": se}
    return Page(
        html.page(fake_run.metrics(tmp_path / "r", fake_run.train_row(step, loss=1.0), row))
    ).text


READS, IGNORES = "so it reads the image", "so it hardly reads the image"


@pytest.mark.parametrize(
    "numbers, conclusion",
    [
        ((1.42, 3.85, 0.05), READS),
        ((2.0, 2.005, 0.002), IGNORES),
        ((2.0, 2.3, 0.2), None),  # within its error
        ((2.0, 2.01, 0.2), None),  # may be either
        ((1.42, 3.85, None), None),  # no error known
        ((1.42, 3.85, math.nan), None),
        ((1.42, math.nan, 0.1), None),
    ],
)
def test_conclusions_need_a_difference_beyond_its_error(tmp_path, numbers, conclusion):
    text = _captions(tmp_path, *numbers)
    assert [c for c in (READS, IGNORES) if c in text] == ([conclusion] if conclusion else [])


@pytest.mark.parametrize("size", [{"step": 2}, {"num": 32}])
def test_conclusions_need_steps_and_records(tmp_path, size):
    text = _captions(tmp_path, 5.28, 5.39, 0.01, **size)
    assert READS not in text and IGNORES not in text
    assert "5.28" in text and "5.39" in text


def test_a_recall_comes_with_its_standard_error(tmp_path):
    row = {
        "kind": "eval",
        "step": 9,
        "eval": "retrieval",
        "split": "val",
        "i2t/R@1": 0.3,
        "num": 200,
    }
    text = Page(
        html.page(fake_run.metrics(tmp_path / "r", fake_run.train_row(9, loss=1.0), row))
    ).text
    assert "± 3.2" in text  # sqrt(0.3 · 0.7 / 200)


# --- runs beside each other


def _runs(tmp_path, *recalls, num=200, data=""):
    runs = []
    for i, recall in enumerate(recalls):
        rows = [fake_run.train_row(s, loss=3.0 - i, **{"time/examples_per_s": 100.0 + i, "time/elapsed_s": 60.0 * s})
                for s in range(1, 5)]  # fmt: skip
        row = {"kind": "eval", "step": 4, "samples": 32, "eval": "retrieval", "split": "val",
               "i2t/R@1": recall, "i2t/median_rank": 5 + i, "num": num}  # fmt: skip
        row["fingerprint"] = f"{data}{i}" if data else "same"
        runs.append(fake_run.metrics(tmp_path / f"run-{i}", *rows, row))
    return runs


def _cells(text, tag):
    return re.findall(rf'<td class="{tag}">([^<]*)<', text)


def test_the_best_is_marked_with_time_and_throughput_beside(tmp_path):
    text = html.comparison(_runs(tmp_path, 0.2, 0.5, 0.48))
    assert set(_cells(text, "best")) == {"5", "50.0%", "102"}
    assert _cells(text, "near") == ["48.0%"]  # within two standard errors of the best
    assert "examples / s" in text and "4 min" in text and "within" in text


def test_nothing_is_best_where_all_are_equal_or_the_data_differ(tmp_path):
    text = html.comparison(_runs(tmp_path, 0.5, 0.5))
    assert "50.0%" not in _cells(text, "best")
    text = html.comparison(_runs(tmp_path, 0.2, 0.5, data="b"))
    assert "50.0%" not in _cells(text, "best") and "not evaluated on the same data" in text


def test_the_rows_of_one_run_mark_the_best(tmp_path):
    rows = [{"kind": "eval", "step": s, "samples": s, "eval": "retrieval", "split": "val", "i2t/R@1": v, "num": 100}
            for s, v in ((1, 0.1), (2, 0.6), (3, 0.2))]  # fmt: skip
    text = html.page(fake_run.metrics(tmp_path / "r", fake_run.train_row(3, loss=1.0), *rows))
    assert _cells(text, "best") == ["60.0%"]


# --- the length of the page


def test_the_page_before_the_galleries_is_bounded(tmp_path):
    """However many evaluations and metrics there are: what is over a few rows of cards is folded."""
    many = [key for k in range(40) for key in (f"m{k}", f"time/m{k}")]
    rows = [fake_run.train_row(i, loss=1.0 / i, **dict.fromkeys(many, i)) for i in range(1, 5)]
    rows += [{"kind": "eval", "step": i, "eval": f"e{k}", "split": "test", "accuracy": 0.1 * i, "num": 10}
             for i in range(1, 5) for k in range(20)]  # fmt: skip
    text = html.page(fake_run.metrics(tmp_path / "r", *rows))
    assert text.count("<figure") == 20 + (1 + 35) + 40
    shown = _Unfolded(text)
    assert shown.figures <= 15 and shown.cards <= 6
    order = re.findall(r'<section id="(\w+)"', text)
    assert order.index("retrieval") > order.index("throughput")


class _Unfolded(HTMLParser):
    """Counts charts and tables on cards outside of what is folded."""

    def __init__(self, text):
        super().__init__()
        self.figures = self.cards = self._folds = 0
        self.feed(text.split('id="retrieval"')[0])

    def handle_starttag(self, tag, attrs):
        words = (dict(attrs).get("class") or "").split()
        self._folds += tag == "details" and ("more" in words or self._folds > 0)
        self.figures += tag == "figure" and not self._folds
        self.cards += tag == "div" and "card" in words and not self._folds

    def handle_endtag(self, tag):
        self._folds -= tag == "details" and self._folds > 0


def _evaluated(tmp_path, *evals):
    rows = [fake_run.train_row(1, loss=2.0), fake_run.train_row(2, loss=1.0)]
    for split, name, values in evals:
        row = {"kind": "eval", "step": 2, "samples": 2, "eval": name, "split": split, "num": 200}
        rows.append(row | values)
    return fake_run.metrics(tmp_path / "run", *rows)


def test_the_headline_prefers_the_test_split_and_says_of_what(tmp_path):
    from vlp.report import summary

    retrieval = lambda value: {"i2t/R@1": value, "t2i/R@1": value}
    tone = {"accuracy": 0.6, "top5": 0.99, "num_classes": 6}
    run = _evaluated(
        tmp_path,
        ("val", "validation", retrieval(0.25)),
        ("test", "retrieval", retrieval(0.5)),
        ("test_variants", "skin_tone", tone),
    )
    tiles = {label: (value, note) for label, value, note, _ in summary.figures(run)}
    value, note = tiles["image → text R@1"]
    assert value.startswith("50") and note.endswith("test")
    assert "skin tone accuracy" in tiles and "test variants" in tiles["skin tone accuracy"][1]
    assert "the test split" in summary.sentences(run)["retrieval"]["where"]


def test_top_5_of_six_classes_is_left_out(tmp_path):
    from vlp.report import tables

    for classes, shown in ((6, False), (9, False), (10, True), (100, True)):
        tone = {"accuracy": 0.6, "top5": 0.99, "num_classes": classes}
        (folder := tmp_path / str(classes)).mkdir()
        run = _evaluated(folder, ("test", "skin_tone", tone))
        assert ("top 5" in str(tables.evaluation(run.evals)).casefold()) == shown


def test_gallery_and_table_have_one_name(tmp_path):
    artefact = {"kind": "zeroshot", "label": "tone", "split": "test"}
    config = {"evals": {"skin_tone": {"name": "zeroshot", "label": "tone"}}}
    assert html._title("zeroshot_tone_test", artefact, config) == "Skin tone · test"
    assert html._title("zeroshot_tone_test", artefact, {}) == "Tone · test"


def test_ranks_have_whole_ticks():
    from vlp.report import axes, curves

    (group,) = (g for g in curves.EVAL if "median_rank" in g.pattern)
    assert group.whole
    assert axes.Axis(0.9, 1.1, 0, 100).ticks(num=5, whole=True) == [1.0]
