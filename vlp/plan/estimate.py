"""Estimates the peak memory of a training step without a compiler, from the lifetime of every array in its trace.

The gradient of the step is traced once for a prime number of examples, so that the batch shows in shapes: an array
with a dimension that the prime divides is sharded over the mesh's batch axes; parameters and arrays made from them are
sharded by the table of axes. Then the trace is walked: an array lives from the equation that makes it to the last one
that reads it. Operations that a compiler fuses (elementwise, casts, changes of shape) make no array of their own.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.extend.core as jax_core
from jax.sharding import AbstractMesh, Mesh

from vlp.core import mesh as meshes
from vlp.plan import compiled
from vlp.train import metrics
from vlp.train.build import StagePlan

PRIME = 251  # examples of a traced micro-batch
# Operations without arrays of their own: a compiler computes them where their results are read.
FUSED = frozenset({
    "abs", "add", "add_any", "and", "broadcast_in_dim", "convert_element_type", "copy", "div", "eq", "erf", "exp",
    "expand_dims", "ge", "gt", "integer_pow", "iota", "is_finite", "le", "log", "log1p", "logistic", "lt", "max", "min",
    "mul", "ne", "neg", "not", "or", "pad", "pow", "reshape", "rsqrt", "select_n", "sign", "slice", "sqrt", "square",
    "squeeze", "stop_gradient", "sub", "tanh", "transpose", "concatenate", "optimization_barrier", "name",
    "sharding_constraint", "reduce_precision", "split", "dynamic_slice",
})  # fmt: skip
GROWING = ("scan", "while", "pallas_call")  # their results are allocated while they run


@dataclasses.dataclass(frozen=True)
class Estimate:
    """Bytes per device. peak = state and batch + the most that the step holds at one time."""

    peak_bytes: int
    held_bytes: int  # by the step, beside state and batch


def peak(plan: StagePlan, mesh: Mesh) -> Estimate:
    stage = plan.stage
    tiled = mesh.devices.flat[0].platform == "tpu"
    device = mesh.abstract_mesh.abstract_device  # decides which kernels are traced
    with jax.sharding.use_abstract_mesh(AbstractMesh((), (), abstract_device=device)):
        jaxpr = _gradient(plan)
    own = {x.shape for x in jax.tree.leaves(plan.abstract.params)}
    rows = stage.batch // stage.micro_batches / meshes.batch_ways(mesh)
    size = functools.partial(_size, own, tiled, rows / PRIME, 1 / mesh.shape["tensor"])
    grads = compiled.shard_bytes(plan.abstract.params)
    held = round(max(_walk(jaxpr, size)))
    state = sum(compiled.state_bytes(plan).values())
    return Estimate(state + grads + held, grads + held)


def measure(plan: StagePlan, mesh: Mesh, target: compiled.Target) -> dict[str, Any]:
    """Returns the row of `compiled.measure`, as far as it is known without a compiler.

    Args:
        plan: the stage, assembled for `mesh`.
        mesh: of the target's devices.
        target: the devices.
    """
    row = compiled.describe(plan, mesh, target) | compiled.step_flops(plan, mesh)
    found = peak(plan, mesh)
    limit = compiled.usable_bytes(target)
    fits = None if limit == float("inf") else found.peak_bytes <= limit
    return row | {"peak_bytes": found.peak_bytes, "fits": fits}


def _gradient(plan: StagePlan) -> Any:
    """Returns the jaxpr of the step's gradient, for PRIME examples in each micro-batch."""
    stage = plan.stage
    num = PRIME * stage.micro_batches
    small = dataclasses.replace(stage, batch=num)
    batch = {}
    for name, x in plan.batch.items():  # leaves of other streams have a batch size of their own
        batch[name] = jax.ShapeDtypeStruct((num * x.shape[0] // stage.batch, *x.shape[1:]), x.dtype)
    bare = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype)
    params = jax.tree.map(bare, plan.abstract.params)
    grad = jax.grad(lambda p, b: metrics.loss(small, stage.model, p, b, stage.micro_batches))
    return jax.make_jaxpr(grad)(params, batch).jaxpr


def _size(
    own: set, tiled: bool, rows: float, whole: float, aval: Any, minor: bool = False
) -> float:
    """Returns the bytes of an array on one device; 0 for parameters and their gradients, which are counted apart.

    Args:
        own: shapes of the parameters.
        tiled: whether the device stores arrays in tiles.
        rows: examples of a device, in units of PRIME, for arrays with a batch dimension.
        whole: share of a device for other arrays.
        aval: shape and type.
        minor: only the last dimension is tiled, as for operands of kernels.
    """
    if not hasattr(aval, "shape") or not aval.shape:
        return 0.0
    shape = aval.shape
    if tiled:
        shape = (*shape[:-1], -(-shape[-1] // 128) * 128) if minor else _padded(shape)
    num = math.prod(shape) * getattr(aval.dtype, "itemsize", 4)
    if any(d and d % PRIME == 0 for d in aval.shape):
        return num * rows
    return 0.0 if aval.shape in own else num * whole


def _padded(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Returns a shape as a TPU stores it: the last two dimensions in tiles of 8 × 128.

    As in the compiler's layouts, a narrow last dimension (of a head) is merged with those before it, and short
    dimensions (q, k and v) come first.
    """
    if any(d % PRIME == 0 for d in shape[-2:]):
        return shape  # one number per example
    *rest, minor = sorted(shape, key=lambda d: d > 4)
    while rest and minor < 128 and rest[-1] % PRIME:
        minor *= rest.pop()
    up = lambda d, tile: -(-d // tile) * tile
    if minor < 128 or not rest:
        return (*rest, minor)
    if rest[-1] % PRIME:
        rest[-1] = up(rest[-1], 8)
    return (*rest, up(minor, 128))


def _walk(jaxpr: Any, size: Callable[..., float]) -> list[float]:
    """Returns the bytes that are alive after each equation, without the inputs of the jaxpr."""
    Literal = jax_core.Literal
    roots: dict[Any, frozenset] = {}  # variable → the arrays that it is a view of
    inputs = {*jaxpr.invars, *jaxpr.constvars}

    def views(v: Any) -> frozenset:
        if isinstance(v, Literal):
            return frozenset()
        return roots.get(v, frozenset([v]))

    last: dict[Any, int] = {}
    for i, eqn in enumerate(jaxpr.eqns):
        read = frozenset().union(*[views(v) for v in eqn.invars]) if eqn.invars else frozenset()
        for v in read:
            last[v] = i
        if eqn.primitive.name in FUSED:
            for out in eqn.outvars:
                roots[out] = read
    for v in jaxpr.outvars:
        for root in views(v):
            last[root] = len(jaxpr.eqns)
    live: dict[Any, float] = {}
    seen = [0.0]
    for i, eqn in enumerate(jaxpr.eqns):
        outs = {v: size(v.aval) for v in eqn.outvars if v not in roots and v in last}
        if eqn.primitive.name == "pallas_call":  # its operands have a layout of their own
            outs = {v: size(v.aval, minor=True) for v in eqn.outvars}
            inner = [sum((size(v.aval, minor=True) - size(v.aval) for v in eqn.invars), 0.0)]
        else:
            inner = _inner(eqn, size)
        # results of a loop exist while its body runs; results of a call only after it
        during = live if inner and eqn.primitive.name not in GROWING else live | outs
        live |= outs
        seen.append(sum(live.values(), 0.0))
        seen += [sum(during.values()) + moment for moment in inner]
        for v in [v for v in live if last.get(v, -1) <= i]:
            del live[v]
    assert not inputs & live.keys()
    return seen


def _inner(eqn: Any, size: Callable[..., float]) -> list[float]:
    """Returns the peak of each jaxpr inside an equation; none for a plain one."""
    found = []
    for value in eqn.params.values():
        for inner in value if isinstance(value, tuple | list) else (value,):
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns"):
                found.append(max(_walk(inner, size)))
    return found
