"""Exponential moving average of parameters, in float32."""

from typing import Any

import jax
import jax.numpy as jnp


def update(average: Any, params: Any, decay: float, step: jax.Array) -> Any:
    """average ← d · average + (1 − d) · params, with d = min(decay, (1 + step)/(10 + step)) so that it starts fast."""
    d = jnp.minimum(decay, (1.0 + step) / (10.0 + step)).astype(jnp.float32)
    return jax.tree.map(lambda a, p: d * a + (1 - d) * p.astype(jnp.float32), average, params)
