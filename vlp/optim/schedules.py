"""Learning-rate schedules: functions of the fraction of a stage that is done, independent of the batch size."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from vlp.core import check

SHAPES = ("cosine", "linear", "constant")


@dataclasses.dataclass(frozen=True)
class Schedule:
    """Linear warm-up from 0 to `lr`, then decay by `shape` to lr · end_frac at the last sample of the stage.

    At most one of warmup_samples, warmup_steps and warmup_frac (fraction of the stage) may be given.
    """

    lr: float
    shape: str = "cosine"
    warmup_samples: int = 0
    warmup_steps: int = 0
    warmup_frac: float = 0.0
    end_frac: float = 0.0

    def __post_init__(self) -> None:
        if self.shape not in SHAPES:
            raise check.unknown("config.schedule.shape", self.shape, SHAPES)
        bounds = {
            "lr": (0 < self.lr < math.inf, "above 0 and finite"),
            "end_frac": (0 <= self.end_frac <= 1, "in [0, 1]"),
            "warmup_frac": (0 <= self.warmup_frac <= 1, "in [0, 1]"),
            "warmup_steps": (self.warmup_steps >= 0, "at least 0"),
            "warmup_samples": (self.warmup_samples >= 0, "at least 0"),
        }
        check.bounds("config.schedule", self, bounds)
        given = [n for n in ("warmup_samples", "warmup_steps", "warmup_frac") if getattr(self, n)]
        if len(given) > 1:
            raise check.error(
                "config.schedule", " and ".join(given), "one warm-up", "remove all but one"
            )

    def warmup(self, batch: int, num_steps: int) -> float:
        """Returns the warm-up in steps; may be fractional, as it is counted in samples."""
        return (
            self.warmup_samples / batch or float(self.warmup_steps) or self.warmup_frac * num_steps
        )

    def at(self, batch: int, num_steps: int) -> Callable[[ArrayLike], jax.Array]:
        """Returns the function from a step of the stage (from 0) to the learning rate of its update."""
        warmup = self.warmup(batch, num_steps)
        if warmup > num_steps:
            do = "shorten the warm-up or lengthen the stage"
            raise check.error(
                "config.schedule", f"a warm-up of {warmup:g} steps", f"at most {num_steps}", do
            )
        rest = max(num_steps - warmup, 1e-9)

        def lr(step: ArrayLike) -> jax.Array:
            step = jnp.asarray(step, jnp.float32) + 1.0  # the first update has lr > 0
            done = jnp.clip((step - warmup) / rest, 0.0, 1.0)
            fall = {
                "cosine": 0.5 * (1 + jnp.cos(math.pi * done)),
                "linear": 1 - done,
                "constant": jnp.ones(()),
            }
            decayed = self.end_frac + (1 - self.end_frac) * fall[self.shape]
            return self.lr * jnp.where(step < warmup, step / max(warmup, 1e-9), decayed)

        return lr
