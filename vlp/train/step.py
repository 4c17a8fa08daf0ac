"""One training step: one `jit`, with the state donated. It names no method and no parameter.

If the loss, the gradient, a statistic or the objective's state is not finite, the step only counts: parameters,
optimiser, averages, statistics and the objective's state stay as they were, on all devices.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from vlp.core import tree
from vlp.core.types import Apply, Ctx, Objective, Weight, answer
from vlp.ops import statistics
from vlp.optim import ema
from vlp.optim.make import Updater
from vlp.train.state import State, check_kept

PyTree = Any


def train_step(
    state: State,
    batch: Mapping[str, jax.Array],
    *,
    model: Any,
    objective: Objective,
    updater: Updater,
    lr_at: Callable[[jax.Array], jax.Array],
    seed: int,
    num_steps: int = 1,
    num_micro: int = 1,
    micro_remat: str = "full",
    teachers: Mapping[str, tuple[Any, Weight | None]] | None = None,
) -> tuple[State, dict[str, jax.Array]]:
    """Computes loss and gradients, and applies the optimiser and the moving averages.

    Args:
        state: The state before the step; its buffers are donated.
        batch: Global arrays [B …] by leaf name.
        model: The flax module of `state.params`.
        objective: Computes the loss to minimise.
        updater: The optimiser of these parameters.
        lr_at: Stage step → learning rate.
        seed: Seed of masks and dropout.
        num_steps: Length of the stage; `Ctx.progress` is stage step / num_steps.
        num_micro: Number of micro-batches.
        micro_remat: What a micro-batch saves for its backward pass (`MICRO_REMAT`).
        teachers: Name → (model, decay). With a decay, the teacher is the moving average of the trained parameters.

    Returns:
        The next state and the step's metrics (scalars); "applied", a bool: whether the state was updated.

    Raises:
        UserError: when traced, if the objective returns a `method_state` of other arrays than it was given.
    """
    teachers = teachers or {}
    moving = jax.tree.map(lambda a, b: a or b, updater.trainable, updater.statistics)
    frozen = tree.where(jax.tree.map(lambda m: not m, moving), state.params)

    progress = state.stage_step / num_steps

    def loss_fn(moving: PyTree) -> tuple[jax.Array, tuple[PyTree, dict[str, jax.Array]]]:
        ctx = Ctx(
            apply=Apply(model, tree.merge(moving, frozen)),
            batch=batch,
            seed=jax.random.key(seed),
            step=state.stage_step,
            method_state=state.method_state,
            frozen={name: Apply(net, state.teachers[name]) for name, (net, _) in teachers.items()},
            num_micro=num_micro,
            micro_remat=micro_remat,
            progress=progress,
        )
        out = answer(objective, ctx)
        loss = out.loss()
        metrics = {name: term.mean() for name, term in (out.terms | out.metrics).items()}
        return loss, (jax.lax.stop_gradient(out.method_state), metrics)

    value_and_grad = jax.value_and_grad(loss_fn, has_aux=True)
    (loss, (method_state, metrics)), grads = value_and_grad(tree.where(moving, state.params))
    slots, recorded = (tree.where(updater.statistics, t) for t in (state.params, grads))
    trainable, grads = (tree.where(updater.trainable, t) for t in (state.params, grads))
    check_kept(f"objective {type(objective).__name__}", state.method_state, method_state)
    grad_norm = tree.norm(grads)
    applied = jnp.isfinite(jnp.stack([loss, grad_norm, tree.norm(recorded)])).all()
    applied &= stays_finite(state.method_state, method_state)
    lr = lr_at(state.stage_step)

    def update(old: PyTree) -> PyTree:
        grads, trainable, slots, opt, averages, _ = old
        trainable, opt, changes = updater.apply(grads, opt, trainable, lr)
        slots = statistics.updated(slots, recorded)
        params = tree.merge(tree.merge(trainable, frozen), slots)
        averages = {
            name: average if (decay := teachers[name][1]) is None
            else ema.update(average, params, decay, progress)
            for name, average in averages.items()
        }  # fmt: skip
        changes = jax.tree.map(lambda g, c: c.astype(g.dtype), grads, changes)
        return changes, trainable, slots, opt, averages, method_state

    # The gradients are clipped before, and the changes take their place: no further array of their size is needed.
    old = updater.clipped(grads), trainable, slots, state.opt, state.teachers, state.method_state
    changes, trainable, slots, opt, averages, method_state = changed_if(applied, update, old)
    weights = tree.merge(trainable, frozen)
    params = tree.merge(weights, slots)
    metrics = {
        "loss": loss,
        **metrics,
        **statistics.metrics(slots),
        "lr": lr,
        "grad_norm": grad_norm,
        "update_norm": tree.norm(changes),
        "param_norm": tree.norm(weights),
        "applied": applied,
    }
    return State(state.step + 1, state.stage_step + 1, params, opt, averages, method_state), metrics


def changed_if(wanted: jax.Array, change: Callable[[PyTree], PyTree], x: PyTree) -> PyTree:
    """Returns change(x) if `wanted` (bool[]), else x.

    A loop of one turn or none, since XLA writes what a loop changes in place. To choose between old and new values by
    `jnp.where` takes memory for the parameters once more on some machines, and `jax.lax.cond` copies its operands.
    """
    turn = lambda carry: (jnp.bool_(False), change(carry[1]))
    return jax.lax.while_loop(lambda carry: carry[0], turn, (wanted, x))[1]


def stays_finite(old: PyTree, new: PyTree) -> jax.Array:
    """Returns bool[]: whether every number of `new` is finite where that of `old` is."""
    floats = [
        (o, n)
        for o, n in zip(jax.tree.leaves(old), jax.tree.leaves(new))
        if jnp.issubdtype(n.dtype, jnp.inexact)
    ]
    kept = [(jnp.isfinite(n) | ~jnp.isfinite(o)).all() for o, n in floats]
    return jnp.stack(kept).all() if kept else jnp.bool_(True)
