"""How fast a run goes, how many cores it takes, and how much of it waits for data."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import TypeVar

T = TypeVar("T")


class Clock:
    """Steps since the last reading, time in all, and time waiting for data.

    flops_frac: of an example, over the peak FLOP/s of all devices; None where a peak is not known: no MFU.
    """

    def __init__(self, batch: int, flops_frac: float | None = None) -> None:
        self._batch = batch
        self._flops_frac = flops_frac
        self._began = self._mark = time.monotonic()
        self._cpu = time.process_time()
        self._waited = 0.0
        self._steps = 0

    def wait(self, get: Callable[[], T]) -> T:
        """Returns get(), its time counted as waiting for data."""
        before = time.monotonic()
        value = get()
        self._waited += time.monotonic() - before
        return value

    def count(self) -> None:
        """One more step was done."""
        self._steps += 1

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Inside `with`, time does not count (evaluation, saving)."""
        began, cpu = time.monotonic(), time.process_time()
        yield
        self._mark += time.monotonic() - began
        self._cpu += time.process_time() - cpu

    def read(self) -> dict[str, float]:
        now, cpu = time.monotonic(), time.process_time()
        span = max(now - self._mark, 1e-9)
        out = {
            "time/examples_per_s": round(self._steps * self._batch / span, 3),
            "time/host_cores": round((cpu - self._cpu) / span, 2),  # busy ones, of this process
            "time/data_wait_frac": round(min(self._waited / span, 1.0), 4),
            "time/elapsed_s": round(now - self._began, 3),
        }
        if self._flops_frac is not None:
            mfu = self._flops_frac * self._steps * self._batch / span
            out["time/mfu"] = float(f"{mfu:.4g}")
        self._mark, self._cpu, self._waited, self._steps = now, cpu, 0.0, 0
        return out
