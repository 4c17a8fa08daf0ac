"""Numbers as short text: SI prefixes, percentages, durations, the labels of an axis. No HTML here."""

import math
from collections.abc import Sequence

_SI = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))
_MINUS = "\N{MINUS SIGN}"
_MOST_DIGITS = 12


def si(value: float, digits: int = 3) -> str:
    """Returns 12800000 as "12.8M", 0.5 as "0.5", 3e-5 as "3e−5"."""
    if not math.isfinite(value):
        return "NaN" if math.isnan(value) else (_MINUS if value < 0 else "") + "∞"
    size = abs(value)
    if 0 < size < 1e-3 or size >= 1e16:
        mantissa, exponent = f"{value:.{digits - 1}e}".split("e")
        mantissa = mantissa.rstrip("0").rstrip(".") if "." in mantissa else mantissa
        return f"{mantissa}e{int(exponent)}".replace("-", _MINUS)
    # 999.96k rounds to 1000k with 4 digits: choose the prefix after rounding.
    size = float(f"{size:.{digits}g}")
    scale, prefix = next((s for s in _SI if size >= s[0]), (1.0, ""))
    return _plain(value / scale, digits) + prefix


def _plain(value: float, digits: int) -> str:
    rounded = float(f"{value:.{digits}g}")
    text = f"{rounded:.{max(digits, 10)}f}".rstrip("0").rstrip(".")
    return text.replace("-", _MINUS)


def percent(fraction: float, digits: int = 1) -> str:
    """Returns 0.4123 as "41.2%"."""
    if not math.isfinite(fraction) or abs(fraction) >= 1e4:
        return si(100 * fraction) + "%" * math.isfinite(fraction)
    return f"{100 * fraction:.{digits}f}%".replace("-", _MINUS)


def fixed(value: float, digits: int) -> str:
    """Returns 0.4 as "0.400", for scores in a column."""
    if not abs(value) < 1e6:
        return si(value)
    return f"{value:.{digits}f}".replace("-", _MINUS)


def short(value: float) -> str:
    """Returns a number below a million with four digits or whole, a larger one with a prefix."""
    if math.isfinite(value) and abs(value) < 1e6 and (value == int(value) or abs(value) >= 1e3):
        return count(round(value))
    return si(value, 4)


def count(value: int) -> str:
    """Returns 1234567 as "1 234 567" with thin no-break spaces."""
    if abs(value) >= 10**15:
        return si(float(value)) if abs(value) < 10**100 else "∞"
    return f"{value:,}".replace(",", "\N{NARROW NO-BREAK SPACE}").replace("-", _MINUS)


def duration(secs: float) -> str:
    """Returns 7980 as "2 h 13 min", 42.3 as "42 s"."""
    if not math.isfinite(secs) or secs >= 1e12:
        return si(secs)
    minutes = round(secs / 60)
    if secs < 90:
        return f"{secs:.0f} s"
    if minutes < 60:
        return f"{minutes} min"
    if minutes < 48 * 60:
        return f"{minutes // 60} h {minutes % 60} min"
    return f"{minutes // 1440} d {minutes % 1440 // 60} h"


def labels(values: Sequence[float], *, as_percent: bool = False) -> list[str]:
    """Returns labels for ticks: different for each value, with as few digits as are exact to 1 % of a step.

    If that takes more than nine characters, all labels but the first are differences: "1M", "+2", "+4".

    Args:
        values: in ascending order, each once.
        as_percent: values are fractions, shown in percent.
    """
    unit, scale = ("%", 100.0) if as_percent else ("", 1.0)
    plain = (
        1e-3 <= scale * max(map(abs, values), default=0.0) < 1e3
    )  # 0.0005 beside 0.001, not 5e−4

    def show(value: float, digits: int) -> str:
        return (_plain if plain else si)(scale * value, digits) + unit

    step = min((b - a for a, b in zip(values, values[1:])), default=math.inf)
    for digits in range(3, _MOST_DIGITS):
        off = max((abs(float(f"{v:.{digits}g}") - v) for v in values), default=0.0)
        texts = [show(v, digits) for v in values]
        long = max(map(len, texts), default=0) > 9
        if off < 0.01 * step and len(set(texts)) == len(texts) and not long:
            return texts
    return [show(values[0], 6), *("+" + show(v - values[0], 3) for v in values[1:])]
