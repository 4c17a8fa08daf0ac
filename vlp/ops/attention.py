"""Scaled dot-product attention behind one function. Softmax is computed in float32."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float


def attend(
    q_BTHK: Float[Array, "B T H K"],
    k_BSHK: Float[Array, "B S H K"],
    v_BSHK: Float[Array, "B S H K"],
    mask_BTS: Bool[Array, "#B T S"] | None = None,
    *,
    causal: bool = False,
) -> Float[Array, "B T H K"]:
    """Attention over S keys for T queries (Vaswani et al. 2017, arXiv:1706.03762, eq. 1).

    mask_BTS: True where a query may look; causal: query t sees keys 0..t. Both may be given.
    """
    mask = None if mask_BTS is None else mask_BTS[:, None]
    if q_BTHK.dtype == jnp.float64:
        return _double(q_BTHK, k_BSHK, v_BSHK, mask, causal)
    return jax.nn.dot_product_attention(q_BTHK, k_BSHK, v_BSHK, mask=mask, is_causal=causal)


def _double(q_BTHK: Array, k_BSHK: Array, v_BSHK: Array, mask: Array | None, causal: bool) -> Array:
    """The same in float64, for comparisons: JAX's function rounds the logits to float32."""
    logits_BHTS = jnp.einsum("bthk,bshk->bhts", q_BTHK, k_BSHK) * q_BTHK.shape[-1] ** -0.5
    seen = jnp.ones(logits_BHTS.shape, bool) if mask is None else mask
    if causal:
        seen = seen & jnp.tril(jnp.ones(logits_BHTS.shape[2:], bool))[None, None]
    weights_BHTS = jax.nn.softmax(jnp.where(seen, logits_BHTS, -jnp.inf), axis=-1)
    return jnp.einsum("bhts,bshk->bthk", weights_BHTS, v_BSHK)
