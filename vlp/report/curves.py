"""Which metrics share a chart, and what it is called. First pattern that matches a key wins.

A key that no pattern knows still gets a chart of its own, under its own name: a new objective
needs no line here.
"""

import dataclasses
import functools
import re
from collections.abc import Iterable

import numpy as np

from vlp.report import load, svg, traces


@dataclasses.dataclass(frozen=True)
class Group:
    """One chart: the keys that it takes (fullmatch), its title, how its values are read."""

    pattern: str
    title: str
    percent: bool = False
    log: bool | None = None


TRAIN = (
    Group(r"(.*)/retrieval@\d+", "In-batch retrieval", percent=True),
    Group(r"(.*)/(accuracy|token_accuracy|acc@?\d*)", "Accuracy", percent=True),
    Group(r"(.*)/minus_log_batch", "Loss − ln(batch); 0 is chance"),
    Group(r"grad_norm", "Gradient norm"),
    Group(r"update_norm", "Update norm"),
    Group(r"param_norm", "Parameter norm"),
    Group(r"logit_scale|scale", "Logit scale"),
    Group(r"logit_bias|bias", "Logit bias"),
    Group(r"lr", "Learning rate"),
)
TIME = (
    Group(r"time/examples_per_s", "Examples per second"),
    Group(r"time/data_wait_frac", "Time spent waiting for data", percent=True),
    Group(r"time/(.*\.)?input_share_.*", "Where the loader's time goes", percent=True),
    Group(r"time/(.*\.)?input_truncated_frac", "Texts cut to the text length", percent=True),
    Group(r"time/(.*\.)?input_read_bytes", "Bytes read since the start"),
    Group(r"time/(.*\.)?input_read_.*", "Reads since the start"),
    Group(r"time/(.*\.)?(input_worker_)?rss_mb", "Resident memory of a process, MB"),
)
EVAL = (
    Group(r"i2t/R@\d+", "Image → text recall", percent=True),
    Group(r"t2i/R@\d+", "Text → image recall", percent=True),
    Group(r"(i2t|t2i)/median_rank", "Median rank of the right one"),
    Group(r"(i2t|t2i)/mean_rank", "Mean rank of the right one"),
    Group(r"caption_loss(_shuffled)?", "Caption loss: true and shuffled images"),
    Group(r"(.*)exact_match", "Exact captions", percent=True),
    Group(r"(.*/)?(accuracy|top[15]|mean_per_class|acc@?\d*)", "Accuracy", percent=True),
)
# Not curves: they say how the row came about.
_NOT_CURVES = re.compile(r"time/elapsed_s|num(_.*)?")
LABELS = {"i2t": "image → text", "t2i": "text → image"}
METRIC_LABELS = {
    "median_rank": "median rank",
    "caption_loss": "true image",
    "caption_loss_shuffled": "shuffled image",
    "exact_match": "exact captions",
    "mean_per_class": "mean of classes",
    "top5": "top 5",
    "num": "candidates:",
    "minus_log_batch": "− ln(batch)",
}


def train_charts(run: load.Run) -> list[svg.Chart]:
    """Returns the training curves: losses first, then quality, then the optimiser's."""
    keys = _unhidden(run, [key for key in _keys(run.train) if not key.startswith("time/")])
    known = [re.compile(group.pattern) for group in TRAIN]
    losses = [k for k in keys if "/" not in k and not any(p.fullmatch(k) for p in known)]
    loss = Group("|".join(map(re.escape, losses)), "Loss")
    marks = tuple(sorted({float(row.samples) for row in run.evals}))
    charts = _charts(run.train, keys, (loss, *TRAIN), stages(run))
    return [dataclasses.replace(c, marks=marks if len(marks) <= 60 else ()) for c in charts]


def time_charts(run: load.Run) -> list[svg.Chart]:
    """Returns the timing curves of training."""
    keys = [key for key in _keys(run.train) if key.startswith("time/")]
    return _charts(run.train, keys, TIME, stages(run))


def eval_charts(run: load.Run, name: str, split: str) -> list[svg.Chart]:
    """Returns the curves of one evaluation over the run; none where it ran only once."""
    rows = [row for row in run.evals if (row.eval, row.split) == (name, split)]
    if len(rows) < 2:
        return []
    keys = [key for key in _keys(rows) if not key.startswith("time/")]
    charts = _charts(rows, keys, EVAL, stages(run))
    num = rows[-1].values.get("num", np.nan)
    return [dataclasses.replace(c, dots=True, levels=_chance(c, num)) for c in charts]


def stages(run: load.Run) -> tuple[traces.Band, ...]:
    """Returns where each stage lies, in samples seen; none for a run of a single stage."""
    bands: list[traces.Band] = []
    for row in run.train:
        if not bands or bands[-1].label != row.stage:
            start = bands[-1].end if bands else min(0.0, float(row.samples))
            bands.append(traces.Band(row.stage, start, float(row.samples)))
        bands[-1] = dataclasses.replace(bands[-1], end=float(row.samples))
    return tuple(bands) if len(bands) > 1 else ()


def label(key: str) -> str:
    """Returns a key in words: "i2t/R@5" as "image → text R@5"."""
    parts = [METRIC_LABELS.get(part, LABELS.get(part, part)) for part in key.split("/")]
    return " ".join(parts)


def column(rows: Iterable[load.Row], key: str) -> tuple[np.ndarray, np.ndarray]:
    """Returns the samples seen and the values of the rows that hold `key`."""
    points = [(row.samples, row.values[key]) for row in rows if key in row.values]
    table = np.array(points, dtype=np.float64).reshape(-1, 2)
    return table[:, 0], table[:, 1]


def _keys(rows: Iterable[load.Row]) -> list[str]:
    keys = dict.fromkeys(key for row in rows for key in row.values)
    return [key for key in keys if not _NOT_CURVES.fullmatch(key)]


def _unhidden(run: load.Run, keys: list[str]) -> list[str]:
    """Returns the keys less any term that is all of the loss, which it would hide under."""
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
    """Returns a chart for each group that takes any key, in order, then one for each key left."""
    rows = tuple(rows)
    left, charts = list(keys), []
    for group in groups:
        taken = [key for key in left if re.fullmatch(group.pattern, key)]
        left = [key for key in left if key not in taken]
        charts += [_chart(rows, taken, group, bands)] if taken else []
    rest = [Group("", label(key).replace("time ", "", 1), "@" in key) for key in left]
    charts += [_chart(rows, [k], g, bands) for k, g in zip(left, rest, strict=True)]
    return charts


def _chart(
    rows: tuple[load.Row, ...], keys: list[str], group: Group, bands: tuple[traces.Band, ...]
) -> svg.Chart:
    series = tuple(traces.Series(_short(key, keys), *column(rows, key)) for key in keys)
    return svg.Chart(
        title=group.title,
        series=series,
        keys=keys[0] if len(keys) == 1 else "",
        percent=group.percent,
        log=group.log,
        bands=bands,
    )


def _short(key: str, keys: list[str]) -> str:
    """Returns the label without the part that all of `keys` share: "R@5" among i2t/R@…"""
    heads = {k.rpartition("/")[0] for k in keys}
    tails = {k.rpartition("/")[2] for k in keys}
    head, _, tail = key.rpartition("/")
    if len(keys) > 1 and len(heads) == 1:
        return label(tail)
    return label(head) if len(tails) == 1 and head and len(keys) > 1 else label(key)


def _chance(chart: svg.Chart, num: float) -> tuple[tuple[str, float], ...]:
    """Returns the level of a random ranking of `num` candidates, for charts of R@1."""
    if "recall" not in chart.title or not num > 0:
        return ()
    return (("chance R@1", 1 / float(num)),)
