"""Exponential moving average of parameters, in float32."""

from typing import Any

import jax
import jax.numpy as jnp

from vlp.core.types import Weight, at


def update(average: Any, params: Any, decay: Weight, progress: jax.Array | float = 0.0) -> Any:
    """Returns decay · average + (1 − decay) · params, without built-in warm-up.

    Args:
        average: Arrays in float32.
        params: Arrays of the same shapes, of any float type.
        decay: A number in [0, 1], or ((progress, decay), …) points joined by straight lines.
        progress: Share of the stage that is done, in [0, 1]; read by points.

    Returns:
        The next average. With decay 0 it is `params`, with decay 1 `average`, to the bit.
    """
    if isinstance(
        decay, int | float
    ):  # 1 − decay in double precision: 1 − 0.9999 in float32 is off by 2e-4
        share = 1 - decay
    else:
        share = at(tuple((place, 1 - value) for place, value in decay), progress)
    # in this form, equal values stay equal for any rounding of `share`
    toward = lambda a, p: jnp.where(share == 1, p, a + share * (p - a))
    return jax.tree.map(lambda a, p: toward(a, p.astype(jnp.float32)), average, params)
