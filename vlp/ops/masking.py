"""Random patch dropping of FLIP (Li et al. 2022, arXiv:2212.00794, §3): a static number of patches is kept."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, Key


def num_kept(num_tokens: int, keep_ratio: float) -> int:
    """How many of N tokens are kept: int(N · keep_ratio), at least one (the reference code rounds down too)."""
    return max(1, int(num_tokens * keep_ratio + 1e-6))


def keep_ids(keys_B: Key[Array, "B"], num_tokens: int, keep_ratio: float) -> Int[Array, "B M"]:
    """A uniform random subset of each example's tokens, in ascending order, from that example's own key."""
    noise_BN = jax.vmap(lambda key: jax.random.uniform(key, (num_tokens,)))(keys_B)
    return jnp.sort(jnp.argsort(noise_BN, axis=1)[:, : num_kept(num_tokens, keep_ratio)], axis=1)
