"""Focal weighting of a cross-entropy, per example."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float


def weigh(nll_B: Float[Array, "B"], gamma: float) -> Float[Array, "B"]:
    """Computes the focal loss (1 − p)^γ · nll, where p = exp(−nll). γ = 0 returns nll.

    γ in (0, 1) is not supported: automatic differentiation gives NaN at p = 1. A nll that rounding made
    negative counts as p = 1. Source: Lin et al. 2017 (arXiv:1708.02002, eq. 4).
    """
    if not gamma:
        return nll_B
    return (-jnp.expm1(-jnp.maximum(nll_B, 0))) ** gamma * nll_B
