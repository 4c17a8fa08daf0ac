"""Maps values to pixels, linearly or by their logarithm, and finds round numbers for the ticks."""

import dataclasses
import math


@dataclasses.dataclass(frozen=True)
class Axis:
    """Maps values to pixels, `low` to `start` and `high` to `end`."""

    low: float
    high: float
    start: int
    end: int
    log: bool = False

    def __call__(self, value: float) -> float:
        f = math.log10 if self.log else float
        share = (f(value) - f(self.low)) / (f(self.high) - f(self.low))
        return self.start + share * (self.end - self.start)

    def ticks(self, *, num: int = 6, whole: bool = False) -> list[float]:
        """Returns round numbers along the axis.

        An axis that is logarithmic but too short for two round powers has evenly spaced ticks.

        Args:
            num: number of ticks to aim at.
            whole: no fractions.
        """
        if self.log and len(found := log_ticks(self.low, self.high)) > 1:
            return found
        return ticks(self.low, self.high, num=num, whole=whole)


def ticks(low: float, high: float, *, num: int = 6, whole: bool = False) -> list[float]:
    """Returns at most `num` + 1 round numbers in [low, high]: steps of 1, 2 or 5 · 10ⁿ."""
    rough = (high - low) / num
    exponent = math.floor(math.log10(rough))
    if whole:
        rough, exponent = max(rough, 1.0), max(exponent, 0)
    step = next(m * 10.0**exponent for m in (1, 2, 5, 10) if rough <= m * 10.0**exponent * 1.0001)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(i * step, 1 - exponent) for i in range(first, last + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Returns up to about ten round numbers in [low, high], at even steps of the logarithm."""
    decades = math.log10(high / low)
    steps = (1,) if decades > 3 else (1, 3) if decades > 1.2 else (1, 2, 5)
    stride = max(1, math.ceil(decades / 6))
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1, stride)
    return [m * 10.0**p for p in powers for m in steps if low <= m * 10.0**p <= high]
