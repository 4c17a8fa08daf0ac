"""Forward passes that several methods share: two towers, their embeddings, captions given the image.

Each is written for one micro-batch: call it inside `ctx.map`, and return from there only what the loss needs.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax

from vlp.core.types import Ctx, PyTree
from vlp.losses import caption


def dual(ctx: Ctx, keep_ratio: float = 1.0) -> tuple[Any, Any]:
    """What the model's `image` returns, and what its `text` returns for each caption, [B K …]."""
    image = ctx.student("image", ctx.batch["image"], keep_ratio=keep_ratio)
    ctx, image = after(ctx, image)
    return image, ctx.captions(lambda c: c.student("text", c.batch["text"]))


def embeds(ctx: Ctx, keep_ratio: float = 1.0) -> tuple[jax.Array, jax.Array]:
    """The embeddings: unit vectors of the images [B E] and of their captions [B K E]."""
    image, text = dual(ctx, keep_ratio)
    return image["embed"], text["embed"]


def captioned(ctx: Ctx, keep_ratio: float = 1.0) -> tuple[Any, Any, dict[str, jax.Array]]:
    """Both towers, and the captions decoded from them.

    Returns:
        What `image` returns; what `text` returns for each caption, [B K …]; `losses.caption.nll` of each example,
        summed over its captions (those that the record has): total, count, correct, f32[B].
    """
    image = ctx.student("image", ctx.batch["image"], keep_ratio=keep_ratio)
    ctx, image = after(ctx, image)

    def decode(c: Ctx, feats: Any) -> tuple[Any, dict[str, jax.Array]]:
        text = c.student("text", c.batch["text"])
        decoded = c.student("decode", text["tokens"], feats)
        nll = caption.nll(decoded["hidden"], decoded["unembed"], c.batch["text"])
        if (mask := c.batch.get("text.mask")) is not None:
            nll = jax.tree.map(lambda x: x * mask, nll)
        return text, nll

    text, nll = ctx.captions(decode, image["feats"])
    return image, text, jax.tree.map(lambda x: x.sum(axis=1), nll)


def after(ctx: Ctx, out: PyTree) -> tuple[Ctx, PyTree]:
    """The step and `out` again. The backward pass of `out` waits for that of all later calls of the returned step.

    Without it a compiler may run the backward passes of two towers side by side, with the activations of both alive.
    Values and gradients are unchanged.
    """
    params, out = _before(ctx.apply.params, out)
    return dataclasses.replace(ctx, apply=dataclasses.replace(ctx.apply, params=params)), out


@jax.custom_vjp
def _before(first: PyTree, second: PyTree) -> tuple[PyTree, PyTree]:
    """Identity on both; the cotangents of `second` are computed after those of `first`."""
    return first, second


def _before_fwd(first: PyTree, second: PyTree) -> tuple[tuple[PyTree, PyTree], None]:
    primal = lambda x: isinstance(x, jax.custom_derivatives.CustomVJPPrimal)
    return jax.tree.map(lambda x: x.value, (first, second), is_leaf=primal), None


def _before_bwd(_: None, cotangents: tuple[PyTree, PyTree]) -> tuple[PyTree, PyTree]:
    none = lambda x: isinstance(x, jax.custom_derivatives.SymbolicZero)
    leaves, treedef = jax.tree.flatten(cotangents, is_leaf=none)
    waited = iter(jax.lax.optimization_barrier([x for x in leaves if not none(x)]))
    return jax.tree.unflatten(treedef, [None if none(x) else next(waited) for x in leaves])


_before.defvjp(_before_fwd, _before_bwd, symbolic_zeros=True)
