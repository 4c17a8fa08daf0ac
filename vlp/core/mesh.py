"""The device mesh, and the table from logical axis names to mesh axes.

A parameter names its axes where its shape is written (`logical`); activations use the same names (`constrain`).
Models and objectives never name mesh axes. Losses are written for the global batch, as for one device.
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
    "kv": (),  # the stack of q, k, v; the width of a head
    "joint": ("tensor",),  # width of the joint embedding space
    "pixels": (),  # a flattened patch
    "tokens": (),  # positions of a table; queries of a pooler
}
# A larger parameter must have axis names and must not be replicated.
LARGE_BYTES = 1 << 20


@dataclasses.dataclass(frozen=True)
class MeshShape:
    """Number of devices along each mesh axis. One axis may be -1: it takes the remaining devices.

    Attributes:
        data: splits the batch; parameters are replicated.
        fsdp: splits the batch, and shards parameters, optimiser state and moving averages. Parameters are gathered
            layer by layer.
        tensor: splits each layer's heads and MLP.
        replica: slices of a multi-slice TPU, which only sum gradients over the data-centre network (0: the number of
            slices found).
        allow_replicated: replicates parameters over 1 MB that fsdp does not divide, instead of an error.
    """

    data: int = -1
    fsdp: int = 1
    tensor: int = 1
    replica: int = 0
    allow_replicated: bool = False


def make(shape: MeshShape, devices: Sequence[Any] | None = None) -> Mesh:
    """Returns the mesh over `devices` (default: all), with Auto axes replica, data, fsdp, tensor.

    Raises:
        UserError: the axes' product is not the number of devices, or `replica` is not the number of slices.
    """
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
        got, do = " × ".join(shown), "set one axis to -1: it takes the remaining devices"
        raise check.error("config.mesh", got, f"a product of {len(devices)} devices", do)
    sizes = [len(devices) // known if n == -1 else n for n in sizes]
    types = (AxisType.Auto,) * len(names)
    if slices == 1:
        try:
            return jax.make_mesh(tuple(sizes), names, axis_types=types, devices=devices)
        except NotImplementedError:  # these sizes need some axis of the torus to be split
            grid = mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
            return Mesh(grid, names, axis_types=types)
    if sizes[0] != slices:
        do = "set it to 0, which means one per slice"
        raise check.error("config.mesh.replica", sizes[0], f"{slices}, the number of slices", do)
    inner, outer = (1, *sizes[1:]), (slices, 1, 1, 1)
    try:
        grid = mesh_utils.create_hybrid_device_mesh(inner, outer, devices)
    except NotImplementedError:
        split = {"allow_split_physical_axes": True}
        grid = mesh_utils.create_hybrid_device_mesh(inner, outer, devices, **split)
    return Mesh(grid, names, axis_types=types)


def logical(init: Callable[..., Any], *names: str | None) -> Callable[..., Any]:
    """Returns `init` with one logical axis name per dimension attached (a key of RULES, or None)."""
    unknown = [n for n in names if n is not None and n not in RULES]
    assert not unknown, f"unknown logical axes {unknown}"
    return nn.with_logical_partitioning(init, names)


def spec(
    names: Sequence[str | None], shape: Sequence[int], mesh: Mesh | AbstractMesh
) -> PartitionSpec:
    """Returns the mesh axes that shard each dimension of an array.

    RULES gives the candidate axes of a dimension. It is sharded over the subset with the most devices whose number
    divides it. A mesh axis shards at most one dimension; earlier dimensions choose first.

    Args:
        names: logical axis of each dimension (None: not sharded).
        shape: size of each dimension.
        mesh: its axis sizes are used.
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
    """Returns all subsets of the axes, largest first; each keeps the axes' order."""
    return [c for n in range(len(axes), -1, -1) for c in itertools.combinations(axes, n)]


def _divides(axes: Iterable[str], dim: int, mesh: Mesh | AbstractMesh) -> int:
    """Returns the number of devices along `axes` if it divides `dim`, else 0."""
    ways = math.prod(mesh.shape[a] for a in axes)
    return 0 if dim % ways else ways


def param_spec(
    names: Sequence[str | None], shape: Sequence[int], num_bytes: int, mesh: Mesh | AbstractMesh
) -> PartitionSpec:
    """Returns the mesh axes that shard each dimension of a parameter: `spec`, with two exceptions for fsdp.

    Vectors up to 1 MB (biases, norms; the axis of stacked layers does not count) are not sharded over fsdp: gathering
    them costs more than it saves. If `spec` does not shard a larger parameter over fsdp, fsdp shards the largest
    dimension that it divides, but never the axis of stacked layers: layers are gathered one by one.

    Args:
        names: logical axis of each dimension (None: not sharded).
        shape: size of each dimension.
        num_bytes: size of the parameter.
        mesh: its axis sizes are used.
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

    Call it on the parameter in the compute dtype: bfloat16 halves the bytes sent. Without `gather`, XLA's partitioner
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
    """Returns the sharding of each leaf of a tree of abstract parameters with axis names (`logical`)."""

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
    """Returns {name: bytes on each device} of the leaves over 1 MB that fsdp does not shard ({} if fsdp is 1).

    Args:
        placed: a tree of abstract arrays with shardings.
        mesh: the run's mesh.
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
    """Constrains an activation's sharding by one logical axis name per dimension; no-op outside a mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return x
    return jax.lax.with_sharding_constraint(x, spec(names, x.shape, mesh))


def batch_sharding(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec(RULES["batch"]))


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def batch_ways(mesh: Mesh | AbstractMesh) -> int:
    """Returns the number of shards of a batch."""
    return math.prod(mesh.shape[a] for a in RULES["batch"])


def check_batch(batch: int, mesh: Mesh, num_micro: int = 1, where: str = "config.batch") -> None:
    """Raises UserError unless the batch shards times the micro-batches divide the global batch.

    Args:
        batch: rows of the global batch.
        mesh: the run's mesh.
        num_micro: number of micro-batches.
        where: name of the setting that the message blames.
    """
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
    """Returns global arrays, sharded on their first axis, from each host's own rows."""
    sharding = batch_sharding(mesh)
    if jax.process_count() == 1:
        return {k: jax.device_put(v, sharding) for k, v in batch.items()}
    return {k: jax.make_array_from_process_local_data(sharding, v) for k, v in batch.items()}


def to_host(x: jax.Array | np.ndarray) -> np.ndarray:
    """Returns the whole array as NumPy, on every host."""
    if isinstance(x, np.ndarray) or x.is_fully_addressable or x.is_fully_replicated:
        return np.asarray(x)
    from jax.experimental import multihost_utils

    return np.asarray(multihost_utils.process_allgather(x, tiled=True))
