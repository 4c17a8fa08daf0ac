"""One training step: one jit, state donated. Knows no method and no parameter by name; imports no data code."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax

from vlp.core import tree
from vlp.core.types import Apply, Ctx, Objective, Weight, answer
from vlp.ops import statistics
from vlp.optim import ema
from vlp.optim.make import Updater
from vlp.train.state import State

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
    """Returns the next state and the metrics of this step (scalars).

    Args:
        state: Donated.
        batch: Global arrays by name.
        model: The flax module that `state.params` belong to.
        objective: What is minimised.
        updater: The optimiser, bound to the parameters.
        lr_at: Stage step → learning rate.
        seed: Of all masks and dropout.
        num_steps: Length of the stage, of which `Ctx.progress` is the share done.
        num_micro: Micro-batches.
        micro_remat: What the backward pass keeps of them (`MICRO_REMAT`).
        teachers: Name → (model, decay). With a decay the teacher is the moving average of the trained parameters.
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
    lr = lr_at(state.stage_step)
    trainable, opt, update_norm = updater.update(grads, state.opt, trainable, lr)
    slots = statistics.updated(slots, recorded)
    weights = tree.merge(trainable, frozen)
    params = tree.merge(weights, slots)
    averages = {
        name: state.teachers[name]
        if decay is None
        else ema.update(state.teachers[name], params, decay, progress)
        for name, (_, decay) in teachers.items()
    }
    metrics = {
        "loss": loss,
        **metrics,
        **statistics.metrics(slots),
        "lr": lr,
        "grad_norm": tree.norm(grads),
        "update_norm": update_norm,
    }
    metrics["param_norm"] = tree.norm(weights)
    return State(state.step + 1, state.stage_step + 1, params, opt, averages, method_state), metrics
