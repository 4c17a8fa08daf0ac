"""What is drawn: which metrics share a chart, lines, marks and ticks; numbers as text."""

import json
import math
import re

import numpy as np
import pytest

from helpers import fake_run
from helpers.page_parser import Page
from vlp.report import axes, curves, load, numbers, svg, traces
from vlp.report import html as page


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    return fake_run.write(tmp_path_factory.mktemp("run") / "full", num_rows=70)


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
def test_metrics_are_read_as_numbers(raw, want):
    assert (
        load.number(raw) == pytest.approx(want, nan_ok=True)
        if want is not None
        else load.number(raw) is None
    )


def test_nan_breaks_the_line_and_is_marked(tmp_path):
    values = [2.0, "NaN", 1.5, None, math.inf, 1.0]
    run = fake_run.metrics(
        tmp_path / "r", *(fake_run.train_row(i + 1, loss=v) for i, v in enumerate(values))
    )
    text = page.page(run)
    loss = re.search(r'<path class="line s0" d="(M[^"]+)"/>', text.split('id="training"')[1])
    assert loss[1].count("M") == 3
    assert "nan" not in loss[1]
    assert text.count('class="lost"') == 3
    assert "✕ 3 values not finite" in Page(text).text


def test_nan_everywhere_makes_a_page(tmp_path):
    run = fake_run.metrics(
        tmp_path / "r", *(fake_run.train_row(i, loss=math.nan, lr=math.nan) for i in range(100))
    )
    Page(page.page(run))
    nan = dict.fromkeys(("i2t/R@1", "num", "caption_loss", "caption_loss_shuffled", "exact_match"))
    rows = ({"kind": "eval", "step": i, "eval": "e", **nan} for i in (1, 2))
    text = Page(page.page(fake_run.metrics(tmp_path / "s", *rows))).text
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
    run = fake_run.metrics(
        tmp_path / "r",
        *(
            fake_run.train_row(
                i, loss=3.0 * i, contrastive=i, sigmoid=3.0 * i, new_thing=2 * i, lr=0.1
            )
            for i in (1, 2)
        ),
    )
    charts = {chart.title: [s.label for s in chart.series] for chart in curves.train_charts(run)}
    assert charts == {
        "Loss": ["loss", "contrastive", "new thing"],
        "Learning rate": ["learning rate"],
    }


def test_unknown_metrics_get_a_chart_each(tmp_path):
    run = fake_run.metrics(
        tmp_path / "r",
        *(fake_run.train_row(i, **{"odd/one": 1.0, "odd/two": i, "time/odd": 1}) for i in (1, 2)),
    )
    assert [chart.title for chart in curves.train_charts(run)] == ["Odd one", "Odd two"]
    assert [chart.title for chart in curves.time_charts(run)] == ["Odd"]


def test_repeated_steps_keep_the_last(tmp_path):
    """A run resumed from step 1 logs steps 2 and 3 again."""
    rows = [
        fake_run.train_row(s, loss=v) for s, v in ((1, 9.0), (2, 8.0), (3, 7.0), (2, 1.0), (3, 0.5))
    ]
    assert [row.values["loss"] for row in fake_run.metrics(tmp_path / "r", *rows).train] == [
        9.0,
        1.0,
        0.5,
    ]


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


def test_hover_data_of_a_long_line_is_whole(tmp_path):
    run = load.load(fake_run.write(tmp_path / "r", num_rows=400))
    for chart in curves.train_charts(run):
        hover = json.loads(dict(Page(svg.figure(chart)).tags)["figure"]["data-chart"])
        assert all(len(s["x"]) == len(s["y"]) == len(s["text"]) > 300 for s in hover["series"])


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
