"""The metrics of the steps between two rows of the record: averages, summed on the device by clu.metrics."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from clu import metrics as clu

LAST = ("lr", "param_norm")  # what is of the interval's last step, and no average
FINITE = ("loss", "grad_norm", "param_norm")  # what has to be a number in every step

Sums = dict[str, Any]  # name → clu metric


class Interval:
    """Adds up the metrics of steps; nothing here waits for the device."""

    def __init__(self, kept: Mapping[str, Any] | None = None):
        """kept: of `plain`, the steps that a checkpoint saw after the last row."""
        as_metric = lambda name, pair: _kind(name)(np.float32(pair[0]), np.int32(pair[1]))
        self._sums: Sums | None = {k: as_metric(k, v) for k, v in (kept or {}).items()} or None

    def add(self, metrics: Mapping[str, jax.Array]) -> jax.Array:
        """Takes a step in; returns whether its loss, gradient and parameters are numbers (bool[], on the device)."""
        self._sums, finite = _add(self._sums, metrics)
        return finite

    def take(self) -> Sums:
        """The sums of the steps since the last call, still on the device; the next step begins anew."""
        sums, self._sums = self._sums, None
        assert sums is not None, "no step was added"
        return sums

    def plain(self) -> dict[str, list[float | int]]:
        """The sums so far as JSON-able numbers, for a checkpoint between two rows. Waits for the last step."""
        sums = jax.device_get(self._sums) or {}
        return {k: [float(m.total), int(m.count)] for k, m in sums.items()}


def values(sums: Sums) -> dict[str, float]:
    """What the sums amount to, as numbers; waits for the last of their steps."""
    return {k: float(m.compute()) for k, m in jax.device_get(sums).items()}


@functools.partial(jax.jit, donate_argnums=0)
def _add(sums: Sums | None, metrics: Mapping[str, jax.Array]) -> tuple[Sums, jax.Array]:
    new = {k: _kind(k)(x.astype(jnp.float32), jnp.int32(1)) for k, x in metrics.items()}
    finite = jnp.isfinite(jnp.stack([metrics[k] for k in FINITE])).all()
    return (new if sums is None else {k: sums[k].merge(m) for k, m in new.items()}), finite


def _kind(name: str) -> Any:
    return clu.LastValue if name in LAST else clu.Average
