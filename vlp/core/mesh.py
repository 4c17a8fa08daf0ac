"""The device mesh, and the table from logical axis names to mesh axes.

A parameter names its axes where its shape is written (`logical`); activations use the same names (`constrain`).
Models and objectives know no mesh axes. Losses are written for the global batch, as for one device.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from vlp.core import check, tree

AXES = ("data", "fsdp", "tensor", "replica")
RULES: dict[str, tuple[str, ...]] = {
    "batch": ("replica", "data", "fsdp"),
    "embed": ("fsdp",),  # model width
    "mlp": ("tensor",),
    "heads": ("tensor",),
    "vocab": ("tensor",),
    "layers": (),
    "kv": (),  # q, k, v stacked; the size of a head
    "joint": ("tensor",),  # joint space
    "pixels": (),  # a flattened patch
    "tokens": (),  # positions and queries
}
LARGE_BYTES = (
    1 << 20
)  # a parameter above this without axis names, or on every device whole, is a mistake


@dataclasses.dataclass(frozen=True)
class MeshShape:
    """Number of devices along each mesh axis. One axis may be -1: the devices that the others leave.

    data: splits the batch; parameters are replicated. fsdp: splits the batch, and parameters, optimiser state and
    averages, which are gathered layer by layer. tensor: splits each layer's heads and MLP. replica: slices of a
    multi-slice TPU, which only sum gradients over the data-centre network (0: the slices that there are).
    allow_replicated: parameters over 1 MB that no axis divides may be replicated.
    """

    data: int = -1
    fsdp: int = 1
    tensor: int = 1
    replica: int = 0
    allow_replicated: bool = False


def make(shape: MeshShape, devices: Sequence[Any] | None = None) -> Mesh:
    """Returns the mesh (axes replica, data, fsdp, tensor; Auto) over `devices` (None: all). Raises UserError."""
    devices = list(jax.devices() if devices is None else devices)
    slices = len({getattr(d, "slice_index", 0) or 0 for d in devices})
    sizes = [shape.replica or slices, shape.data, shape.fsdp, shape.tensor]
    names = (AXES[-1], *AXES[:-1])
    known = math.prod(n for n in sizes if n != -1)
    free = sum(n == -1 for n in sizes)
    if (
        min(sizes) < -1
        or 0 in sizes
        or free > 1
        or len(devices) % max(known, 1)
        or (not free and known != len(devices))
    ):
        shown = [f"{a}={n}" for a, n in zip(names, sizes) if a != "replica" or n != 1]
        got, do = " × ".join(shown), "set one axis to -1: it takes what is left"
        raise check.error("config.mesh", got, f"a product of {len(devices)} devices", do)
    sizes = [len(devices) // known if n == -1 else n for n in sizes]
    types = (AxisType.Auto,) * len(names)
    if slices == 1:
        try:
            return jax.make_mesh(tuple(sizes), names, axis_types=types, devices=devices)
        except NotImplementedError:  # whole axes of the torus do not give these sizes: divide some
            grid = mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
            return Mesh(grid, names, axis_types=types)
    if sizes[0] != slices:
        do = "set it to 0, the number of slices"
        raise check.error(
            "config.mesh.replica", sizes[0], f"{slices}, the slices that there are", do
        )
    inner, outer = (1, *sizes[1:]), (slices, 1, 1, 1)
    try:
        grid = mesh_utils.create_hybrid_device_mesh(inner, outer, devices)
    except NotImplementedError:
        split = {"allow_split_physical_axes": True}
        grid = mesh_utils.create_hybrid_device_mesh(inner, outer, devices, **split)
    return Mesh(grid, names, axis_types=types)


def logical(init: Callable[..., Any], *names: str | None) -> Callable[..., Any]:
    """Returns an initialiser whose parameter carries the names of its axes (keys of RULES, or None)."""
    unknown = [n for n in names if n is not None and n not in RULES]
    assert not unknown, f"unknown logical axes {unknown}"
    return nn.with_logical_partitioning(init, names)


def spec(
    names: Sequence[str | None], shape: Sequence[int], mesh: Mesh | AbstractMesh
) -> PartitionSpec:
    """Returns the mesh axes of each dimension: of its name's axes, those with the most devices that divide it.

    An axis is used once.
    """
    return PartitionSpec(*(axes or None for axes in _axes(names, shape, mesh)))


def _axes(
    names: Sequence[str | None], shape: Sequence[int], mesh: Mesh | AbstractMesh
) -> list[tuple[str, ...]]:
    used: set[str] = set()
    parts: list[tuple[str, ...]] = []
    for name, dim in zip(names, shape, strict=True):
        free = [a for a in (RULES[name] if name else ()) if a not in used and mesh.shape[a] > 1]
        axes = max(_subsets(free), key=lambda axes: _divides(axes, dim, mesh))
        used.update(axes)
        parts.append(axes)
    return parts


def _subsets(axes: Sequence[str]) -> list[tuple[str, ...]]:
    """Every subset of axes in their order, larger ones first."""
    return [c for n in range(len(axes), -1, -1) for c in itertools.combinations(axes, n)]


def _divides(axes: Iterable[str], dim: int, mesh: Mesh | AbstractMesh) -> int:
    """The number of devices along `axes` if it divides `dim`, else 0."""
    ways = math.prod(mesh.shape[a] for a in axes)
    return 0 if dim % ways else ways


def param_spec(
    names: Sequence[str | None], shape: Sequence[int], num_bytes: int, mesh: Mesh | AbstractMesh
) -> PartitionSpec:
    """As `spec`, with two exceptions for fsdp that depend on the parameter's size.

    Vectors under 1 MB (biases, norms; the axis of stacked layers does not count) are replicated: gathering them costs
    more than it saves. If fsdp divides no dimension that RULES gives it, it takes the largest one that it divides.
    Stacked layers are never divided: each layer is gathered when it is computed.
    """
    parts = _axes(names, shape, mesh)
    divided = any("fsdp" in axes for axes in parts)
    large = num_bytes > LARGE_BYTES
    if not large and sum(n != "layers" for n in names) == 1:
        parts = [_without_fsdp(axes) for axes in parts]
    elif large and not divided and mesh.shape["fsdp"] > 1:
        for d in sorted(range(len(shape)), key=lambda d: -shape[d]):
            axes = (*parts[d], "fsdp")
            if names[d] != "layers" and _divides(axes, shape[d], mesh):
                parts[d] = axes
                break
    return PartitionSpec(*(axes or None for axes in parts))


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def gather(param: jax.Array, names: tuple[str | None, ...]) -> jax.Array:
    """Gathers a parameter over fsdp where it is used; its gradient stays sharded.

    Called on the parameter in the compute dtype, so that half the bytes are sent, once. Without it, the partitioner
    turns products with a sharded operand into loops over shards.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.shape["fsdp"] == 1:
        return param
    parts = map(_without_fsdp, _axes(names, param.shape, mesh))
    return jax.lax.with_sharding_constraint(param, PartitionSpec(*(a or None for a in parts)))


def _gather_forward(param: jax.Array, names: tuple[str | None, ...]) -> tuple[jax.Array, None]:
    return gather(param, names), None


def _gather_backward(names: tuple[str | None, ...], _: None, grad: jax.Array) -> tuple[jax.Array]:
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.shape["fsdp"] == 1:
        return (grad,)
    parts = param_spec(names, grad.shape, grad.size * 4, mesh)
    return (jax.lax.with_sharding_constraint(grad, parts),)


gather.defvjp(_gather_forward, _gather_backward)


def _without_fsdp(axes: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(a for a in axes if a != "fsdp")


def shardings(boxed: Any, mesh: Mesh) -> Any:
    """Returns the NamedShardings of a tree of abstract parameters that carry their axis names."""

    def one(name: str, leaf: Any) -> NamedSharding:
        value = leaf.unbox() if isinstance(leaf, nn.meta.AxisMetadata) else leaf
        size = math.prod(value.shape) * value.dtype.itemsize
        if isinstance(leaf, nn.LogicallyPartitioned):
            return NamedSharding(mesh, param_spec(leaf.names, value.shape, size, mesh))
        assert size < LARGE_BYTES, (
            f"{name}: {size} bytes without axis names; wrap its initialiser in `logical`"
        )
        return NamedSharding(mesh, PartitionSpec())

    is_box = lambda x: isinstance(x, nn.meta.AxisMetadata)
    return jax.tree_util.tree_map_with_path(
        lambda p, x: one(tree.name(p), x), boxed, is_leaf=is_box
    )


def whole(placed: Any, mesh: Mesh) -> dict[str, int]:
    """Returns the leaves over 1 MB that fsdp does not divide, with their bytes on each device ({} if fsdp is 1).

    placed: a tree of abstract arrays with shardings.
    """
    if mesh.shape["fsdp"] == 1:
        return {}
    out = {}
    for name, leaf in tree.named(placed).items():
        num = math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        if num > LARGE_BYTES and not any("fsdp" in (p or ()) for p in leaf.sharding.spec):
            out[name] = num
    return out


def constrain(x: jax.Array, *names: str | None) -> jax.Array:
    """Constrains an activation's sharding by logical names; no-op outside a mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return x
    return jax.lax.with_sharding_constraint(x, spec(names, x.shape, mesh))


def batch_sharding(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec(RULES["batch"]))


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def batch_ways(mesh: Mesh | AbstractMesh) -> int:
    """Returns the number of parts into which the mesh divides a batch."""
    return math.prod(mesh.shape[a] for a in RULES["batch"])


def check_batch(batch: int, mesh: Mesh, num_micro: int = 1, where: str = "config.batch") -> None:
    """Raises UserError unless batch axes × micro-batches divides the global batch."""
    ways = batch_ways(mesh)
    for name, value in ((where, batch), ("config.micro_batches", num_micro)):
        if value < 1:
            raise check.error(name, value, "1 or more", f"set {name} to 1 or more")
    if batch % (ways * num_micro):
        axes = "replica×data×fsdp" if mesh.shape["replica"] > 1 else "data×fsdp"
        detail = f"{axes} = {ways}" + (f" × micro_batches = {num_micro}" if num_micro > 1 else "")
        do = f"use a multiple of {ways * num_micro} or change config.mesh"
        raise check.error(where, batch, f"a multiple of {detail}", do)


def to_global(batch: dict[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """Returns this host's rows as part of global arrays that are sharded on their first axis."""
    sharding = batch_sharding(mesh)
    if jax.process_count() == 1:
        return {k: jax.device_put(v, sharding) for k, v in batch.items()}
    return {k: jax.make_array_from_process_local_data(sharding, v) for k, v in batch.items()}


def to_host(x: jax.Array | np.ndarray) -> np.ndarray:
    """Returns the whole array, on every host."""
    if isinstance(x, np.ndarray) or x.is_fully_addressable or x.is_fully_replicated:
        return np.asarray(x)
    from jax.experimental import multihost_utils

    return np.asarray(multihost_utils.process_allgather(x, tiled=True))
