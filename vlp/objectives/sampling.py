"""Hard negatives drawn from the batch."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from vlp.core import check


def weights(logits_BB: jax.Array) -> jax.Array:
    """Returns the softmax of each row over all columns except its own, [B B]."""
    own_BB = jnp.eye(logits_BB.shape[0], dtype=bool)
    return jax.nn.softmax(jnp.where(own_BB, -jnp.inf, logits_BB))


def negatives(keys_B: jax.Array | None, logits_BB: jax.Array) -> jax.Array:
    """Draws another column for each row with the probabilities of `weights`; the most likely one without keys.

    Returns i32[B], without gradient.

    Source: ALBEF (Li et al. 2021, arXiv:2107.07651, §3.2).
    """
    if (num := logits_BB.shape[0]) < 2:
        raise check.error("config.batch", num, "2 or more, for the negatives", "raise it")
    logits_BB = jnp.log(weights(jax.lax.stop_gradient(logits_BB)))
    if keys_B is None:
        return logits_BB.argmax(axis=1)
    return jax.vmap(jax.random.categorical)(keys_B, logits_BB)


def take(x: jax.Array, ids_B: jax.Array) -> jax.Array:
    """Returns rows of `x`; the gradients of a row that is taken several times are summed in float32."""
    if not jnp.issubdtype(x.dtype, jnp.floating):
        return x[ids_B]
    return x.astype(jnp.float32)[ids_B].astype(x.dtype)
