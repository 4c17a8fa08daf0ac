"""The device mesh and the one table from logical axis names to mesh axes.

A parameter names its axes where its shape is written (`logical`); activations use the same words (`constrain`).
Nothing else in `vlp` speaks of mesh axes. Losses are written for the global batch, as for one device.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from vlp.core import check, tree

AXES = ("data", "fsdp", "tensor")
RULES: dict[str, tuple[str, ...]] = {
    "batch": ("data", "fsdp"),
    "embed": ("fsdp",),  # model width
    "mlp": ("tensor",),
    "heads": ("tensor",),
    "vocab": ("tensor",),
    "layers": (),
    "kv": (),  # the three of q, k, v and the size of one head
    "joint": ("tensor",),  # joint embedding
    "pixels": (),  # flattened patch
    "tokens": (),  # positions and queries
}
_LARGE_BYTES = 1 << 20  # a parameter above this without axis names is a mistake


@dataclasses.dataclass(frozen=True)
class MeshShape:
    """Devices per mesh axis; one axis may be -1: all that the others leave."""

    data: int = -1
    fsdp: int = 1
    tensor: int = 1


def make(shape: MeshShape, devices: Sequence[Any] | None = None) -> Mesh:
    """Makes the mesh (axes data, fsdp, tensor; Auto) over all devices, or over those given."""
    devices = list(jax.devices() if devices is None else devices)
    sizes = dataclasses.astuple(shape)
    known = math.prod(n for n in sizes if n != -1)
    free = sum(n == -1 for n in sizes)
    if (
        min(sizes) < -1
        or 0 in sizes
        or free > 1
        or len(devices) % max(known, 1)
        or (not free and known != len(devices))
    ):
        got = " × ".join(f"{a}={n}" for a, n in zip(AXES, sizes))
        raise check.error(
            "config.mesh", got, f"a product of {len(devices)} devices", "change it, or use -1 once"
        )
    sizes = tuple(len(devices) // known if n == -1 else n for n in sizes)
    return jax.make_mesh(sizes, AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices)


def logical(init: Callable[..., Any], *names: str | None) -> Callable[..., Any]:
    """Wraps an initialiser so that its parameter carries the names of its axes."""
    unknown = [n for n in names if n is not None and n not in RULES]
    assert not unknown, f"unknown logical axes {unknown}"
    return nn.with_logical_partitioning(init, names)


def spec(
    names: Sequence[str | None], shape: Sequence[int], mesh: Mesh | AbstractMesh
) -> PartitionSpec:
    """The mesh axes of each dimension: those of its name whose product divides it, each mesh axis used once."""
    used: set[str] = set()
    parts: list[tuple[str, ...] | None] = []
    for name, dim in zip(names, shape, strict=True):
        axes: tuple[str, ...] = ()
        for axis in RULES[name] if name else ():
            if (
                axis not in used
                and dim % (mesh.shape[axis] * math.prod(mesh.shape[a] for a in axes)) == 0
            ):
                axes += (axis,)
        used.update(axes)
        parts.append(axes or None)
    return PartitionSpec(*parts)


def shardings(boxed: Any, mesh: Mesh) -> Any:
    """NamedShardings of a tree of abstract parameters that still carry their axis names."""

    def one(name: str, leaf: Any) -> NamedSharding:
        value = leaf.unbox() if isinstance(leaf, nn.meta.AxisMetadata) else leaf
        if isinstance(leaf, nn.LogicallyPartitioned):
            return NamedSharding(mesh, spec(leaf.names, value.shape, mesh))
        size = math.prod(value.shape) * value.dtype.itemsize
        assert size < _LARGE_BYTES, (
            f"{name}: {size} bytes without axis names; wrap its initialiser in `logical`"
        )
        return NamedSharding(mesh, PartitionSpec())

    is_box = lambda x: isinstance(x, nn.meta.AxisMetadata)
    return jax.tree_util.tree_map_with_path(
        lambda p, x: one(tree.name(p), x), boxed, is_leaf=is_box
    )


def constrain(x: jax.Array, *names: str | None) -> jax.Array:
    """Pins an activation's sharding by logical names; nothing outside a mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return x
    return jax.lax.with_sharding_constraint(x, spec(names, x.shape, mesh))


def batch_sharding(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec(RULES["batch"]))


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def check_batch(batch: int, mesh: Mesh, num_micro: int = 1, where: str = "config.batch") -> None:
    """Raises UserError unless the global batch divides over the mesh's batch axes and the micro-batches."""
    ways = math.prod(mesh.shape[a] for a in RULES["batch"])
    if batch < 1 or num_micro < 1 or batch % (ways * num_micro):
        detail = f"data×fsdp = {ways}" + (
            f" × micro_batches = {num_micro}" if num_micro > 1 else ""
        )
        do = f"use a multiple of {ways * max(num_micro, 1)} or change config.mesh"
        raise check.error(where, batch, f"a multiple of {detail}", do)


def to_global(batch: dict[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """Host rows → global arrays sharded on their first axis; host h holds the h-th block of rows."""
    sharding = batch_sharding(mesh)
    if jax.process_count() == 1:
        return {k: jax.device_put(v, sharding) for k, v in batch.items()}
    return {k: jax.make_array_from_process_local_data(sharding, v) for k, v in batch.items()}


def to_host(x: jax.Array | np.ndarray) -> np.ndarray:
    """The whole array on every host."""
    if isinstance(x, np.ndarray) or x.is_fully_addressable or x.is_fully_replicated:
        return np.asarray(x)
    from jax.experimental import multihost_utils

    return np.asarray(multihost_utils.process_allgather(x, tiled=True))
