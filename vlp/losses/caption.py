"""Likelihood of a text's words: captions and masked words. Labels are shifted here and nowhere else."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from vlp.losses import pairs

LOGITS_BYTES = 1 << 26  # per device: up to here, all logits are held at once


def nll(
    hidden_BLD: Float[Array, "B L D"],
    unembed_DV: Float[Array, "D V"],
    text_BL: Int[Array, "B L"],
    pad_id: int = 0,
    chunk: int | None = None,
    *,
    where: Bool[Array, "B L"] | None = None,
    shift: bool = True,
    teacher: tuple[Float[Array, "B L F"], Float[Array, "F V"]] | None = None,
) -> dict[str, Float[Array, "B"]]:
    """Negative log-likelihood of the words of a text, summed per example. Logits in float32.

    Args:
        hidden_BLD: A vector per position; its product with `unembed_DV` is the logits.
        unembed_DV: The vocabulary matrix, V ids.
        text_BL: The ids.
        pad_id: Pads are never targets.
        chunk: Entries of the vocabulary at a time, so that no [tokens, vocabulary] logits are held (`losses.pairs`);
            0: all at once; None: 1,024 where a device's logits would take over 64 MiB. It changes memory, at a third
            more matrix products, and not the values.
        where: Which ids are targets, besides not being pads. Masked words, for example.
        shift: True: position t predicts id t + 1, and the first id is never a target (captions). False: position t
            predicts id t (masked words).
        teacher: (hidden, unembed) of another model at the same positions, for soft targets. No gradient reaches it.

    Returns:
        Numbers per example, [B]: `total`, the sum of −log P(target); `count`, how many targets; `correct`, how many
        of them are the likeliest id. With a teacher also `soft`, the sum over targets of −Σ P_teacher · log P.

    Source: CoCa (Yu et al. 2022, arXiv:2205.01917, eq. 3), with BOS given and EOS predicted.
    """
    first = 1 if shift else 0
    labels_BM = text_BL[:, first:]
    real_BM = labels_BM != pad_id
    if where is not None:
        real_BM &= where[:, first:]
    here = lambda h: h[:, : h.shape[1] - first]
    hidden_BMD, unembed_DV = here(hidden_BLD), unembed_DV.astype(hidden_BLD.dtype)
    if teacher is not None:
        hidden, unembed = jax.lax.stop_gradient(teacher)
        teacher = here(hidden), unembed.astype(hidden.dtype)
    if chunk is None:
        mesh = jax.sharding.get_abstract_mesh()
        logits_bytes = 4 * labels_BM.size * unembed_DV.shape[1] / (1 if mesh.empty else mesh.size)
        chunk = pairs.CHUNK if logits_bytes > LOGITS_BYTES else 0
    tiled = chunk and labels_BM.size
    found = (
        _tiled(hidden_BMD, unembed_DV, labels_BM, teacher, chunk)
        if tiled
        else _whole(hidden_BMD, unembed_DV, labels_BM, teacher)
    )
    sums = {"total": found["nll"], "soft": found.get("soft")}
    out = {k: jnp.where(real_BM, v, 0).sum(axis=1) for k, v in sums.items() if v is not None}
    return out | {
        "count": real_BM.sum(axis=1).astype(jnp.float32),
        "correct": (found["best"] & real_BM).sum(axis=1).astype(jnp.float32),
    }


def _whole(
    hidden_BMD: jax.Array, unembed_DV: jax.Array, labels_BM: jax.Array, teacher: Any
) -> dict[str, jax.Array]:
    """Per position `nll`, whether the target is the likeliest id (`best`) and `soft`, from all logits at once."""
    logits_BMV = _logits(hidden_BMD, unembed_DV)
    picked_BM = jnp.take_along_axis(logits_BMV, labels_BM[..., None], axis=-1)[..., 0]
    lse_BM = jax.nn.logsumexp(logits_BMV, axis=-1)
    out = {"nll": lse_BM - picked_BM, "best": logits_BMV.argmax(axis=-1) == labels_BM}
    if teacher is not None:
        p_BMV = jax.nn.softmax(_logits(*teacher))
        out["soft"] = lse_BM - (p_BMV * logits_BMV).sum(-1)
    return out


def _logits(hidden_BMD: jax.Array, unembed_DV: jax.Array) -> jax.Array:
    dtype = jnp.promote_types(hidden_BMD.dtype, jnp.float32)
    return jnp.einsum("bmd,dv->bmv", hidden_BMD, unembed_DV, preferred_element_type=dtype)


def _tiled(
    hidden_BMD: jax.Array, unembed_DV: jax.Array, labels_BM: jax.Array, teacher: Any, chunk: int
) -> dict[str, jax.Array]:
    """The same, the vocabulary gone over in chunks."""
    flat = lambda v: v.reshape(-1, *v.shape[2:])
    shaped = lambda v: v.reshape(labels_BM.shape)
    one = {"scale": jnp.float32(1)}
    x, y = flat(hidden_BMD), unembed_DV.T
    tokens, _ = pairs.reduce(TOKENS, one, x, y, flat(labels_BM), chunk=chunk)
    out = {"nll": shaped(tokens["lse"] - tokens["target"])}
    out["best"] = shaped((tokens["target"] >= tokens["max"]) & (tokens["ties"] == 1))
    if teacher is not None:
        theirs, b = flat(teacher[0]), teacher[1].T
        lse = pairs.reduce(ALL, one, theirs, b, chunk=chunk)[0]["lse"]
        soft, _ = pairs.reduce(SOFT, one, x, y, (theirs, lse), b, chunk=chunk)
        out["soft"] = shaped(soft["lse"] - soft["target"])
    return out


def add(captions: Sequence[dict[str, Float[Array, "B"]]]) -> dict[str, Float[Array, "B"]]:
    """The sums of `nll` over several captions of each example; every token has the same weight."""
    return jax.tree.map(lambda *numbers: sum(numbers), *captions)


def _by_teacher(i_R1: Any, j_1S: Any, a: Any, b_SF: jax.Array) -> jax.Array:
    hidden_RF, lse_R = a
    wide = lambda v: v.astype(jnp.promote_types(v.dtype, jnp.float32))
    highest = jax.lax.Precision.HIGHEST
    s_RS = jnp.einsum("rf,sf->rs", wide(hidden_RF), wide(b_SF), precision=highest)
    return jnp.exp(s_RS - lse_R[:, None])


def _is_label(i_R1: Any, j_1S: jax.Array, label_R: jax.Array, b: Any) -> jax.Array:
    return label_R[:, None] == j_1S


# rows are tokens, columns the vocabulary
ALL = pairs.Pairs(columns=False)
TOKENS = pairs.Pairs(targets=_is_label, columns=False)
SOFT = pairs.Pairs(targets=_by_teacher, columns=False)
