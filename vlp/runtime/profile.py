"""A trace of some steps for XProf or TensorBoard's profile page, in workdir/profile."""

from __future__ import annotations

from typing import Any

import jax

from vlp.core import check, paths
from vlp.runtime.mirror import Mirror


class Profile:
    """Traces steps (first, last) of the run, counted from 1 and both included. steps None: no-op."""

    def __init__(self, folder: paths.Path, steps: tuple[int, int] | None):
        self._folder, self._steps, self._on = folder, steps, False

    def before(self, step: int) -> None:
        if self._steps is not None and step == self._steps[0]:
            self._mirror = Mirror(self._folder)
            jax.profiler.start_trace(str(self._mirror.local))
            self._on = True

    def after(self, step: int, results: Any) -> None:
        """Ends the trace after the last step, once `results`, that step's arrays, are computed."""
        if self._on and self._steps is not None and step == self._steps[1]:
            jax.block_until_ready(results)
            self.close()

    def close(self) -> None:
        if self._on:
            jax.profiler.stop_trace()
            self._mirror.close()
            self._on = False


def parse(text: str) -> tuple[int, int]:
    """Parses "A:B", two numbers with 1 ≤ A ≤ B. Raises UserError."""
    first, colon, last = text.partition(":")
    if not (colon and first.isdecimal() and last.isdecimal() and 1 <= int(first) <= int(last)):
        raise check.error(
            "--profile", repr(text), "A:B, steps with 1 ≤ A ≤ B", "write 20:25, for instance"
        )
    return int(first), int(last)


def check_range(steps: tuple[int, int] | None, done: int, total: int) -> None:
    """Raises UserError unless this start trains all these steps. done: steps before it; total: steps of the run."""
    if steps is not None and not done < steps[0] <= steps[1] <= total:
        expected = f"steps of {done + 1}:{total}" if done < total else "a run that is not done"
        raise check.error(
            "--profile", f"{steps[0]}:{steps[1]}", expected, "write steps in that range"
        )
