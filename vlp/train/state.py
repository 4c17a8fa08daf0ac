"""Everything that a training step changes, and how it is first made, sharded from the start.

The parameters are those that the objective asks for: the step's forward pass is traced on a bound module, which makes
each parameter where it is first used. What no call of the objective reads does not exist.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import errors, struct
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from vlp.core import check
from vlp.core import mesh as meshes
from vlp.core.types import Apply, Ctx, Objective, answer
from vlp.optim.make import Updater

log = logging.getLogger(__name__)
PyTree = Any
Shapes = Mapping[str, jax.ShapeDtypeStruct]
Nets = Mapping[
    str, tuple[Any, PyTree]
]  # teacher → its model and parameters' shapes; None: as the trained model


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


def abstract_params(
    model: Any, objective: Objective, batch: Shapes, teachers: Nets | None = None
) -> PyTree:
    """Shapes of the parameters that the objective asks of the model, still carrying the names of their axes.

    Costs one trace of the forward pass; no memory and no compilation. Traces are kept.

    Args:
        model: a flax module.
        objective: called on a `Ctx` with the batch.
        batch: shapes of the global batch, by name.
        teachers: name → (model, shapes of its parameters); (None, None) for the trained model's own.

    Raises:
        UserError: the objective asks for a batch leaf, an answer, a head or a teacher that is not there.
    """
    return _abstract_params(model, objective, _shapes(batch), _hashable(teachers or {}))


def init_params(
    model: Any, objective: Objective, batch: Shapes, seed: int, mesh: Mesh, teachers: Nets | None = None
) -> PyTree:  # fmt: skip
    """Fresh parameters, made in their shards. Values depend on model, objective and seed, not on the mesh.

    Args and Raises: as `abstract_params`.
    """
    shardings = meshes.shardings(abstract_params(model, objective, batch, teachers), mesh)
    init = _maker(model, objective, _shapes(batch), _hashable(teachers or {}))
    return jax.jit(lambda key: nn.unbox(init(key)), out_shardings=shardings)(jax.random.key(seed))


@functools.lru_cache(maxsize=16)
def _abstract_params(model: Any, objective: Objective, batch: tuple, teachers: tuple) -> PyTree:
    init = _maker(model, objective, batch, teachers)
    # a new key, since the mesh may have no devices
    return jax.eval_shape(lambda: init(jax.random.key(0)))


def _maker(
    model: Any, objective: Objective, batch: tuple, teachers: tuple
) -> Callable[[jax.Array], PyTree]:
    """The function key → parameters with their axes' names. Its forward pass is dead code to the compiler."""

    def forward(module: Any) -> None:
        own = Apply(module, (), bound=True)
        frozen = {}
        for name, net, treedef, shapes in teachers:
            zeros = [jnp.zeros(*x) for x in shapes]
            frozen[name] = Apply(net, jax.tree.unflatten(treedef, zeros)) if net else own
        ctx = Ctx(
            apply=own,
            batch={name: jnp.zeros(shape, dtype) for name, shape, dtype in batch},
            seed=jax.random.key(0),
            method_state=nn.unbox(method_state(objective, model, 0)),
            frozen=frozen,
        )
        answer(objective, ctx)
        warn_of_masks(objective, ctx)

    def init(key: jax.Array) -> PyTree:
        try:
            return nn.init(forward, model)(key).get("params", {})
        except errors.JaxTransformError as e:
            where = f"objective {type(objective).__name__}"
            got = "a call of the model inside of jax.vmap, scan, grad or checkpoint"
            do = "call it outside, in ctx.map or in ctx.captions"
            raise check.error(where, got, "calls that make parameters", do) from e

    return init


def warn_of_masks(objective: Objective, ctx: Ctx) -> None:
    """Logs a warning if the objective read the texts [B K L] of a step and not which of them exist.

    No error: the first caption of a record always exists.
    """
    used = getattr(ctx.batch, "used", ())
    if "text" in used and "text.mask" in ctx.batch and "text.mask" not in used:
        log.warning(
            "objective %s: reads texts %s without text.mask [B K]: where a record has fewer captions the rest are "
            "empty texts; weigh by ctx.batch['text.mask'], or set config.data.captions='uniform'",
            type(objective).__name__,
            list(ctx.batch["text"].shape),
        )


def _shapes(batch: Shapes) -> tuple[tuple[str, tuple[int, ...], str], ...]:
    return tuple((name, tuple(x.shape), str(x.dtype)) for name, x in sorted(batch.items()))


def _hashable(teachers: Nets) -> tuple[tuple[str, Any, Any, tuple], ...]:
    out = []
    for name, (net, params) in sorted(teachers.items()):
        leaves, treedef = jax.tree.flatten(params)
        shapes = tuple((tuple(x.shape), str(x.dtype)) for x in leaves)
        out.append((name, net, treedef, shapes))
    return tuple(out)


def method_state(objective: Objective, model: Any, seed: int | jax.Array) -> PyTree:
    """The objective's own arrays at the start, if it has any; some may carry the names of their axes."""
    init = getattr(objective, "init_method_state", None)
    key = jax.random.key(seed) if isinstance(seed, int) else seed
    return () if init is None else init(key, model)


def check_kept(where: str, old: PyTree, new: PyTree) -> None:
    """Raises UserError unless a step returns a `method_state` with the arrays of the one that it was given: else no
    checkpoint of it could be restored."""
    before, after = arrays_of(old), arrays_of(new)
    for name in sorted(before.keys() | after.keys()):
        if before.get(name) != after.get(name):
            got = after.get(name, "none after a step")
            expected = before.get(name, "none, as before it")
            do = "return Out(…, method_state) of the shapes and types that init_method_state gives"
            raise check.error(f"{where}: method_state{name}", got, expected, do)
    got, expected = jax.tree.structure(new), jax.tree.structure(old)
    if got != expected:
        raise check.error(f"{where}: method_state", got, expected, "return it in these containers")


def arrays_of(tree: PyTree) -> dict[str, str]:
    """ "float32[8, 4]" of every leaf, by its path."""
    text = lambda x: f"{x.dtype}{list(x.shape)}"
    return {jax.tree_util.keystr(p): text(x) for p, x in jax.tree_util.tree_leaves_with_path(tree)}


def shardings(
    boxed: PyTree, updater: Updater, state: State, mesh: Mesh, method_state: PyTree = None
) -> State:
    """The sharding of every leaf of an (abstract) state.

    Args:
        boxed: `abstract_params`, with the names of their axes.
        updater: The optimiser, whose leaves lie as their parameter if the shape is equal.
        state: Shapes.
        mesh: The device mesh.
        method_state: Shapes of `state.method_state`, with the names of their axes where they have any. Leaves
            without names are replicated. None: all are.
    """
    params = meshes.shardings(boxed, mesh)
    rest = meshes.replicated(mesh)
    by_shape = {k: (x.shape, s) for k, (x, s) in _pairs(nn.unbox(boxed), params).items()}
    like = lambda p, x: _like(by_shape, p, x, rest)
    teachers = {
        name: jax.tree_util.tree_map_with_path(like, tree) for name, tree in state.teachers.items()
    }
    is_box = lambda x: isinstance(x, nn.LogicallyPartitioned)
    named = state.method_state if method_state is None else method_state
    own = jax.tree.map(lambda x: _by_names(x, mesh) if is_box(x) else rest, named, is_leaf=is_box)
    return State(
        step=rest,
        stage_step=rest,
        params=params,
        opt=jax.tree_util.tree_map_with_path(like, state.opt),
        teachers=teachers,
        method_state=own,
    )


def create(
    params: PyTree, updater: Updater, teachers: dict[str, PyTree], method_state: PyTree, step: int
) -> State:
    """A stage's first state: fresh optimiser state, counts from `step`."""
    zero = jnp.zeros((), jnp.int32)
    return State(zero + step, zero, params, updater.init(params), teachers, method_state)


def _by_names(box: Any, mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, meshes.spec(box.names, box.value.shape, mesh))


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
