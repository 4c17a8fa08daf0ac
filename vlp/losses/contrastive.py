"""Softmax contrastive loss of a batch of pairs, per example, in float32."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from vlp.core.types import Term


def softmax(
    zi_BE: Float[Array, "B E"],
    zt_BE: Float[Array, "B E"],
    scale: Float[Array, ""],
    targets_BB: Float[Array, "B B"] | None = None,
) -> dict[str, Float[Array, "B"]]:
    """Cross-entropy of each image over all texts (`i2t`) and of each text over all images (`t2i`).

    zi, zt: unit vectors, row k of one belongs to row k of the other. targets_BB: instead of the identity, how much
    image i and text j belong together; rows are normalised for i2t, columns for t2i. Also `hit_i2t`, `hit_t2i`:
    1 where no other row of the batch scores above the pair, shared among equals (in-batch retrieval@1).
    Source: CLIP (Radford et al. 2021, arXiv:2103.00020, fig. 3), which halves the sum of both directions.
    """
    dtype = jnp.promote_types(zi_BE.dtype, jnp.float32)
    zi_BE, zt_BE = zi_BE.astype(dtype), zt_BE.astype(dtype)
    logits_BB = scale * jnp.einsum("be,ce->bc", zi_BE, zt_BE, precision=jax.lax.Precision.HIGHEST)
    diagonal_B = jnp.diagonal(logits_BB)

    def direction(
        logits_BB: Float[Array, "B B"], targets_BB: Float[Array, "B B"] | None
    ) -> Float[Array, "B"]:
        lse_B = jax.nn.logsumexp(logits_BB, axis=1)
        if targets_BB is None:
            return lse_B - diagonal_B
        targets_BB = targets_BB / targets_BB.sum(axis=1, keepdims=True)
        return lse_B - (targets_BB * logits_BB).sum(axis=1)

    def hit(logits_BB: Float[Array, "B B"]) -> Float[Array, "B"]:
        best_BB = logits_BB >= logits_BB.max(axis=1, keepdims=True)
        return (jnp.diagonal(best_BB) / best_BB.sum(axis=1)).astype(jnp.float32)

    return {
        "i2t": direction(logits_BB, targets_BB),
        "t2i": direction(logits_BB.T, None if targets_BB is None else targets_BB.T),
        "hit_i2t": hit(logits_BB),
        "hit_t2i": hit(logits_BB.T),
    }


def metrics(loss: dict[str, Float[Array, "B"]], scale: Float[Array, ""]) -> dict[str, Term]:
    """What to log of a batch: the mean of both directions minus ln B (0: nothing learned), and retrieval@1."""
    num = loss["i2t"].shape[0]
    excess_B = 0.5 * (loss["i2t"] + loss["t2i"]) - math.log(num)
    hits_B = 0.5 * (loss["hit_i2t"] + loss["hit_t2i"])
    return {
        "contrastive/minus_log_batch": Term(excess_B.sum(), num),
        "contrastive/retrieval@1": Term(hits_B.sum(), num),
        "logit_scale": Term(scale, 1),
    }
