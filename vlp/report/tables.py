"""Tables of the report: evaluations, stages, numbers that make no curve, the config with its search box."""

import json
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from vlp.core import pages
from vlp.report import curves, load, names, numbers, summary, svg

MAX_CLASSES = 40
MAX_STAGES = 20
_NEAR = 2.0  # standard errors of a difference within which a value is marked beside the best


def evaluation(rows: Sequence[load.Row]) -> str:
    """Returns a card with the numbers of one evaluation: a line a metric; its first value, its best, its last."""
    last = rows[-1]
    ends = [rows[0], last] if len(rows) > 1 else [last]
    heads = [f"step {numbers.count(row.step)}" for row in ends]
    keys = [k for k in dict.fromkeys(k for row in rows for k in row.values) if curves.is_curve(k)]
    chances = {k: c for k in keys if (c := summary.chance(last, k)) is not None}
    num, body, group = last.values.get("num", math.nan), "", ""
    width = len(ends) + (len(rows) > 2) + bool(chances) + 1
    for key in sorted(keys, key=head_first(keys)):
        values = [row.values.get(key) for row in ends]
        if len(rows) > 2:
            course = [row.values.get(key) for row in rows]
            found = [v for v, mark in zip(course, marks(key, course)) if mark == "best"]
            values.insert(1, found[0] if found else None)
        if (head := names.head(key)) != group:
            group = head
            body += (
                f'<tr class="group"><th colspan="{width}">{pages.text(pages.title(head))}</th></tr>'
            )
        cells = zip(values, marks(key, values, num), strict=True)
        label = names.metric(key).label if head else pages.title(names.metric(key).label)
        body += f"<tr><th>{pages.text(label)}</th>" + "".join(cell(key, *c) for c in cells)
        if chances:
            body += f"<td>{numbers.percent(chances[key], 2) if key in chances else ''}</td>"
        body += "</tr>"
    heads[1:1] = ["best"] if len(rows) > 2 else []
    head = "".join(f"<th>{h}</th>" for h in (*heads, *(["chance"] if chances else [])))
    title = pages.text(names.evaluation(last.eval, last.split))
    return (
        f'<div class="card"><h3>{title}</h3><div class="scroll"><table class="numbers"><thead><tr>'
        f"<th></th>{head}</tr></thead><tbody>{body}</tbody></table></div>{_origin(last)}</div>"
    )


def head_first(keys: Sequence[str]) -> Callable[[str], int]:
    """Returns the order that keeps metrics of one head together, those without a head first."""
    heads = list(dict.fromkeys(["", *map(names.head, keys)]))
    return lambda key: heads.index(names.head(key))


def marks(key: str, values: Sequence[float | None], num: float = math.nan) -> list[str]:
    """Returns which values of a metric are the "best", and which "near" it, as far as `num` records can tell.

    None is marked where no way is better, or where all values are equal.
    """
    known = names.metric(key)
    found = np.array([math.nan if v is None else v * known.better for v in values])
    finite = found[np.isfinite(found)]
    if not known.better or len(finite) < 2 or finite.min() == finite.max():
        return [""] * len(values)
    top = float(finite.max())
    out = []
    for value in found.tolist():
        both = [summary.error(abs(v), num) for v in (top, value)] if known.percent else [math.nan]
        near = top - value <= _NEAR * math.hypot(*both)
        out.append("best" if value == top else "near" if near else "")
    return out


def stages(run: load.Run) -> str:
    """Returns a card with a line a stage: its samples, time and speed; "" for a run of one stage, or of very many."""
    lines, found = [], list(dict.fromkeys(row.stage for row in run.train))
    for name in found if 1 < len(found) <= MAX_STAGES else []:
        rows = [row for row in run.train if row.stage == name]
        before = [row for row in run.train if row.step < rows[0].step]
        samples, steps = rows[-1].samples, rows[-1].step
        secs = summary.seconds(run, rows[-1].step)
        if before:
            samples, steps = samples - before[-1].samples, steps - before[-1].step
            secs -= summary.seconds(run, before[-1].step)
        rate, wait = (
            summary.median(rows, f"time/{k}") for k in ("examples_per_s", "data_wait_frac")
        )
        lines.append(
            [
                pages.text(name or "–"),
                numbers.si(float(samples)),
                numbers.count(steps),
                numbers.duration(secs) if secs else "–",
                "–" if rate is None else numbers.si(rate),
                "–" if wait is None else numbers.percent(wait),
            ]
        )
    if not lines:
        return ""
    heads = ("stage", "samples", "steps", "time", "examples / s", "waiting for data")
    return f'<div class="card wide">{table(heads, lines)}</div>'


def table(heads: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """Returns a table of numbers; the cells are HTML, the first of each line names it."""
    head = "".join(f"<th>{h}</th>" for h in heads)
    body = "".join(
        f"<tr><th>{first}</th>{''.join(f'<td>{cell}</td>' for cell in rest)}</tr>"
        for first, *rest in lines
    )
    return (
        f'<div class="scroll"><table class="numbers"><thead><tr>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def points(charts: Sequence[svg.Chart], columns: int = 3) -> str:
    """Returns what too few values for a curve say: a line each with the first and the last value."""
    lines = []
    for chart in charts:
        show = numbers.percent if chart.percent else numbers.short
        for series in chart.series:
            label = chart.title
            if len(chart.series) > 1 and series.label.lower() != label.lower():
                label += f": {series.label}"
            label += f" ({chart.of})" if chart.of else ""
            ends = [show(float(y)) for y in series.y[[0, -1]]]
            lines.append([pages.text(label), *(ends if len(series.y) > 1 else ["–", ends[1]])])
    if not lines:
        return ""
    each = max(4, math.ceil(len(lines) / columns))
    cards = [
        f'<div class="card">{table(("", "first", "last"), lines[i : i + each])}</div>'
        for i in range(0, len(lines), each)
    ]
    return f'<div class="cards">{"".join(cards)}</div>'


def config(values: dict[str, Any]) -> str:
    """Returns the config flattened to one row a setting; the script shows the search box."""
    rows = [
        f"<tr><th><code>{pages.text(key)}</code></th><td><code>{pages.text(value)}</code></td></tr>"
        for key, value in flat(values, "")
    ]
    return (
        f'<details class="card config"><summary>{len(rows)} settings</summary>'
        '<input type="search" placeholder="find a setting or value" aria-label="find" hidden>'
        f"{_settings(rows)}</details>"
    )


def versions(values: dict[str, Any]) -> str:
    """Returns what the run ran with; attribution has its own section."""
    rows = [
        f"<tr><th>{pages.text(pages.title(pages.words(str(key))))}</th><td>{pages.text(_version(value))}</td></tr>"
        for key, value in values.items()
        if key != "attribution"
    ]
    return (
        f'<details class="card config"><summary>{len(rows)} entries</summary>'
        f"{_settings(rows)}</details>"
    )


def confusion(artefact: dict[str, Any]) -> str:
    """Returns how often each class (row) was taken for each (column) as a heat map with numbers."""
    classes = artefact.get("classes")
    try:
        counts_CC = np.array(artefact.get("confusion"), np.float64)
    except (TypeError, ValueError, OverflowError):
        return ""
    if not isinstance(classes, list) or counts_CC.shape != (len(classes), len(classes)):
        return ""
    if not (np.isfinite(counts_CC).all() and (counts_CC >= 0).all() and (counts_CC < 1e15).all()):
        return ""
    if len(classes) > MAX_CLASSES:
        size = f"{len(classes)} × {len(classes)}"
        return f'<p class="missing">Left out: a table of {size} classes.</p>'
    head = "".join(f"<th>{pages.text(name, 80)}</th>" for name in classes)
    body = ""
    for i, (name, row) in enumerate(zip(classes, counts_CC.tolist(), strict=True)):
        total = sum(row) or 1
        cells = "".join(
            f'<td class="heat{" diagonal" * (i == j)}" style="--share:{n / total:.3f}">'
            f"{numbers.short(n)}</td>"
            for j, n in enumerate(row)
        )
        right = numbers.percent(row[i] / total, 0)
        body += f"<tr><th>{pages.text(name, 80)}</th>{cells}<td>{right}</td></tr>"
    return (
        f'<div class="card wide"><div class="scroll"><table class="numbers confusion"><thead><tr>'
        f"<th>is ↓ taken for →</th>{head}<th>right</th></tr></thead><tbody>{body}</tbody></table></div></div>"
    )


def flat(value: object, path: str) -> Iterator[tuple[str, str]]:
    """Yields ("a.b.c", "value") for every leaf; lists of plain values are one leaf."""
    if isinstance(value, dict) and value:
        for key, item in value.items():
            yield from flat(item, f"{path}.{key}" if path else str(key))
    elif isinstance(value, list) and any(isinstance(item, dict) for item in value):
        for i, item in enumerate(value):
            yield from flat(item, f"{path}[{i}]")
    elif path:
        yield path, _version(value)


def _settings(rows: list[str]) -> str:
    body = "".join(rows)
    return f'<div class="scroll"><table class="settings"><tbody>{body}</tbody></table></div>'


def cell(key: str, value: float | None, mark: str = "") -> str:
    """Returns one value of a metric as a cell, "–" where there is none."""
    text = "–" if value is None else names.show(key, value)
    return f'<td class="{mark}">{text}</td>' if mark else f"<td>{text}</td>"


def _origin(row: load.Row) -> str:
    """Returns how many records the numbers come from, and how sure they can be."""
    parts = []
    num = row.values.get("num", math.nan)
    if math.isfinite(num):
        parts.append(f"{numbers.short(num)} records")
    if math.isfinite(classes := row.values.get("num_classes", math.nan)):
        parts.append(f"{numbers.short(classes)} classes")
    for key, value in row.values.items():
        known = names.metric(key)
        if known.percent and known.better and math.isfinite(error := summary.error(value, num)):
            label = pages.text(names.label(key))
            parts.append(f"standard error of {label}: {100 * error:.1f}\N{NO-BREAK SPACE}points")
            break
    if math.isfinite(error := row.values.get("caption_gap_se", math.nan)):
        parts.append(f"standard error of the difference of both losses: {numbers.si(error, 2)}")
    if math.isfinite(secs := row.values.get("time/eval_s", math.nan)):
        parts.append(f"took {numbers.duration(secs) if secs >= 1 else 'under 1 s'}")
    return f'<p class="hint">{" · ".join(parts)}</p>' if parts else ""


def _version(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
