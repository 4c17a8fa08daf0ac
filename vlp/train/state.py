"""Everything that a training step changes, and how it is first made, sharded from the start."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from vlp.core import mesh as meshes
from vlp.models.interface import abstract_params
from vlp.optim.make import Updater

PyTree = Any


@struct.dataclass
class State:
    """step counts over the whole run, stage_step since the stage began (schedules read it).

    teachers: parameters by name, for those that the stage configures. method_state: the objective's own arrays.
    Leaves are arrays; in a tree of shapes or of shardings they are those.
    """

    step: PyTree
    stage_step: PyTree
    params: PyTree
    opt: PyTree
    teachers: dict[str, PyTree]
    method_state: PyTree


def init_params(model: Any, image_px: int, text_len: int, seed: int, mesh: Mesh) -> PyTree:
    """Fresh parameters, made in their shards. The values depend on the seed alone, not on the mesh."""
    shardings = meshes.shardings(abstract_params(model, image_px, text_len), mesh)

    def init(key: jax.Array) -> PyTree:
        return nn.unbox(model.init(key, *_inputs(image_px, text_len))["params"])

    return jax.jit(init, out_shardings=shardings)(jax.random.key(seed))


def shardings(
    model: Any, image_px: int, text_len: int, updater: Updater, state: State, mesh: Mesh
) -> State:
    """The sharding of every leaf of an (abstract) state: optimiser leaves as their parameter if the shape is equal."""
    boxed = abstract_params(model, image_px, text_len)
    params = meshes.shardings(boxed, mesh)
    rest = meshes.replicated(mesh)
    by_shape = {k: (x.shape, s) for k, (x, s) in _pairs(nn.unbox(boxed), params).items()}
    teachers = {
        name: jax.tree_util.tree_map_with_path(lambda p, x: _like(by_shape, p, x, rest), tree)
        for name, tree in state.teachers.items()
    }
    opt = jax.tree_util.tree_map_with_path(lambda p, x: _like(by_shape, p, x, rest), state.opt)
    method_state = jax.tree.map(lambda _: rest, state.method_state)
    return State(
        step=rest,
        stage_step=rest,
        params=params,
        opt=opt,
        teachers=teachers,
        method_state=method_state,
    )


def create(
    params: PyTree, updater: Updater, teachers: dict[str, PyTree], method_state: PyTree, step: int
) -> State:
    """A stage's first state: fresh optimiser state, counts from `step`."""
    zero = jnp.zeros((), jnp.int32)
    return State(zero + step, zero, params, updater.init(params), teachers, method_state)


def _inputs(image_px: int, text_len: int) -> tuple[jax.Array, jax.Array]:
    return jnp.zeros((1, image_px, image_px, 3), jnp.uint8), jnp.ones((1, text_len), jnp.int32)


def _pairs(abstract: PyTree, shardings: PyTree) -> dict[tuple[Any, ...], tuple[Any, Any]]:
    flat, _ = jax.tree_util.tree_flatten_with_path(abstract)
    return {
        tuple(path): (x, s) for (path, x), s in zip(flat, jax.tree.leaves(shardings), strict=True)
    }


def _like(
    by_path: dict[tuple[Any, ...], tuple[Any, Any]], path: tuple[Any, ...], leaf: Any, rest: Any
) -> Any:
    """The sharding of the parameter whose path ends this one, if their shapes are equal; else replicated.

    A factored moment, which lacks one of the parameter's dimensions, has the others divided as the parameter's.
    """
    for start in range(len(path)):
        shape, sharding = by_path.get(tuple(path[start:]), (None, None))
        if shape == leaf.shape:
            return sharding
        if shape is None or len(shape) != len(leaf.shape) + 1:
            continue
        plan = (*sharding.spec, *[None] * (len(shape) - len(sharding.spec)))
        for d in range(len(shape)):
            if shape[:d] + shape[d + 1 :] == leaf.shape:
                return NamedSharding(sharding.mesh, PartitionSpec(*plan[:d], *plan[d + 1 :]))
    return rest
