"""Watches the numbers of a run: steps whose update was skipped, and spikes of the loss.

A `Guard` sees every step in order, on every process, and its memory is part of each checkpoint. So a run that was
stopped decides as one that was not.
"""

from __future__ import annotations

import collections
import dataclasses
import math
import statistics
from collections.abc import Mapping
from typing import Any

from vlp.core import check


@dataclasses.dataclass(frozen=True)
class Spike:
    """When a run goes back to a checkpoint and leaves out the data since (Chowdhery et al. 2022, arXiv:2204.02311,
    §5.1; they went back about 100 steps by hand, whenever the loss of PaLM jumped).

    factor: a loss over `factor` times the median of the last `window_steps` is a spike; 0: never go back.
    margin_steps: the checkpoint is at least so many steps before the spike, which may have begun unseen.
    max_rollbacks: the run stops instead of going back once more.
    """

    factor: float = 0.0
    window_steps: int = 100
    margin_steps: int = 10
    max_rollbacks: int = 10

    def __post_init__(self) -> None:
        bounds = {
            "factor": (self.factor == 0 or 1 < self.factor < math.inf, "above 1, or 0 for never"),
            "window_steps": (1 <= self.window_steps <= 10_000, "in 1 … 10,000"),
            "margin_steps": (self.margin_steps >= 0, "at least 0"),
            "max_rollbacks": (self.max_rollbacks >= 0, "at least 0"),
        }
        check.bounds("config.spike", self, bounds)


class Guard:
    """What is remembered of the steps so far.

    Attributes:
        in_a_row: steps in a row, up to the last one, whose update was skipped.
        skipped: steps of the run whose update was skipped.
    """

    def __init__(self, spike: Spike, kept: Mapping[str, Any] | None = None):
        """kept: of `plain`, from a checkpoint."""
        kept = kept or {}
        self.spike = spike
        self.in_a_row: int = kept.get("in_a_row", 0)
        self.skipped: int = kept.get("skipped", 0)
        self._losses = collections.deque[float](kept.get("losses", ()), self._size)

    @property
    def _size(self) -> int:
        return self.spike.window_steps if self.spike.factor else 0

    @property
    def median(self) -> float:
        """Of the losses of the last `window_steps` applied steps; infinite before there are so many."""
        full = self._size and len(self._losses) == self._size
        return statistics.median(self._losses) if full else math.inf

    def see(self, loss: float, applied: bool) -> bool:
        """Takes in a step. Returns whether its loss is a spike; a spike is not taken into the window."""
        self.in_a_row = 0 if applied else self.in_a_row + 1
        self.skipped += not applied
        spiked = applied and loss > self.spike.factor * self.median
        if applied and not spiked:
            self._losses.append(loss)
        return spiked

    def plain(self) -> dict[str, Any]:
        """JSON-able, for a checkpoint."""
        return {"in_a_row": self.in_a_row, "skipped": self.skipped, "losses": [*self._losses]}
