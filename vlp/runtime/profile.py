"""A trace of some steps for XProf or TensorBoard's profile page, in workdir/profile."""

from __future__ import annotations

import pathlib
from typing import Any

import jax

from vlp.core import check


class Profile:
    """Traces the run's steps first … last (from 1, both included); nothing without a range."""

    def __init__(self, folder: pathlib.Path, steps: tuple[int, int] | None):
        self._folder, self._steps, self._on = folder, steps, False

    def before(self, step: int) -> None:
        if self._steps is not None and step == self._steps[0]:
            jax.profiler.start_trace(str(self._folder))
            self._on = True

    def after(self, step: int, results: Any) -> None:
        """results: of the step; they are waited for before the trace ends."""
        if self._on and self._steps is not None and step == self._steps[1]:
            jax.block_until_ready(results)
            self.close()

    def close(self) -> None:
        if self._on:
            jax.profiler.stop_trace()
            self._on = False


def parse(text: str) -> tuple[int, int]:
    """ "a:b" as two numbers with 1 ≤ a ≤ b."""
    first, colon, last = text.partition(":")
    if not (colon and first.isdecimal() and last.isdecimal() and 1 <= int(first) <= int(last)):
        raise check.error("--profile", repr(text), "A:B, steps with 1 ≤ A ≤ B", "write 20:25, say")
    return int(first), int(last)


def check_range(steps: tuple[int, int] | None, done: int, total: int) -> None:
    """Raises UserError for steps that this start of the run will not train."""
    if steps is not None and not done < steps[0] <= steps[1] <= total:
        expected = f"steps of {done + 1}:{total}" if done < total else "a run that is not done"
        raise check.error("--profile", f"{steps[0]}:{steps[1]}", expected, "choose others")
