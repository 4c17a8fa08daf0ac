"""Lines as data, and how they are prepared for drawing: running mean, thinning. No SVG here."""

import dataclasses

import numpy as np

_BUCKETS = 160  # a longer line is thinned to this many places before it is drawn
_SMOOTH_FROM = 60  # points from which a training line gets a running mean
_JITTER = 0.01  # of a line's range: a line with less noise gets no running mean


@dataclasses.dataclass(frozen=True)
class Series:
    """One line: its label and points, in order of x."""

    label: str
    x: np.ndarray
    y: np.ndarray


@dataclasses.dataclass(frozen=True)
class Band:
    """A stage of the run: its name, and its first and last x."""

    label: str
    start: float
    end: float


def mean(series: Series, bands: tuple[Band, ...]) -> Series:
    """Returns the centred running mean over `window` rows, which never crosses the end of a stage."""
    half = window(series) // 2
    if not half:
        return series
    ok = np.isfinite(series.y)
    total = np.concatenate([[0.0], np.cumsum(np.where(ok, series.y, 0.0))])
    num = np.concatenate([[0], np.cumsum(ok)])
    edges = np.searchsorted(series.x, [b.end for b in bands], side="right").tolist()
    edges = sorted({0, *edges, len(series.y)})
    at = np.arange(len(series.y))
    part = np.searchsorted(edges, at, side="right") - 1
    start, end = np.array(edges)[part], np.array(edges)[np.minimum(part + 1, len(edges) - 1)]
    # Near an end the window shrinks on both sides, so that a slope stays true, but not below a third: one row is
    # noisy.
    reach = np.clip(np.minimum(at - start, end - 1 - at), half // 3, half)
    low, high = np.maximum(at - reach, start), np.minimum(at + reach + 1, end)
    mean = (total[high] - total[low]) / np.maximum(num[high] - num[low], 1)
    return Series(series.label, series.x, np.where(ok, mean, np.nan))


def window(series: Series) -> int:
    """Returns how many rows the running mean spans; 1 for a short or already smooth line."""
    y = series.y[np.isfinite(series.y)]
    if len(y) < _SMOOTH_FROM:
        return 1
    jitter = float(np.median(np.abs(np.diff(y, 2))))
    smooth = jitter < _JITTER * float(np.ptp(np.quantile(y, (0.01, 0.99))))
    return 1 if smooth else max(3, len(y) // 40 * 2 + 1)


def thin(series: Series) -> Series:
    """Returns about 2 · _BUCKETS points: the lowest and the highest of each bucket, so that no spike is lost."""
    n = len(series.y)
    if n <= 2 * _BUCKETS:
        return series
    keep = {0, n - 1}
    for part in np.array_split(np.arange(n), _BUCKETS):
        y = series.y[part]
        if np.isfinite(y).any():
            keep |= {int(part[np.nanargmin(y)]), int(part[np.nanargmax(y)])}
        keep |= {int(j) for j in part[~np.isfinite(y)][:1]}  # a gap stays a gap
    index = sorted(keep)
    return Series(series.label, series.x[index], series.y[index])
