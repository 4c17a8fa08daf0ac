"""Tables of the report as data: evaluations, stages, series too short for a curve, settings, heat maps.

Every cell is text; the templates draw the tables.
"""

import dataclasses
import json
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from vlp.core import pages
from vlp.report import curves, load, names, numbers, summary, svg

MAX_CLASSES = 40
MAX_STAGES = 20
MAX_NAME = 80  # characters of the name of a class or a stage
_NEAR = 2.0  # a value this many standard errors from the best is marked like it

Cell = str | tuple[str, str]  # text; or text and the class of its mark: "best", "near"


@dataclasses.dataclass(frozen=True)
class Table:
    """Numbers in columns; the first cell of a line names it, and a line of one cell is the heading of a group."""

    heads: Sequence[str]
    lines: Sequence[Sequence[Cell]]
    title: str = ""
    note: str = ""  # next to the title
    hint: str = ""  # below the table
    groups: Sequence[tuple[str, int]] = ()  # of columns, after the first one: text and size


@dataclasses.dataclass(frozen=True)
class HeatLine:
    """One line of a heat map: (text, share of the darkest in [0, 1]) of each cell; `pair`: the cell outlined."""

    name: str
    cells: Sequence[tuple[str, str]]
    pair: int
    last: str = ""


@dataclasses.dataclass(frozen=True)
class Heat:
    """A table whose cells are shaded; `missing` is the text shown without a table."""

    heads: Sequence[Any] = ()
    lines: Sequence[HeatLine] = ()
    corner: str = ""
    last: str = ""  # head of the last column; "": there is no such column
    hint: str = ""
    missing: str = ""


def evaluation(rows: Sequence[load.Row]) -> Table:
    """Returns the numbers of one evaluation: one line per metric with its first, its best and its last value."""
    last = rows[-1]
    ends = [rows[0], last] if len(rows) > 1 else [last]
    heads = [f"step {numbers.count(row.step)}" for row in ends]
    heads[1:1] = ["best"] if len(rows) > 2 else []
    keys = [k for k in dict.fromkeys(k for row in rows for k in row.values) if curves.is_curve(k)]
    keys = [k for k in keys if curves.says(last, k)]
    chances = {k: c for k in keys if (c := summary.chance(last, k)) is not None}
    num, group = last.values.get("num", math.nan), ""
    lines: list[list[Cell]] = []
    for key in sorted(keys, key=head_first(keys)):
        values = [row.values.get(key) for row in ends]
        if len(rows) > 2:
            course = [row.values.get(key) for row in rows]
            found = [v for v, mark in zip(course, marks(key, course)) if mark == "best"]
            values.insert(1, found[0] if found else None)
        if (head := names.head(key)) != group:
            group = head
            lines.append([pages.title(head)])
        label = names.metric(key).label if head else pages.title(names.metric(key).label)
        line = [label, *(cell(key, *c) for c in zip(values, marks(key, values, num), strict=True))]
        if chances:
            line.append(numbers.percent(chances[key], 2) if key in chances else "")
        lines.append(line)
    return Table(
        ["", *heads, *(["chance"] if chances else [])],
        lines,
        title=names.evaluation(last.eval, last.split),
        hint=_origin(last),
    )


def head_first(keys: Sequence[str]) -> Callable[[str], int]:
    """Returns the order that keeps metrics of one head together, those without a head first."""
    heads = list(dict.fromkeys(["", *map(names.head, keys)]))
    return lambda key: heads.index(names.head(key))


def marks(key: str, values: Sequence[float | None], num: float = math.nan) -> list[str]:
    """Marks the best values of a metric, and those that are as good within the error.

    No value is marked if the metric has no better direction, or if all values are equal.

    Args:
        key: the metric.
        values: to compare; None where there is no value.
        num: records behind each value, for its standard error; NaN: not known, then no value is "near".

    Returns:
        "best", "near" (within two standard errors of the best) or "" for each value.
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


def cell(key: str, value: float | None, mark: str = "") -> Cell:
    """Returns one value of a metric as a cell, "–" if there is none."""
    return ("–" if value is None else names.show(key, value)), mark


def stages(run: load.Run) -> Table | None:
    """Returns samples, time and speed of each stage; None for a run of one stage, or of more than MAX_STAGES."""
    lines, found = [], list(dict.fromkeys(row.stage for row in run.train))
    for name in found if 1 < len(found) <= MAX_STAGES else []:
        rows = [row for row in run.train if row.stage == name]
        before = [row for row in run.train if row.step < rows[0].step]
        samples, steps = rows[-1].samples, rows[-1].step
        secs = summary.seconds(run, rows[-1].step)
        if before:
            samples, steps = samples - before[-1].samples, steps - before[-1].step
            secs -= summary.seconds(run, before[-1].step)
        size = [name or "–", numbers.si(float(samples)), numbers.count(steps)]
        lines.append(size + [numbers.duration(secs) if secs else "–", *speed(rows)])
    heads = ("stage", "samples", "steps", "time", "examples / s", "waiting for data")
    return Table(heads, lines) if lines else None


def speed(rows: Sequence[load.Row]) -> list[str]:
    """Returns the median of examples per second and of the share of time spent waiting for data."""
    rate, wait = (summary.median(rows, f"time/{k}") for k in ("examples_per_s", "data_wait_frac"))
    return [
        "–" if rate is None else numbers.si(rate),
        "–" if wait is None else numbers.percent(wait),
    ]


def points(charts: Sequence[svg.Chart], columns: int = 3) -> list[Table]:
    """Returns the first and the last value of series that are too short for a curve, split over `columns` tables."""
    lines = []
    for chart in charts:
        show = numbers.percent if chart.percent else numbers.short
        for series in chart.series:
            label = chart.title
            if len(chart.series) > 1 and series.label.lower() != label.lower():
                label += f": {series.label}"
            label += f" ({chart.of})" if chart.of else ""
            ends = [show(float(y)) for y in series.y[[0, -1]]]
            lines.append([label, *(ends if len(series.y) > 1 else ["–", ends[1]])])
    each = max(4, math.ceil(len(lines) / columns))
    parts = [lines[i : i + each] for i in range(0, len(lines), each)]
    return [Table(("", "first", "last"), part) for part in parts]


def versions(values: dict[str, Any]) -> list[tuple[str, str]]:
    """Returns (name, text) of the run's software and hardware, without the attribution, which has its own section."""
    return [
        (pages.title(pages.words(str(key))), _as_text(value))
        for key, value in values.items()
        if key != "attribution"
    ]


def confusion(artefact: dict[str, Any]) -> Heat | None:
    """Returns how often each class (row) was taken for each class (column); None if the artefact has no such table."""
    classes = artefact.get("classes")
    try:
        counts_CC = np.array(artefact.get("confusion"), np.float64)
    except (TypeError, ValueError, OverflowError):
        return None
    if not isinstance(classes, list) or counts_CC.shape != (len(classes), len(classes)):
        return None
    if not (np.isfinite(counts_CC).all() and (counts_CC >= 0).all() and (counts_CC < 1e15).all()):
        return None
    if len(classes) > MAX_CLASSES:
        return Heat(missing=f"a table of {len(classes)} × {len(classes)} classes")
    heads = [pages.visible(name, MAX_NAME) for name in classes]
    lines = []
    for i, row in enumerate(counts_CC.tolist()):
        total = sum(row) or 1
        cells = [(numbers.short(n), f"{n / total:.3f}") for n in row]
        lines.append(HeatLine(heads[i], cells, i, numbers.percent(row[i] / total, 0)))
    return Heat(heads, lines, corner="is ↓ taken for →", last="right")


def flat(value: object, path: str = "") -> Iterator[tuple[str, str]]:
    """Yields ("a.b.c", "value") for every leaf of a config; lists of plain values are one leaf."""
    if isinstance(value, dict) and value:
        for key, item in value.items():
            yield from flat(item, f"{path}.{key}" if path else str(key))
    elif isinstance(value, list) and any(isinstance(item, dict) for item in value):
        for i, item in enumerate(value):
            yield from flat(item, f"{path}[{i}]")
    elif path:
        yield path, _as_text(value)


def _origin(row: load.Row) -> str:
    """Returns how many records the numbers come from, and their standard error."""
    parts = []
    num = row.values.get("num", math.nan)
    if math.isfinite(num):
        parts.append(f"{numbers.short(num)} records")
    if math.isfinite(classes := row.values.get("num_classes", math.nan)):
        parts.append(f"{numbers.short(classes)} classes")
    for key, value in row.values.items():
        known = names.metric(key)
        if known.percent and known.better and math.isfinite(error := summary.error(value, num)):
            label = names.label(key)
            parts.append(f"standard error of {label}: {100 * error:.1f}\N{NO-BREAK SPACE}points")
            break
    if math.isfinite(error := row.values.get("caption_gap_se", math.nan)):
        parts.append(f"standard error of the difference of both losses: {numbers.si(error, 2)}")
    if math.isfinite(secs := row.values.get("time/eval_s", math.nan)):
        parts.append(f"took {numbers.duration(secs) if secs >= 1 else 'under 1 s'}")
    return " · ".join(parts)


def _as_text(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
