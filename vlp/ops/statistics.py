"""Running statistics and auxiliary losses, passed from inside a forward pass to the training step.

A forward pass runs under scans over layers and micro-batches and is recomputed in the backward pass, so it cannot
return extra values. But gradients of parameters leave it, already summed. So a layer keeps its statistics as parameters
named `stat_…` ("slots"), which the optimiser skips, and `record` sets their gradient to the change of the statistic
instead of a derivative. The step adds the mean change (`updated`).

A module with slots also has `stat_share`, always 1: the fraction of a pass that one call of the module represents.
`Ctx.map` divides it by the number of micro-batches, so that changes and auxiliary losses are means over micro-batches;
its gradient counts the passes. A pass without a gradient (a teacher, an evaluation) records nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from vlp.core import tree
from vlp.core.types import SHARE

PyTree = Any
VALUE = "stat_value"  # a slot whose new value is one of the step's metrics


def is_slot(name: str) -> bool:
    """Whether a leaf's name ("image_tower/norm/stat_mean") is that of a statistic."""
    return name.rpartition("/")[2].startswith("stat_")


@jax.custom_vjp
def record(
    x: Float[Array, "*s"], slots: Mapping[str, Array], share: Array, changes: Mapping[str, Array]
) -> Float[Array, "*s"]:
    """Returns x. In the backward pass each slot's gradient is the change asked for.

    Args:
        x: what the layer returns; if nothing that is trained depends on it, nothing is recorded.
        slots: parameters `stat_…` of a module by name, in float32.
        share: the module's parameter `stat_share`.
        changes: what to add to each slot, by the same names and of the same shapes.
    """
    return x


def _record_forward(
    x: Array, slots: Mapping[str, Array], share: Array, changes: Mapping[str, Array]
) -> tuple[Array, tuple[Array, Mapping[str, Array]]]:
    return x, (share, changes)


def _record_backward(
    saved: tuple[Array, Mapping[str, Array]], grad: Array
) -> tuple[Array, PyTree, Array, PyTree]:
    share, changes = saved
    shares = {name: share * change for name, change in changes.items()}
    return grad, shares, jnp.ones_like(share), jax.tree.map(jnp.zeros_like, changes)


record.defvjp(_record_forward, _record_backward)


@jax.custom_vjp
def attach(x: Float[Array, "*s"], loss: Float[Array, ""], weight: Array) -> Float[Array, "*s"]:
    """Returns x, and adds weight · loss to the minimised loss in the backward pass.

    The gradient is that of an objective with this term, but the logged loss does not include it.
    """
    return x


def _attach_forward(x: Array, loss: Array, weight: Array) -> tuple[Array, tuple[Array, Array]]:
    return x, (loss, weight)


def _attach_backward(saved: tuple[Array, Array], grad: Array) -> tuple[Array, Array, Array]:
    loss, weight = saved
    return grad, weight.astype(loss.dtype), jnp.zeros_like(weight)


attach.defvjp(_attach_forward, _attach_backward)


def updated(slots: PyTree, grads: PyTree) -> PyTree:
    """The slots after a step: each plus the mean, over the passes, of the changes recorded.

    Args:
        slots: a tree of parameters with None for all but the statistics.
        grads: their gradients.
    """
    passes = {name: g for name, g in tree.named(grads).items() if name.endswith(SHARE)}

    def one(name: str, slot: Array, change: Array) -> Array:
        if name.endswith(SHARE):
            return slot
        num = passes[f"{name.rpartition('/')[0]}/{SHARE}".lstrip("/")]
        num = num.reshape(*num.shape, *[1] * (slot.ndim - num.ndim))
        return slot + change / jnp.where(num == 0, 1.0, num)

    return tree.map_named(one, slots, grads)


def metrics(slots: PyTree) -> dict[str, Array]:
    """The values of auxiliary losses by the path of their module; of a stack of layers, the mean."""
    named = tree.named(slots)
    return {
        name.removesuffix(f"/{VALUE}"): value.mean()
        for name, value in named.items()
        if name.endswith(f"/{VALUE}")
    }
