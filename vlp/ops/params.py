"""Broadcast parameters and table rows in the type of computation, with gradients that are summed in float32.

If a parameter is first cast and then broadcast (or looked up), its gradient is summed over batch and tokens in half
precision, and the more rows there are, the more is lost to rounding.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from vlp.core.mesh import constrain


def spread(
    x: Float[Array | np.ndarray, "*s"], shape: tuple[int, ...], dtype: DTypeLike
) -> Float[Array, "*b"]:
    """`x` broadcast to `shape`, in `dtype`. Its gradient is summed in float32 or wider."""
    wide = jnp.asarray(x).astype(jnp.promote_types(x.dtype, jnp.float32))
    return jnp.broadcast_to(wide, shape).astype(dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def rows(
    table_VD: Float[Array | np.ndarray, "V D"], ids: Int[Array, "*b"], dtype: DTypeLike
) -> Float[Array, "*b D"]:
    """The rows `ids` of a table, in `dtype`, in which devices exchange it. The gradient has the table's type."""
    return constrain(jnp.asarray(table_VD).astype(dtype), "vocab", None)[ids]


def _rows_forward(
    table_VD: Array, ids: Array, dtype: DTypeLike
) -> tuple[Array, tuple[Array, Array]]:
    return rows(table_VD, ids, dtype), (table_VD, ids)


def _rows_backward(dtype: DTypeLike, saved: tuple[Array, Array], grad: Array) -> tuple[Array, None]:
    table_VD, ids = saved  # only the shape and type of the table are used
    zeros = constrain(jnp.zeros_like(table_VD), "vocab", None)
    return zeros.at[ids].add(grad.astype(table_VD.dtype)), None


rows.defvjp(_rows_forward, _rows_backward)
