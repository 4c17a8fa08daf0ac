"""Two or more runs side by side, as data: last evaluations, curves in one chart, and the settings that differ."""

import itertools
import math
from collections.abc import Sequence

import numpy as np

from vlp.core import pages
from vlp.report import curves, load, names, numbers, summary, svg, tables, traces

_RATE = "time/examples_per_s"
_OTHER_DATA = "No value is marked: the runs were not evaluated on the same data."


def labels(runs: Sequence[load.Run]) -> list[str]:
    """Returns a name for each run: its config's, or its folder's if two configs have the same name."""
    found = [run.name for run in runs]
    if len(set(found)) == len(found):
        return found
    folders = [load.folder_name(run.path) for run in runs]
    if len(set(folders)) == len(folders):
        return folders
    return [str(run.path) for run in runs]


def short_labels(runs: Sequence[load.Run]) -> list[str]:
    """Returns `labels` cut for a table."""
    return [pages.visible(label, 200) for label in labels(runs)]


def overview(runs: Sequence[load.Run]) -> tables.Table:
    """Returns one line per run: its size, time, speed and device, and its last training loss."""
    heads = ("", "samples", "steps", "time", "examples / s", "waiting for data", "device", "loss")
    lines = []
    for name, run in zip(short_labels(runs), runs, strict=True):
        last = (run.train or run.evals)[-1]
        _, loss = curves.column(run.train, "loss")
        lines.append(
            [
                name,
                numbers.si(float(last.samples)),
                numbers.count(last.step),
                _time(run),
                *tables.speed(run.train),
                summary.hardware(run.versions) or "–",
                numbers.short(float(loss[-1])) if len(loss) else "–",
            ]
        )
    return tables.Table(heads, lines)


def evaluations(runs: Sequence[load.Run]) -> list[tables.Table]:
    """Returns one table per evaluation: a line per run with its last numbers (the best marked), time and speed."""
    kinds = dict.fromkeys(kind for run in runs for kind in run.latest())
    return [_table(runs, kind) for kind in kinds]


def training(runs: Sequence[load.Run]) -> list[svg.Chart]:
    """Returns the training curves, each with one line per run."""
    rows = [run.train for run in runs]
    keys = {k for r in rows for row in r for k in row.values if k[:5] != "time/"}
    first, *rest = sorted(keys, key=lambda key: (curves.order(key), key)) or [_RATE]
    return _charts(runs, rows, [first, _RATE, *rest])


def courses(runs: Sequence[load.Run]) -> list[svg.Chart]:
    """Returns the curves of evaluations that some run made at least twice, two charts of each evaluation first."""
    kinds = []
    for kind in dict.fromkeys(kind for run in runs for kind in run.latest()):
        rows = [tuple(r for r in run.evals if (r.eval, r.split) == kind) for run in runs]
        if max(map(len, rows)) > 1:
            found = dict.fromkeys(k for r in rows for row in r for k in row.values)
            keys = sorted(filter(curves.is_curve, found), key=_rank)
            kinds.append(_charts(runs, rows, keys, of=names.evaluation(*kind)))
    first = [chart for charts in kinds for chart in charts[:2]]
    return first + [chart for charts in kinds for chart in charts[2:]]


def settings(runs: Sequence[load.Run]) -> list[tuple[str, list[str]]]:
    """Returns the settings that are not the same in all runs: name, and its value in each run."""
    flat = [dict(tables.flat(run.config)) for run in runs]
    keys = dict.fromkeys(k for f in flat for k in f)
    found = [(key, [f.get(key) for f in flat]) for key in keys]
    return [(k, ["–" if v is None else v for v in vs]) for k, vs in found if len(set(vs)) > 1]


def _table(runs: Sequence[load.Run], kind: tuple[str, str]) -> tables.Table:
    rows = [run.latest().get(kind) for run in runs]
    there = [row for row in rows if row is not None]
    keys = list(filter(curves.is_curve, dict.fromkeys(k for row in there for k in row.values)))
    keys.sort(key=tables.head_first(keys))
    same = len({row.data for row in there}) == 1 and len({row.values.get("num") for row in there}) == 1  # fmt: skip
    num = there[0].values.get("num", math.nan)
    columns: list[list[tables.Cell]] = []
    for key in keys:
        values = [None if row is None else row.values.get(key) for row in rows]
        marked = tables.marks(key, values, num) if same else [""] * len(values)
        columns.append([tables.cell(key, *item) for item in zip(values, marked, strict=True)])
    columns.append(["–" if row is None else numbers.si(float(row.samples)) for row in rows])
    columns.append(["–" if r is None else _time(run) for r, run in zip(rows, runs, strict=True)])
    rates = [None if r is None else summary.median(run.train, _RATE) for r, run in zip(rows, runs)]
    shown = ["–" if rate is None else numbers.si(rate) for rate in rates]
    columns.append(list(zip(shown, tables.marks(_RATE, rates), strict=True)))
    tails = [names.metric(key).label for key in keys]
    heads = [(head, len(list(group))) for head, group in itertools.groupby(map(names.head, keys))]
    return tables.Table(
        ["", *tails, "samples seen", "time", "examples / s"],
        list(zip(short_labels(runs), *columns, strict=True)),
        title=names.evaluation(*kind),
        note=f"{numbers.short(num)} records" if same and math.isfinite(num) else "",
        hint="" if same else _OTHER_DATA,
        groups=[*heads, ("", 3)] if any(head for head, _ in heads) else (),
    )


def _time(run: load.Run) -> str:
    secs = summary.seconds(run)
    return numbers.duration(secs) if secs else "–"


def _rank(key: str) -> int:
    """Puts the metrics that a reader looks for first: R@1 both ways, then those with a better direction."""
    return 0 if key.endswith("/R@1") else 1 if names.metric(key).better else 2


def _charts(
    runs: Sequence[load.Run],
    rows: Sequence[Sequence[load.Row]],
    keys: Sequence[str],
    of: str = "",
) -> list[svg.Chart]:
    """Returns a chart per key with a line per run. of: the evaluation that the rows belong to; "": training."""
    charts = []
    for key in keys:
        lines = [(name, *curves.column(r, key)) for name, r in zip(labels(runs), rows, strict=True)]
        series = tuple(traces.Series(*line) for line in lines if np.size(line[1]))
        if series:
            title, percent = pages.title(names.label(key)), names.metric(key).percent
            charts.append(svg.Chart(title, series, of=of, percent=percent, dots=bool(of)))
    return charts
