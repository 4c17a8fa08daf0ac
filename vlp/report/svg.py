"""Line charts as inline SVG, with data for the hover labels of the page's script.

A chart is data (`Chart`); `figure` draws it. Colours, line styles and fonts are classes in
templates/report.css: one drawing serves light, dark and paper. Series have a legend and differ in
dash as well as in colour.
"""

import dataclasses
import json
import math
from collections.abc import Callable

import numpy as np
from markupsafe import Markup, escape

from vlp.core import pages
from vlp.report import axes, numbers, traces

WIDTH, HEIGHT = 360, 190  # user units: about the pixels of a card, on a wide page as on a phone
LEFT, RIGHT, TOP, BOTTOM = 44, 10, 20, 34
MIN_POINTS = 3  # finite values of a line; fewer are shown as numbers
STYLES = 6  # line styles s0 … s5 in report.css
_WIDE_RATIO = 50  # max/median from which values, all positive, get a log axis


@dataclasses.dataclass(frozen=True)
class Chart:
    """What to draw; `levels` are dashed reference lines, `marks` are evaluations on the x axis."""

    title: str
    series: tuple[traces.Series, ...]
    of: str = ""  # what the numbers are of: an evaluation
    x_label: str = "samples seen"
    percent: bool = False
    dots: bool = False
    log: bool | None = None  # None: if the values span decades
    bands: tuple[traces.Band, ...] = ()
    marks: tuple[float, ...] = ()
    levels: tuple[tuple[str, float], ...] = ()
    whole: bool = False  # values are counts: no ticks between them


def figure(chart: Chart) -> Markup:
    """Returns the chart as one <figure>: title, legend, drawing, hover data, a table of points."""
    x_axis, y_axis = _x_axis(chart), _y_axis(chart)
    whole = [s if chart.dots else traces.mean(s, chart.bands) for s in chart.series]
    lines = [traces.thin(s) for s in whole]
    notes = ["log scale"] if y_axis.log else []
    lost = sum(int((~np.isfinite(s.y)).sum()) for s in chart.series)
    notes += [f"✕ {lost} value{'s' * (lost > 1)} not finite"] if lost else []
    drawn = [
        _bands(chart, x_axis),
        _grid(chart, x_axis, y_axis),
        *(_level(y, y_axis) for _, y in chart.levels),
        *(_line(chart, i, line, x_axis, y_axis) for i, line in enumerate(lines)),
        _lost(chart, x_axis),
    ]
    hover = json.dumps(_hover(chart, lines, x_axis, y_axis), separators=(",", ":"))
    return pages.render(
        "vlp.report",
        "chart.html.j2",
        chart=chart,
        hover=escape(hover),  # whole, however long
        legend=_legend(chart),
        notes=" · ".join(notes),
        width=WIDTH,
        height=HEIGHT,
        aria=_aria(chart),
        drawing=Markup("".join(drawn)),
        heads=[chart.x_label, *(s.label for s in chart.series)],
        points=_points(chart),
    )


def is_curve(chart: Chart) -> bool:
    """Returns whether a line of the chart has at least MIN_POINTS finite values."""
    return any(np.isfinite(s.y).sum() >= MIN_POINTS for s in chart.series)


def spark(y: np.ndarray) -> Markup:
    """Returns a series as a small line without axes; empty for fewer than three points."""
    y = y[np.isfinite(y)]
    if len(y) < 3:
        return Markup()
    y = traces.thin(traces.Series("", np.arange(len(y)), y)).y
    low, high = float(y.min()), float(y.max())
    ys = 23 - 20 * (y - low) / ((high - low) or 1)
    xs = np.linspace(2, 98, len(y))
    points = " ".join(f"{a:.1f},{b:.1f}" for a, b in zip(xs, ys, strict=True))
    return Markup(
        '<svg class="spark" viewBox="0 0 100 26" preserveAspectRatio="none" aria-hidden="true">'
        f'<polyline points="{points}"/></svg>'
    )


# --- axes


def _x_axis(chart: Chart) -> axes.Axis:
    xs = np.concatenate([s.x for s in chart.series]) if chart.series else np.zeros(1)
    ends = [band.end for band in chart.bands]
    low, high = float(xs.min()), float(max([xs.max(), *ends]))
    low = min(0.0, low) if low < high / 2 or low == high else low
    return axes.Axis(low, high if high > low else low + 1, LEFT, WIDTH - RIGHT)


def _y_axis(chart: Chart) -> axes.Axis:
    ys = np.concatenate([s.y for s in chart.series] or [np.zeros(0)])
    ys = np.concatenate([ys[np.isfinite(ys)], [level for _, level in chart.levels]])
    if not len(ys):
        ys = np.array([0.0, 1.0])
    low, high = float(ys.min()), float(ys.max())
    log = chart.log
    if log is None:
        log = not chart.percent and low > 0 and high > _WIDE_RATIO * float(np.median(ys))
    if log and low > 0 and high > low:
        low, high = low / (high / low) ** 0.04, high * (high / low) ** 0.04
        return axes.Axis(low, high, HEIGHT - BOTTOM, TOP, log=True)
    if low == high == 0:
        high = 1.0
    if high - low < 1e-9 * max(abs(low), abs(high)):  # a constant: give it room
        low, high = low - abs(low) * 0.1, high + abs(high) * 0.1
    pad = 0.06 * (high - low)
    zero = 0 <= low < 0.35 * high  # a line that nearly starts at zero shows zero
    return axes.Axis(0.0 if zero else low - pad, high + pad, HEIGHT - BOTTOM, TOP)


def _grid(chart: Chart, x_axis: axes.Axis, y_axis: axes.Axis) -> str:
    out, y_ticks = [], y_axis.ticks(num=5, whole=chart.whole)
    y_labels = numbers.labels(y_ticks, as_percent=chart.percent)
    for value, label in zip(y_ticks, y_labels, strict=True):
        y = y_axis(value)
        out.append(
            f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
        )
        out.append(
            f'<text class="tick" x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{label}</text>'
        )
    base = HEIGHT - BOTTOM
    out.append(f'<line class="axis" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{base}" y2="{base}"/>')
    x_ticks = x_axis.ticks(num=5, whole=True)
    for value, label in zip(x_ticks, numbers.labels(x_ticks), strict=True):
        x = x_axis(value)
        out.append(f'<line class="axis" x1="{x:.1f}" x2="{x:.1f}" y1="{base}" y2="{base + 4}"/>')
        out.append(
            f'<text class="tick" x="{x:.1f}" y="{base + 16}" text-anchor="middle">{label}</text>'
        )
    for mark in chart.marks:
        x = x_axis(mark)
        out.append(
            f'<path class="mark" d="M{x - 4:.1f} {base - 1}h8l-4 -7z">'
            f"<title>evaluation at {numbers.si(mark)}</title></path>"
        )
    out.append(
        f'<text class="label" x="{WIDTH - RIGHT}" y="{HEIGHT - 3}" text-anchor="end">'
        f"{'▲ evaluation · ' if chart.marks else ''}{pages.text(chart.x_label)}</text>"
    )
    return "".join(out)


def _bands(chart: Chart, x_axis: axes.Axis) -> str:
    out = []
    for i, band in enumerate(chart.bands):
        start, end = x_axis(max(band.start, x_axis.low)), x_axis(min(band.end, x_axis.high))
        room = int((end - start - 6) / 6)  # letters that fit
        name = pages.visible(band.label, max(0, room - 1)) if len(band.label) > room else band.label
        x, anchor = start + 4, "start"
        if len(band.label) > room and i == len(chart.bands) - 1 and i:
            before = chart.bands[i - 1]
            if (
                start - x_axis(max(before.start, x_axis.low))
                > 6 * len(before.label + band.label) + 16
            ):
                name, room, x, anchor = band.label, len(band.label), end - 2, "end"
        text = f'<text class="band" x="{x:.1f}" y="{TOP - 7}" text-anchor="{anchor}">{pages.text(name)}</text>'
        out.append(
            f'<g><title>stage: {pages.text(band.label)}</title><rect class="band b{i % 2}" '
            f'x="{start:.1f}" y="{TOP - 18}" width="{max(end - start, 0):.1f}" '
            f'height="{HEIGHT - BOTTOM - TOP + 18}"/>{text if room > 2 else ""}</g>'
        )
    return "".join(out)


def _level(value: float, y_axis: axes.Axis) -> str:
    y = y_axis(value)
    return f'<line class="level" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'


# --- lines


def _line(chart: Chart, i: int, line: traces.Series, x_axis: axes.Axis, y_axis: axes.Axis) -> str:
    style = f"s{i % STYLES}"
    out = ""
    if not chart.dots and traces.window(chart.series[i]) > 1:
        raw = _path(traces.thin(chart.series[i]), x_axis, y_axis)
        out = f'<path class="raw {style}" d="{raw}"/>'
    out += f'<path class="line {style}" d="{_path(line, x_axis, y_axis)}"/>'
    alone = len(line.x) == 1 or chart.dots
    for x, y in zip(line.x, line.y, strict=True):
        if alone and _drawable(y, y_axis):
            out += (
                f'<circle class="dot {style}" cx="{x_axis(x):.1f}" cy="{y_axis(y):.1f}" r="2.6"/>'
            )
    return out


def _path(series: traces.Series, x_axis: axes.Axis, y_axis: axes.Axis) -> str:
    """Returns the path's commands; a value that is not finite breaks the line."""
    out, pen = [], "M"
    for x, y in zip(series.x, series.y, strict=True):
        if not _drawable(y, y_axis):
            pen = "M"
            continue
        out.append(f"{pen}{x_axis(x):.1f} {y_axis(y):.1f}")
        pen = "L"
    return "".join(out)


def _drawable(y: float, y_axis: axes.Axis) -> bool:
    return bool(math.isfinite(y) and (y > 0 or not y_axis.log))


def _lost(chart: Chart, x_axis: axes.Axis) -> str:
    """Returns a cross at the top edge wherever a value is not finite."""
    xs = {round(x_axis(x)) for s in chart.series for x in s.x[~np.isfinite(s.y)]}
    return "".join(
        f'<path class="lost" d="M{x - 4} {TOP + 2}l8 8m0 -8l-8 8"><title>not finite</title></path>'
        for x in sorted(xs)
    )


# --- around the drawing


def _legend(chart: Chart) -> list[tuple[str, str]]:
    """Returns (classes, label) of each line, if there are several, and of each level."""
    lines = [(f"line s{i % STYLES}", s.label) for i, s in enumerate(chart.series)]
    return [*(lines if len(lines) > 1 else []), *(("level", label) for label, _ in chart.levels)]


def _aria(chart: Chart) -> str:
    show: Callable[[float], str] = numbers.percent if chart.percent else numbers.si
    ends = [f"{s.label} ends at {show(float(s.y[-1]))}" for s in chart.series if len(s.y)]
    return f"{chart.title} against {chart.x_label}: {', '.join(ends)}"


def _hover(
    chart: Chart, lines: list[traces.Series], x_axis: axes.Axis, y_axis: axes.Axis
) -> dict[str, object]:
    """Returns the drawn points in user units, with their text, for the script."""
    show: Callable[[float], str] = numbers.percent if chart.percent else _four
    series = [
        {
            "label": pages.visible(s.label),
            "x": [round(x_axis(x), 1) for x in s.x],
            "y": [round(y_axis(y), 1) if _drawable(y, y_axis) else None for y in s.y],
            "text": [show(float(y)) for y in s.y],
        }
        for s in lines
    ]
    longest = max(lines, key=lambda s: len(s.x))
    at = [round(x_axis(x), 1) for x in longest.x]
    named = [f"{_four(float(x))} {chart.x_label}" for x in longest.x]
    box = [LEFT, WIDTH - RIGHT, TOP, HEIGHT - BOTTOM, WIDTH, HEIGHT]
    return {"box": box, "at": at, "named": named, "series": series}


def _four(value: float) -> str:
    return numbers.si(value, 4)


def _points(chart: Chart, *, num: int = 12) -> list[list[str]]:
    """Returns some of the points as lines of a table."""
    xs = sorted({float(x) for s in chart.series for x in s.x})
    if len(xs) > num:
        xs = [xs[round(i * (len(xs) - 1) / (num - 1))] for i in range(num)]
    show: Callable[[float], str] = numbers.percent if chart.percent else _four
    at = [dict(zip(s.x.tolist(), s.y.tolist(), strict=True)) for s in chart.series]
    return [[_four(x), *(show(y[x]) if x in y else "" for y in at)] for x in xs]
