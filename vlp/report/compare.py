"""Two or more runs side by side: last evaluations, curves over each other, and the settings that differ."""

from collections.abc import Sequence
from html import escape

import numpy as np

from vlp.report import curves, load, numbers, svg, tables, traces

_PERCENT = ("R@", "accuracy", "top5", "mean_per_class", "exact_match", "retrieval@")


def names(runs: Sequence[load.Run]) -> list[str]:
    """A name for each run: of the config, or of its folder where two configs share theirs."""
    found = [run.name for run in runs]
    if len(set(found)) == len(found):
        return found
    folders = [run.path.resolve().name for run in runs]
    if len(set(folders)) == len(folders):
        return folders
    return [str(run.path) for run in runs]


def evaluations(runs: Sequence[load.Run]) -> str:
    """One table for each evaluation: a row a run, its last numbers."""
    kinds = dict.fromkeys(kind for run in runs for kind in run.latest())
    return "".join(
        f"<h3>{escape(name)}{f' · {escape(split)}' if split else ''}</h3>"
        + _table(runs, [run.latest().get((name, split)) for run in runs])
        for name, split in kinds
    )


def training(runs: Sequence[load.Run]) -> list[svg.Chart]:
    """The curves of training, each with a line a run."""
    rows = [run.train for run in runs]
    keys = dict.fromkeys(k for r in rows for row in r for k in row.values if k[:5] != "time/")
    return _charts(runs, rows, list(keys), dots=False)


def courses(runs: Sequence[load.Run]) -> list[svg.Chart]:
    """The curves of the evaluations that some run made twice or more."""
    charts = []
    for kind in dict.fromkeys(kind for run in runs for kind in run.latest()):
        rows = [tuple(r for r in run.evals if (r.eval, r.split) == kind) for run in runs]
        if max(map(len, rows)) > 1:
            keys = dict.fromkeys(k for r in rows for row in r for k in row.values)
            keys = [k for k in keys if k[:5] != "time/" and k[:3] != "num"]
            charts += _charts(runs, rows, keys, dots=True, where=" · ".join(filter(None, kind)))
    return charts


def settings(runs: Sequence[load.Run]) -> str:
    """The settings that are not the same in all runs."""
    flat = [dict(tables.flat(run.config, "")) for run in runs]
    keys = [
        k for k in dict.fromkeys(k for f in flat for k in f) if len({f.get(k) for f in flat}) > 1
    ]
    head = "".join(f"<th>{escape(name)}</th>" for name in names(runs))
    body = "".join(
        f"<tr><th><code>{escape(key)}</code></th>"
        + "".join(f"<td><code>{escape(f.get(key, '–'))}</code></td>" for f in flat)
        + "</tr>"
        for key in keys
    )
    if not body:
        return '<p class="hint">None: all runs have the same config.</p>'
    return (
        f'<div class="scroll"><table class="settings"><thead><tr><th></th>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def _table(runs: Sequence[load.Run], rows: Sequence[load.Row | None]) -> str:
    keys = dict.fromkeys(k for row in rows if row for k in row.values)
    keys = [k for k in keys if k[:5] != "time/" and k[:3] != "num"]
    head = "".join(f"<th>{escape(curves.label(k))}</th>" for k in ("samples seen", *keys))
    body = ""
    for name, row in zip(names(runs), rows, strict=True):
        cells = ["–"] * (len(keys) + 1)
        if row is not None:
            shown = [_text(k, row.values[k]) if k in row.values else "–" for k in keys]
            cells = [numbers.si(float(row.samples)), *shown]
        body += f"<tr><th>{escape(name)}</th>{''.join(f'<td>{c}</td>' for c in cells)}</tr>"
    return (
        f'<div class="scroll"><table class="numbers"><thead><tr><th></th>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def _charts(
    runs: Sequence[load.Run],
    rows: Sequence[Sequence[load.Row]],
    keys: Sequence[str],
    *,
    dots: bool,
    where: str = "",
) -> list[svg.Chart]:
    charts = []
    for key in keys:
        lines = [(name, *curves.column(r, key)) for name, r in zip(names(runs), rows, strict=True)]
        series = tuple(traces.Series(*line) for line in lines if np.size(line[1]))
        title = curves.label(key) + (f" ({where})" if where else "")
        percent = _is_percent(key)
        charts.append(svg.Chart(title, series, percent=percent, dots=dots))
    return charts


def _text(key: str, value: float) -> str:
    return numbers.percent(value) if _is_percent(key) else numbers.si(value, 4)


def _is_percent(key: str) -> bool:
    return key.rpartition("/")[2].startswith(_PERCENT)
