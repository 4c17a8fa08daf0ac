"""Two or more runs side by side: last evaluations, curves over each other, and the settings that differ."""

import math
from collections.abc import Sequence

import numpy as np

from vlp.core import pages
from vlp.report import curves, load, names, numbers, summary, svg, tables, traces


def labels(runs: Sequence[load.Run]) -> list[str]:
    """A name for each run: of the config, or of its folder where two configs share theirs."""
    found = [run.name for run in runs]
    if len(set(found)) == len(found):
        return found
    folders = [run.path.resolve().name for run in runs]
    if len(set(folders)) == len(folders):
        return folders
    return [str(run.path) for run in runs]


def overview(runs: Sequence[load.Run]) -> str:
    """A row a run: its size, time, speed and device, and its last training loss."""
    heads = ("", "samples", "steps", "time", "examples / s", "waiting for data", "device", "loss")
    lines = []
    for name, run in zip(labels(runs), runs, strict=True):
        last = (run.train or run.evals)[-1]
        wait = summary.median(run.train, "time/data_wait_frac")
        _, loss = curves.column(run.train, "loss")
        lines.append(
            [
                pages.text(name, 200),
                numbers.si(float(last.samples)),
                numbers.count(last.step),
                *_time_and_rate(run),
                "–" if wait is None else numbers.percent(wait),
                pages.text(summary.hardware(run.versions)) or "–",
                numbers.short(float(loss[-1])) if len(loss) else "–",
            ]
        )
    return f'<div class="card wide">{tables.table(heads, lines)}</div>'


def evaluations(runs: Sequence[load.Run]) -> str:
    """A table an evaluation: a row a run with its last numbers, the best marked, time and speed beside."""
    kinds = dict.fromkeys(kind for run in runs for kind in run.latest())
    found = [_table(runs, kind, [run.latest().get(kind) for run in runs]) for kind in kinds]
    if not found:
        return ""
    hint = (
        '<p class="hint">The last evaluation of each run. <b>Bold</b>: the best of a column. '
        '<span class="near">Dotted</span>: within two standard errors of it, so not told apart by '
        "this many records.</p>"
    )
    return hint + "".join(found)


def training(runs: Sequence[load.Run]) -> list[svg.Chart]:
    """The curves of training, each with a line a run."""
    rows = [run.train for run in runs]
    keys = {k for r in rows for row in r for k in row.values if k[:5] != "time/"}
    first, *rest = sorted(keys, key=lambda key: (curves.order(key), key)) or [_RATE]
    return _charts(runs, rows, [first, _RATE, *rest], dots=False)


def courses(runs: Sequence[load.Run]) -> list[svg.Chart]:
    """The curves of the evaluations that some run made twice or more; the first metrics of each come first."""
    kinds = []
    for kind in dict.fromkeys(kind for run in runs for kind in run.latest()):
        rows = [tuple(r for r in run.evals if (r.eval, r.split) == kind) for run in runs]
        if max(map(len, rows)) > 1:
            found = dict.fromkeys(k for r in rows for row in r for k in row.values)
            keys = sorted(filter(curves.is_curve, found), key=_rank)
            kinds.append(_charts(runs, rows, keys, dots=True, of=names.evaluation(*kind)))
    first = [chart for charts in kinds for chart in charts[:2]]
    return first + [chart for charts in kinds for chart in charts[2:]]


def settings(runs: Sequence[load.Run]) -> str:
    """The settings that are not the same in all runs."""
    flat = [dict(tables.flat(run.config, "")) for run in runs]
    keys = [
        k for k in dict.fromkeys(k for f in flat for k in f) if len({f.get(k) for f in flat}) > 1
    ]
    if not keys:
        return '<p class="hint">None: all runs have the same config.</p>'
    head = "".join(f"<th>{pages.text(name, 200)}</th>" for name in labels(runs))
    body = "".join(
        f"<tr><th><code>{pages.text(key)}</code></th>"
        + "".join(f"<td><code>{pages.text(f.get(key, '–'))}</code></td>" for f in flat)
        + "</tr>"
        for key in keys
    )
    return (
        f'<div class="card wide"><div class="scroll"><table class="settings"><thead><tr><th></th>{head}'
        f"</tr></thead><tbody>{body}</tbody></table></div></div>"
    )


def _table(runs: Sequence[load.Run], kind: tuple[str, str], rows: Sequence[load.Row | None]) -> str:
    there = [row for row in rows if row is not None]
    keys = list(filter(curves.is_curve, dict.fromkeys(k for row in there for k in row.values)))
    keys.sort(key=tables.head_first(keys))
    same = len({row.data for row in there}) == 1 and len({row.values.get("num") for row in there}) == 1  # fmt: skip
    num = there[0].values.get("num", math.nan)
    columns: dict[str, list[str]] = {}
    for key in keys:
        values = [None if row is None else row.values.get(key) for row in rows]
        marked = tables.marks(key, values, num) if same else [""] * len(values)
        columns[key] = [tables.cell(key, *item) for item in zip(values, marked, strict=True)]
    seen = ["–" if row is None else numbers.si(float(row.samples)) for row in rows]
    rates = [None if r is None else summary.median(run.train, _RATE) for r, run in zip(rows, runs)]
    faster = tables.marks(_RATE, rates)
    body = ""
    for i, (name, run, row) in enumerate(zip(labels(runs), runs, rows, strict=True)):
        cells = "".join(column[i] for column in columns.values())
        time = "–" if row is None else _time_and_rate(run)[0]
        rate = "–" if rates[i] is None else numbers.si(rates[i] or 0.0)
        mark = f' class="{faster[i]}"' if faster[i] else ""
        body += (
            f"<tr><th>{pages.text(name, 200)}</th>{cells}<td>{seen[i]}</td><td>{time}</td>"
            f"<td{mark}>{rate}</td></tr>"
        )
    of = f" <span>{numbers.short(num)} records</span>" if same and math.isfinite(num) else ""
    differ = '<p class="hint">None is marked: this is not the same data in all runs.</p>'
    return (
        f'<div class="card wide"><h3>{pages.text(names.evaluation(*kind))}{of}</h3><div class="scroll">'
        f'<table class="numbers"><thead>{_heads(keys)}</thead><tbody>{body}</tbody></table></div>'
        f"{'' if same else differ}</div>"
    )


def _heads(keys: Sequence[str]) -> str:
    """Two rows of headers where metrics have a part before them ("image → text"), else one."""
    tails = [pages.text(names.metric(key).label) for key in keys]
    heads = [names.head(key) for key in keys]
    last = "".join(f"<th>{t}</th>" for t in (*tails, "samples seen", "time", "examples / s"))
    if not any(heads):
        return f"<tr><th></th>{last}</tr>"
    groups, at = "", 0
    while at < len(heads):
        size = next((i for i, h in enumerate(heads[at:]) if h != heads[at]), len(heads) - at)
        mark = ' class="group"' if heads[at] else ""
        groups += f'<th colspan="{size}"{mark}>{pages.text(heads[at])}</th>'
        at += size
    return f'<tr><th></th>{groups}<th colspan="3"></th></tr><tr><th></th>{last}</tr>'


_RATE = "time/examples_per_s"


def _time_and_rate(run: load.Run) -> list[str]:
    secs, rate = summary.seconds(run), summary.median(run.train, _RATE)
    return [
        numbers.duration(secs) if secs else "–",
        "–" if rate is None else numbers.si(rate),
    ]


def _rank(key: str) -> int:
    """Metrics that a reader looks for come first: R@1 both ways, then those that have a better way."""
    return 0 if key.endswith("/R@1") else 1 if names.metric(key).better else 2


def _charts(
    runs: Sequence[load.Run],
    rows: Sequence[Sequence[load.Row]],
    keys: Sequence[str],
    *,
    dots: bool,
    of: str = "",
) -> list[svg.Chart]:
    charts = []
    for key in keys:
        lines = [(name, *curves.column(r, key)) for name, r in zip(labels(runs), rows, strict=True)]
        series = tuple(traces.Series(*line) for line in lines if np.size(line[1]))
        if series:
            title, percent = pages.title(names.label(key)), names.metric(key).percent
            charts.append(svg.Chart(title, series, of=of, percent=percent, dots=dots))
    return charts
