"""Captioning loss. Labels are shifted here and nowhere else."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def nll(
    hidden_BLD: Float[Array, "B L D"],
    unembed_DV: Float[Array, "D V"],
    text_BL: Int[Array, "B L"],
    pad_id: int = 0,
) -> dict[str, Float[Array, "B"]]:
    """Per example: `total`, the sum of −log P(token t+1 | tokens ≤ t, image), `count`, how many tokens that is,
    and `correct`, how many of them are the likeliest.

    Position t predicts token t+1; the first token is never a target and pads never are. Logits in float32.
    Source: CoCa (Yu et al. 2022, arXiv:2205.01917, eq. 3), with BOS given and EOS predicted.
    """
    labels_BM = text_BL[:, 1:]
    real_BM = labels_BM != pad_id
    hidden_BMD = hidden_BLD[:, :-1]
    logits_BMV = jnp.einsum(
        "bmd,dv->bmv",
        hidden_BMD,
        unembed_DV.astype(hidden_BMD.dtype),
        preferred_element_type=jnp.promote_types(hidden_BLD.dtype, jnp.float32),
    )
    picked_BM = jnp.take_along_axis(logits_BMV, labels_BM[..., None], axis=-1)[..., 0]
    nll_BM = jax.nn.logsumexp(logits_BMV, axis=-1) - picked_BM
    best_BM = logits_BMV.argmax(axis=-1) == labels_BM
    return {
        "total": jnp.where(real_BM, nll_BM, 0).sum(axis=1),
        "count": real_BM.sum(axis=1).astype(jnp.float32),
        "correct": (best_BM & real_BM).sum(axis=1).astype(jnp.float32),
    }
