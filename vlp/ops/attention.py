"""Scaled dot-product attention behind one function. Softmax is computed in float32."""

import jax
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
    return jax.nn.dot_product_attention(q_BTHK, k_BSHK, v_BSHK, mask=mask, is_causal=causal)
