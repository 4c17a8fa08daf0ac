"""Position tables: the fixed 2-D sine-cosine table, and resizing of learned tables."""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from vlp.core import check


def sincos_2d(
    rows: int, cols: int, width: int, temperature: float = 10_000.0, *, ends: bool = False
) -> Float[np.ndarray, "N D"]:
    """The fixed table of a grid of rows × cols: a quarter of the width each for sin x, cos x, sin y and cos y.

    ends: the lowest frequency is 1/temperature itself (big_vision, CLIPA); otherwise the one after it would be.
    Source: MoCo v3 (Chen et al. 2021, arXiv:2104.02057), as used by MAE and FLIP.
    """
    if width % 4:
        raise check.error(
            "model.image.width",
            width,
            "a multiple of 4 for sincos positions",
            f"set it to {width // 4 * 4 + 4}",
        )
    num = width // 4
    omega = 1.0 / temperature ** (np.arange(num) / max(1, num - ends))
    y, x = np.mgrid[:rows, :cols]
    angles_x, angles_y = (np.outer(axis.reshape(-1), omega) for axis in (x, y))
    table = [np.sin(angles_x), np.cos(angles_x), np.sin(angles_y), np.cos(angles_y)]
    return np.concatenate(table, axis=1).astype(np.float32)


def resize_grid(table_ND: Float[Array, "N D"], num_tokens: int) -> Float[Array, "M D"]:
    """Resizes the table of a square grid to another: bicubic, antialiased when it shrinks; equal size is a no-op."""
    old, new = math.isqrt(table_ND.shape[0]), math.isqrt(num_tokens)
    if table_ND.shape[0] == num_tokens:
        return table_ND
    if old * old != table_ND.shape[0] or new * new != num_tokens:
        got = f"{table_ND.shape[0]} → {num_tokens} positions"
        raise check.error("position table", got, "square grids", "use square images")
    grid = table_ND.reshape(old, old, -1)
    return jax.image.resize(grid, (new, new, grid.shape[-1]), "cubic", antialias=True).reshape(
        num_tokens, -1
    )


def resize_grid_after_first(
    table_ND: Float[Array, "N D"], fresh_MD: Float[Array, "M D"]
) -> Float[Array, "M D"]:
    """As `resize_grid`, for a table whose first row (of a pooled token) belongs to no place and is kept."""
    grid = resize_grid(table_ND[1:], fresh_MD.shape[0] - 1)
    return jnp.concatenate([table_ND[:1], grid])


def resize_sequence(
    table_LD: Float[Array, "L D"], fresh_MD: Float[Array, "M D"]
) -> Float[Array, "M D"]:
    """Cuts a text table to the length of `fresh_MD`, or appends the rows of `fresh_MD` for the new positions."""
    return jnp.concatenate([table_LD, fresh_MD[table_LD.shape[0] :]])[: fresh_MD.shape[0]]
