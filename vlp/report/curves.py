"""Which metrics share a chart, and the title of each chart. The first pattern that matches a key wins.

A key that matches no pattern gets a chart of its own, with its name from names.py: a new objective needs no line
here.
"""

import dataclasses
import functools
import re
from collections.abc import Iterable

import numpy as np

from vlp.core import pages
from vlp.report import load, names, svg, traces


@dataclasses.dataclass(frozen=True)
class Group:
    """One chart: the keys that it takes (fullmatch), its title, and whether values are fractions or need a log axis."""

    pattern: str
    title: str
    percent: bool = False
    log: bool | None = None
    whole: bool = False


TRAIN = (
    Group(r"(.*)/retrieval@\d+", "Retrieval in the batch", percent=True),
    Group(r"caption/(accuracy|token_accuracy)", "Accuracy of the caption's words", percent=True),
    Group(r"(.*)/(accuracy|token_accuracy|acc@?\d*)", "Accuracy", percent=True),
    Group(r"grad_norm", "Gradient norm"),
    Group(r"lr", "Learning rate"),
    Group(r"logit_scale|scale", "Logit scale"),
    Group(r"(.*)/minus_log_batch", "Loss − ln(batch); 0 is chance"),
    Group(r"update_norm", "Update norm"),
    Group(r"param_norm", "Parameter norm"),
    Group(r"logit_bias|bias", "Logit bias"),
)
TIME = (
    Group(r"time/examples_per_s", "Examples per second"),
    Group(r"time/data_wait_frac", "Time spent waiting for data", percent=True),
    Group(r"time/(.*\.)?input_share_.*", "Where the loader's time goes", percent=True),
    Group(r"time/(.*\.)?input_truncated_frac", "Texts cut to the text length", percent=True),
    Group(r"time/mfu", "Model FLOPs utilization", percent=True),
    Group(r"time/(.*\.)?input_read_bytes", "Bytes read since the start"),
    Group(r"time/(.*\.)?input_read_.*", "Reads since the start"),
    Group(r"time/(.*\.)?(input_worker_)?rss_mb", "Resident memory of a process, MB"),
)
EVAL = (
    Group(r"i2t/R@\d+", "Image → text recall", percent=True),
    Group(r"t2i/R@\d+", "Text → image recall", percent=True),
    Group(r"(i2t|t2i)/median_rank", "Median rank of the right one", whole=True),
    Group(r"(i2t|t2i)/mean_rank", "Mean rank of the right one"),
    Group(r"caption_loss(_shuffled)?", "Caption loss: true and shuffled images"),
    Group(r"(.*)exact_match", "Exact captions", percent=True),
    Group(r"(.*/)?(accuracy|top[15]|mean_per_class|acc@?\d*)", "Accuracy", percent=True),
)
MAX_BANDS = 40
# Not curves: they describe the row itself.
_NOT_CURVES = re.compile(r"time/(elapsed|eval)_s|num(_.*)?|caption_gap_se")


def train_charts(run: load.Run) -> list[svg.Chart]:
    """Returns the training curves: losses first, then quality, then the optimiser's."""
    keys = _distinct(run, [key for key in _keys(run.train) if not key.startswith("time/")])
    losses = sorted((k for k in keys if order(k) <= 1), key=order)
    keys.sort(key=order)
    loss = Group("|".join(map(re.escape, losses)), "Loss")
    marks = tuple(sorted({float(row.samples) for row in run.evals}))
    charts = _charts(run.train, keys, (loss, *TRAIN), stages(run))
    return [dataclasses.replace(c, marks=marks if len(marks) <= 60 else ()) for c in charts]


def time_charts(run: load.Run) -> list[svg.Chart]:
    """Returns the timing curves of training."""
    keys = [key for key in _keys(run.train) if key.startswith("time/")]
    return _charts(run.train, keys, TIME, stages(run))


def eval_charts(run: load.Run, name: str, split: str) -> list[svg.Chart]:
    """Returns the curves of one evaluation over the run."""
    rows = [row for row in run.evals if (row.eval, row.split) == (name, split)]
    charts = _charts(rows, [k for k in _keys(rows) if says(rows[-1], k)], EVAL, stages(run))
    num, of = rows[-1].values.get("num", np.nan), names.evaluation(name, split)
    return [dataclasses.replace(c, of=of, dots=True, levels=_chance(c, num)) for c in charts]


def order(key: str) -> int:
    """Returns the rank of a training metric: the loss, its terms, then as TRAIN has them, then all others."""
    found = (i for i, group in enumerate(TRAIN, 2) if re.fullmatch(group.pattern, key))
    return 0 if key == "loss" else next(found, len(TRAIN) + 2 if "/" in key else 1)


def is_curve(key: str) -> bool:
    """Returns whether a metric is drawn as a curve. Those that describe a row (its size, its time) are not."""
    return not _NOT_CURVES.fullmatch(key)


def says(row: load.Row, key: str) -> bool:
    """Returns whether a metric of an evaluation says anything: top 5 of fewer than ten classes does not."""
    classes = row.values.get("num_classes", np.inf)
    return key.rpartition("/")[2] not in ("top5", "top_5") or not classes < 10


def stages(run: load.Run) -> tuple[traces.Band, ...]:
    """Returns where each stage lies, in samples seen; none for a run of one stage, or of more than MAX_BANDS."""
    starts = [i for i, row in enumerate(run.train) if not i or row.stage != run.train[i - 1].stage]
    if not 1 < len(starts) <= MAX_BANDS:
        return ()
    ends = [float(run.train[i - 1].samples) for i in (*starts[1:], len(run.train))]
    begins = [min(0.0, float(run.train[0].samples)), *ends]
    labels = [run.train[i].stage for i in starts]
    return tuple(traces.Band(*band) for band in zip(labels, begins, ends))


def column(rows: Iterable[load.Row], key: str) -> tuple[np.ndarray, np.ndarray]:
    """Returns the samples seen and the values of the rows that hold `key`."""
    points = [(row.samples, row.values[key]) for row in rows if key in row.values]
    table = np.array(points, dtype=np.float64).reshape(-1, 2)
    return table[:, 0], table[:, 1]


def _keys(rows: Iterable[load.Row]) -> list[str]:
    keys = dict.fromkeys(key for row in rows for key in row.values)
    return list(filter(is_curve, keys))


def _distinct(run: load.Run, keys: list[str]) -> list[str]:
    """Returns the keys without terms that equal the loss: its line would hide theirs."""
    loss = column(run.train, "loss")
    same = {k for k in keys if k != "loss" and "loss" in keys and _same(loss, column(run.train, k))}
    return [key for key in keys if key not in same]


def _same(a: tuple[np.ndarray, np.ndarray], b: tuple[np.ndarray, np.ndarray]) -> bool:
    close = functools.partial(np.allclose, rtol=1e-4, atol=0, equal_nan=True)
    return np.array_equal(a[0], b[0]) and bool(close(a[1], b[1]))


def _charts(
    rows: Iterable[load.Row],
    keys: list[str],
    groups: tuple[Group, ...],
    bands: tuple[traces.Band, ...],
) -> list[svg.Chart]:
    """Returns a chart for each group that takes any key, in order, then one for each key left.

    A chart takes up to svg.STYLES lines, which readers can tell apart; each further key gets a chart of its own.

    Args:
        rows: of training, or of one evaluation.
        keys: the metrics to draw.
        groups: which metrics share a chart.
        bands: the stages, drawn behind the lines.
    """
    rows = tuple(rows)
    left, charts = list(keys), []
    for group in groups:
        taken = [key for key in left if re.fullmatch(group.pattern, key)][: svg.STYLES]
        left = [key for key in left if key not in taken]
        charts += [_chart(rows, taken, group, bands)] if taken else []
    rest = [Group("", names.label(key), names.metric(key).percent) for key in left]
    charts += [_chart(rows, [k], g, bands) for k, g in zip(left, rest, strict=True)]
    return charts


def _chart(
    rows: tuple[load.Row, ...], keys: list[str], group: Group, bands: tuple[traces.Band, ...]
) -> svg.Chart:
    series = tuple(traces.Series(_short(key, keys), *column(rows, key)) for key in keys)
    return svg.Chart(
        title=pages.title(group.title),
        series=series,
        percent=group.percent,
        log=group.log,
        whole=group.whole,
        bands=bands,
    )


def _short(key: str, keys: list[str]) -> str:
    """Returns the label without the part that all of `keys` share: "R@5" for a chart of i2t/R@…"""
    heads, tails = {names.head(k) for k in keys}, {names.metric(k).label for k in keys}
    if len(keys) > 1 and len(heads) == 1:
        return names.metric(key).label
    if len(keys) > 1 and len(tails) == 1 and names.head(key):
        return names.head(key)
    return names.label(key)


def _chance(chart: svg.Chart, num: float) -> tuple[tuple[str, float], ...]:
    """Returns the level of a random ranking of `num` candidates, for charts of R@1."""
    if "recall" not in chart.title or not num > 0:
        return ()
    return (("chance R@1", 1 / float(num)),)
