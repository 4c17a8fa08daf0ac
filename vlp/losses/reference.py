"""The plain form of every loss, in a few lines of jnp on one device. The tests' oracle; no training code calls it.

Matrices [B C] are whole here: rows are images, columns are texts. Where a function has `where`, pairs that are False
are left out of the denominators; `targets` say how much two belong together (None: row k to column k).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


def identity(logits_BC: Float[Array, "B C"]) -> Float[Array, "B C"]:
    """Targets where row k belongs to column k."""
    num_rows, num_columns = logits_BC.shape
    return jnp.eye(num_rows, num_columns)


def cross_entropy(
    logits_BC: Float[Array, "B C"],
    where_BC: Bool[Array, "B C"] | None = None,
    targets_BC: Float[Array, "B C"] | None = None,
) -> Float[Array, "B"]:
    """Per row: log-sum-exp of the logits, minus their mean by the targets. `contrastive.one_way`, and with further
    columns concatenated `contrastive.softmax`: i2t of the logits, t2i of their transpose."""
    targets_BC = identity(logits_BC) if targets_BC is None else targets_BC
    lse_B = jax.nn.logsumexp(logits_BC, 1, where=where_BC)
    return lse_B - (targets_BC * logits_BC).sum(1) / targets_BC.sum(1)


def sigmoid(
    logits_BC: Float[Array, "B C"],
    where_BC: Bool[Array, "B C"] | None = None,
    targets_BC: Float[Array, "B C"] | None = None,
) -> Float[Array, "B"]:
    """Per row: the sum of binary cross-entropies. `contrastive.sigmoid`."""
    targets_BC = identity(logits_BC) if targets_BC is None else targets_BC
    log_p, log_q = jax.nn.log_sigmoid(logits_BC), jax.nn.log_sigmoid(-logits_BC)
    return -(targets_BC * log_p + (1 - targets_BC) * log_q).sum(1, where=where_BC)


def over_captions(
    losses_KB: Float[Array, "K B"], where_BK: Bool[Array, "B K"]
) -> Float[Array, "B"]:
    """Per example: the mean over its captions that exist, 0 for none. `contrastive.over_captions`."""
    return jnp.where(where_BK.T, losses_KB, 0).sum(0) / jnp.maximum(where_BK.sum(1), 1)


def mixed_targets(
    logits_BC: Float[Array, "B C"], alpha: Float[Array, ""] | float
) -> Float[Array, "B C"]:
    """A teacher's softmax and the identity. `contrastive.teacher_targets`."""
    return alpha * jax.nn.softmax(logits_BC) + (1 - alpha) * identity(logits_BC)


def token_sets(
    x_BNE: Float[Array, "B N E"],
    y_CLE: Float[Array, "C L E"],
    x_BN: Bool[Array, "B N"],
    y_CL: Bool[Array, "C L"],
    mean_over: str = "columns",
) -> Float[Array, "B C"]:
    """The score of every pair of token sets; x_BN, y_CL: which tokens exist. `pairs.TokenSets`."""
    dots = jnp.einsum("bne,cle->bcnl", x_BNE, y_CLE)
    has_n, has_l = x_BN[:, None, :], y_CL[None]
    if mean_over == "columns":  # mean over l of the best n
        return dots.max(2, where=has_n[..., None], initial=-jnp.inf).mean(-1, where=has_l)
    if mean_over == "rows":
        return dots.max(3, where=has_l[:, :, None], initial=-jnp.inf).mean(-1, where=has_n)
    return dots.mean((2, 3), where=has_n[..., None] & has_l[:, :, None])


def nll(
    logits_BLV: Float[Array, "B L V"],
    text_BL: Int[Array, "B L"],
    where_BL: Bool[Array, "B L"],
    teacher_BLV: Float[Array, "B L V"] | None = None,
) -> Float[Array, "B"]:
    """Per example: the sum over its targets of −Σ P_target · log P; position t predicts id t. `caption.nll` without
    shift, and with it on logits[:, :-1], text[:, 1:]."""
    log_p = jax.nn.log_softmax(logits_BLV)
    one_hot = jax.nn.one_hot(text_BL, logits_BLV.shape[-1])
    targets = one_hot if teacher_BLV is None else jax.nn.softmax(teacher_BLV)
    return -(targets * log_p).sum(-1).sum(-1, where=where_BL)


def focal(nll_B: Float[Array, "B"], gamma: float) -> Float[Array, "B"]:
    """(1 − p)^γ · nll with p = exp(−nll). `focal.weigh`."""
    return (1 - jnp.exp(-nll_B)) ** gamma * nll_B
