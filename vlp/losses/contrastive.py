"""Contrastive losses of a batch of pairs, per example, exact over the global batch, in float32 or wider."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from vlp.core import check
from vlp.core.types import Term
from vlp.losses import pairs

PyTree = Any


def softmax(
    zi_BE: Float[Array, "B E"],
    zt_BE: Float[Array, "B E"],
    scale: Float[Array, ""],
    *,
    keep: Callable[..., jax.Array] | None = None,
    targets: Callable[..., jax.Array] | Float[Array, "B B"] | None = None,
    a: PyTree = (),
    b: PyTree = (),
    chunk: int = 0,
) -> dict[str, Float[Array, "B"]]:
    """Cross-entropy of each image over all texts (`i2t`) and of each text over all images (`t2i`).

    zi, zt: unit vectors, row k of one belongs to row k of the other. keep, targets: functions of (i, j, a, b), of
    global indices and of leaves of the images and of the texts (`losses.pairs.Pairs`): which pairs are in the
    denominators, and, instead of the identity, how much two belong together (normalised per image for i2t, per text
    for t2i); `targets` may also be a matrix, which then is the largest array here. chunk: texts gathered at a time.

    Besides, for losses made of them (leave-one-out, focal): `lse_i2t`, `lse_t2i`, log-sum-exp of an image's and of a
    text's logits; `positive`, the pair's own logit (the mean by `targets`, where given, of an image's). `hit_i2t`,
    `hit_t2i`: 1 where no other pair scores above the own one, shared among equals (in-batch retrieval@1).
    Source: CLIP (Radford et al. 2021, arXiv:2103.00020, fig. 3), which halves the sum of both directions.
    """
    num = zi_BE.shape[0]
    if zt_BE.shape != zi_BE.shape:
        got, do = f"{zi_BE.shape} images and {zt_BE.shape} texts", "give one text for each image"
        raise check.error("losses.contrastive", got, "equal shapes", do)
    if targets is not None and not callable(targets):
        targets = jnp.asarray(targets)
        if targets.shape != (num, num):
            got, do = f"targets {targets.shape}", "give a number for each pair"
            raise check.error("losses.contrastive", got, f"{(num, num)}", do)
        targets, a = _row_of_matrix, targets
    what = pairs.Pairs(keep=keep, targets=targets)
    image, text = pairs.reduce(what, {"scale": scale}, zi_BE, zt_BE, a, b, chunk=chunk)
    mean = lambda s: s["target"] if targets is None else s["target"] / s["mass"]
    return {
        "i2t": image["lse"] - mean(image),
        "t2i": text["lse"] - mean(text),
        "lse_i2t": image["lse"],
        "lse_t2i": text["lse"],
        "positive": mean(image),
        "hit_i2t": image["hit"],
        "hit_t2i": text["hit"],
    }


def sigmoid(
    zi_BE: Float[Array, "B E"],
    zt_BE: Float[Array, "B E"],
    scale: Float[Array, ""],
    bias: Float[Array, ""],
    *,
    keep: Callable[..., jax.Array] | None = None,
    a: PyTree = (),
    b: PyTree = (),
    chunk: int = 0,
) -> dict[str, Float[Array, "B"]]:
    """`loss`: the sum over texts j of −log σ(z (scale · xᵢ·yⱼ + bias)), z = 1 for the pair and −1 for others.

    Every pair is one binary decision (SigLIP, Zhai et al. 2023, arXiv:2303.15343, eq. 2). keep, a, b, chunk,
    `hit_i2t` and `hit_t2i` as in `softmax`.
    """
    what = pairs.Pairs(keep=keep, each=_binary)
    params = {"scale": scale, "bias": bias}
    image, text = pairs.reduce(what, params, zi_BE, zt_BE, a, b, chunk=chunk)
    return {"loss": image["each"], "hit_i2t": image["hit"], "hit_t2i": text["hit"]}


def _binary(score: jax.Array, target: jax.Array) -> jax.Array:
    return -jax.nn.log_sigmoid((2 * target - 1) * score)


def _row_of_matrix(i_B1: Any, j_1B: jax.Array, a_BB: jax.Array, b: Any) -> jax.Array:
    return jnp.take(a_BB, j_1B[0], axis=1, mode="clip")


def over_captions(
    one: Callable[[Float[Array, "B E"]], dict[str, Float[Array, "B"]]],
    zt_BKE: Float[Array, "B K E"],
    where_BK: Bool[Array, "B K"] | None = None,
) -> dict[str, Float[Array, "B"]]:
    """The mean of a loss over the captions of each image: caption k with the images' own captions k.

    Source: LaCLIP (Fan et al. 2023, arXiv:2305.20088, §3.2) draws one of the captions; this is the expectation.
    """
    num = zt_BKE.shape[1]
    if num == 1:
        return one(zt_BKE[:, 0])
    real_BK = jnp.ones(zt_BKE.shape[:2], bool) if where_BK is None else where_BK

    def body(total: PyTree, xs: Any) -> tuple[PyTree, None]:
        zt_BE, real_B = xs
        return jax.tree.map(lambda t, x: t + x * real_B, total, one(zt_BE)), None

    shapes = jax.eval_shape(one, zt_BKE[:, 0])
    zero = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    xs = (jnp.moveaxis(zt_BKE, 1, 0), real_BK.T)
    total, _ = jax.lax.scan(body, zero, xs)
    return jax.tree.map(lambda x: x / jnp.maximum(real_BK.sum(1), 1), total)


def metrics(
    loss: dict[str, Float[Array, "B"]], scale: Float[Array, ""], left_out: int = 0
) -> dict[str, Term]:
    """What to log of a batch: the mean of both directions minus ln B (0: nothing learned), and retrieval@1.

    left_out: pairs of each row that are in no denominator, 1 for leave-one-out; ln (B − 1) then.
    """
    num = loss["hit_i2t"].shape[0]
    hits_B = 0.5 * (loss["hit_i2t"] + loss["hit_t2i"])
    out = {"contrastive/retrieval@1": Term(hits_B.sum(), num), "logit_scale": Term(scale, 1)}
    if "i2t" in loss:
        excess_B = 0.5 * (loss["i2t"] + loss["t2i"]) - math.log(num - left_out)
        out["contrastive/minus_log_batch"] = Term(excess_B.sum(), num)
    return out
