"""Captioning loss. Labels are shifted here and nowhere else."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from vlp.losses import pairs

LOGITS_BYTES = 1 << 26  # of a device: below, the logits are held


def nll(
    hidden_BLD: Float[Array, "B L D"],
    unembed_DV: Float[Array, "D V"],
    text_BL: Int[Array, "B L"],
    pad_id: int = 0,
    chunk: int | None = None,
) -> dict[str, Float[Array, "B"]]:
    """Per example: `total`, the sum of −log P(token t+1 | tokens ≤ t, image), `count`, how many tokens that is,
    and `correct`, how many of them are the likeliest.

    Position t predicts token t+1; the first token is never a target and pads never are. Logits in float32.
    chunk: entries of the vocabulary at a time, so that no [tokens, vocabulary] logits are held (`losses.pairs`); 0:
    all at once, None: 1,024 where a device's logits would take over 64 MiB. Memory and a third more matrix products
    are all that it changes.
    Source: CoCa (Yu et al. 2022, arXiv:2205.01917, eq. 3), with BOS given and EOS predicted.
    """
    labels_BM = text_BL[:, 1:]
    real_BM = labels_BM != pad_id
    hidden_BMD, unembed_DV = hidden_BLD[:, :-1], unembed_DV.astype(hidden_BLD.dtype)
    if chunk is None:
        mesh = jax.sharding.get_abstract_mesh()
        logits_bytes = 4 * labels_BM.size * unembed_DV.shape[1] / (1 if mesh.empty else mesh.size)
        chunk = pairs.CHUNK if logits_bytes > LOGITS_BYTES else 0
    if chunk and labels_BM.size:
        flat = lambda v: v.reshape(-1, *v.shape[2:])
        tokens, _ = pairs.reduce(
            TOKENS, {"scale": jnp.float32(1)}, flat(hidden_BMD), unembed_DV.T, flat(labels_BM),
            chunk=chunk,
        )  # fmt: skip
        nll_BM = (tokens["lse"] - tokens["target"]).reshape(labels_BM.shape)
        best_BM = (tokens["target"] >= tokens["max"]) & (tokens["ties"] == 1)
        best_BM = best_BM.reshape(labels_BM.shape)
    else:
        logits_BMV = jnp.einsum(
            "bmd,dv->bmv",
            hidden_BMD,
            unembed_DV,
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


def add(captions: Sequence[dict[str, Float[Array, "B"]]]) -> dict[str, Float[Array, "B"]]:
    """The sums of `nll` over several captions of each example: their tokens count alike."""
    return jax.tree.map(lambda *numbers: sum(numbers), *captions)


def _is_label(i_R1: Any, j_1S: jax.Array, label_R: jax.Array, b: Any) -> jax.Array:
    return label_R[:, None] == j_1S


TOKENS = pairs.Pairs(targets=_is_label, columns=False)  # rows are tokens, columns the vocabulary
