"""Numbers as short text: SI prefixes, percentages, durations. No HTML here."""

import math

_SI = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))
_MINUS = "\N{MINUS SIGN}"


def si(value: float, digits: int = 3) -> str:
    """Returns 12800000 as "12.8M", 0.5 as "0.5", 3e-5 as "3e−5"."""
    if not math.isfinite(value):
        return "NaN" if math.isnan(value) else (_MINUS if value < 0 else "") + "∞"
    size = abs(value)
    if 0 < size < 1e-3:
        mantissa, exponent = f"{value:.{digits - 1}e}".split("e")
        mantissa = mantissa.rstrip("0").rstrip(".") if "." in mantissa else mantissa
        return f"{mantissa}e{int(exponent)}".replace("-", _MINUS)
    # 999.96k rounds to 1000k with 4 digits: choose the prefix after rounding.
    size = float(f"{size:.{digits}g}")
    scale, prefix = next((s for s in _SI if size >= s[0]), (1.0, ""))
    return _plain(value / scale, digits) + prefix


def _plain(value: float, digits: int) -> str:
    rounded = float(f"{value:.{digits}g}")
    text = f"{rounded:.10f}".rstrip("0").rstrip(".")
    return text.replace("-", _MINUS)


def percent(fraction: float, digits: int = 1) -> str:
    """Returns 0.4123 as "41.2%"."""
    return f"{100 * fraction:.{digits}f}%" if math.isfinite(fraction) else si(fraction)


def count(value: int) -> str:
    """Returns 1234567 as "1 234 567" with thin no-break spaces."""
    return f"{value:,}".replace(",", "\N{NARROW NO-BREAK SPACE}")


def duration(secs: float) -> str:
    """Returns 7980 as "2 h 13 min", 42.3 as "42 s"."""
    if not math.isfinite(secs):
        return si(secs)
    minutes = round(secs / 60)
    if secs < 90:
        return f"{secs:.0f} s"
    if minutes < 60:
        return f"{minutes} min"
    if minutes < 48 * 60:
        return f"{minutes // 60} h {minutes % 60} min"
    return f"{minutes // 1440} d {minutes % 1440 // 60} h"
