"""What a run measures: the averages of its metrics, its speed, its input, and the FLOPs of its method."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from clu import metrics as clu
from jax.sharding import Mesh

from vlp.core import flops
from vlp.core.chips import CHIPS
from vlp.core.types import Apply, Ctx
from vlp.data.loader_stats import resident_mb
from vlp.models.interface import with_fields
from vlp.train.stages import Stage
from vlp.train.state import method_state

PyTree = Any
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
        self.warm = False  # whether a step was done before the last reading: the first one compiles

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
        self.warm |= self._steps > 0
        self._mark, self._cpu, self._waited, self._steps = now, cpu, 0.0, 0
        return out


LAST = ("lr", "param_norm")  # what is of the interval's last step, and no average
FINITE = ("loss", "grad_norm", "param_norm")  # what has to be a number in every step
APPLIED = "applied"  # the step's flag, which is no metric
FINE, SKIPPED, BROKEN = range(
    3
)  # a step's status: skipped, as it was not finite; parameters broken

Sums = dict[str, Any]  # name → clu metric


class Interval:
    """Adds up the metrics of steps; nothing here waits for the device."""

    def __init__(self, kept: Mapping[str, Any] | None = None):
        """kept: of `plain`, the steps that a checkpoint saw after the last row."""
        as_metric = lambda name, pair: _kind(name)(np.float32(pair[0]), np.int32(pair[1]))
        self._sums: Sums | None = {k: as_metric(k, v) for k, v in (kept or {}).items()} or None

    def add(self, metrics: Mapping[str, jax.Array]) -> jax.Array:
        """Adds a step's metrics, unless its update was skipped. Returns its status (i32[], on the device)."""
        self._sums, status = _add(self._sums, metrics)
        return status

    def take(self) -> Sums:
        """Returns the sums over the steps since the last call, still on the device, and resets them."""
        sums, self._sums = self._sums, None
        assert sums is not None, "no step was added"
        return sums

    def plain(self) -> dict[str, list[float | int]]:
        """The sums so far as JSON-able numbers, for a checkpoint between two rows. Waits for the last step."""
        sums = jax.device_get(self._sums) or {}
        return {k: [float(m.total), int(m.count)] for k, m in sums.items()}


def values(sums: Sums) -> dict[str, float]:
    """What the sums amount to, as numbers (NaN if every step was skipped); waits for the last of their steps."""
    found = jax.device_get(sums).items()
    return {k: float(m.compute()) if m.count else math.nan for k, m in found}


@functools.partial(jax.jit, donate_argnums=0)
def _add(sums: Sums | None, metrics: Mapping[str, jax.Array]) -> tuple[Sums, jax.Array]:
    applied = metrics[APPLIED]

    def one(name: str, x: jax.Array) -> Any:
        counts = applied | (name in LAST)
        x = jnp.where(counts, x.astype(jnp.float32), 0)
        return _kind(name)(x, counts.astype(jnp.int32))

    new = {k: one(k, x) for k, x in metrics.items() if k != APPLIED}
    broken = ~jnp.isfinite(metrics["param_norm"])
    status = jnp.where(broken, BROKEN, jnp.where(applied, FINE, SKIPPED))
    return (new if sums is None else {k: sums[k].merge(m) for k, m in new.items()}), status


def _kind(name: str) -> Any:
    return clu.LastValue if name in LAST else clu.Average


def input_metrics(plan: StagePlan, num_steps: int) -> dict[str, float]:
    """The loaders' tallies, how many samples each source gave the run by a step of the stage, and this
    process's memory."""
    out = {"time/rss_mb": round(resident_mb(), 1)}
    for name, data in plan.datasets.items():
        where = f"data/{name}." if name else "data/"
        out |= {f"{where}bad_{reason}": float(n) for reason, n in data.loader_stats.bad.items()}
        # of this process's life, not of the run's: like all under time/, no two runs agree on it
        measured = f"time/{name}.input_" if name else "time/input_"
        out |= {f"{measured}{k}": v for k, v in data.loader_stats.metrics().items()}
        position = plan.position(num_steps, name)
        out |= {f"{where}samples_{k}": float(n) for k, n in data.source_counts(position).items()}
    return out


def context(
    stage: Stage, model: Any, params: PyTree, batch: Mapping[str, Any], num_micro: int,
    kind: type[Ctx] = Ctx, **more: Any,
) -> Ctx:  # fmt: skip
    """What `train_step` gives the objective, with teachers of the student's parameters."""
    key = jax.random.key(0)
    return kind(
        apply=Apply(model, params),
        batch=batch,
        seed=key,
        method_state=nn.unbox(method_state(stage.objective, model, key)),
        frozen={name: Apply(model, params) for name in stage.teachers},
        num_micro=num_micro,
        micro_remat=stage.micro_remat,
        **more,
    )


def loss(stage: Stage, model: Any, params: PyTree, batch: Mapping[str, Any], num_micro: int) -> Any:
    """The stage's loss of one batch."""
    return stage.objective(context(stage, model, params, batch, num_micro)).loss()


def own_flops(plan: StagePlan, mesh: Mesh, objective: Any = None) -> float:
    """Returns the FLOPs per example of the method (or of `objective`): three times the forward pass.

    The backward pass of a matrix product is two products. Recomputation is not counted.
    """
    stage = plan.stage
    if objective is not None:
        stage = dataclasses.replace(stage, objective=objective)
    plain = with_fields(stage.model, remat="none", attention="xla")
    forward = lambda p, b: loss(stage, plain, p, b, 1)
    with jax.set_mesh(mesh):
        return 3 * flops.of(forward, plan.abstract.params, dict(plan.batch)) / stage.batch


def flops_frac(plan: StagePlan, mesh: Mesh) -> float | None:
    """Returns FLOPs per example / peak FLOP/s of the mesh (None if the peak is not known); MFU = this × examples/s.

    FLOPs are forward × 3, with full attention and without recomputation.
    """
    kind = mesh.devices.flat[0].device_kind
    if kind not in CHIPS:
        return None
    return own_flops(plan, mesh) / (CHIPS[kind].flops * mesh.size)
