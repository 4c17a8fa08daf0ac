"""Position tables: the sine-cosine formula, and what resizing keeps."""

import math

import jax.numpy as jnp
import numpy as np
import pytest

from vlp.core import check
from vlp.ops import posembed


def test_sincos_equals_its_formula():
    table = posembed.sincos_2d(3, 4, 8, temperature=100.0)
    for y in range(3):
        for x in range(4):
            waves = [100.0 ** -(i / 2) for i in range(2)]
            want = [f(a * w) for a in (x, y) for f in (math.sin, math.cos) for w in waves]
            np.testing.assert_allclose(table[4 * y + x], want, atol=1e-6)
    with pytest.raises(check.UserError, match="got 6, expected a multiple of 4"):
        posembed.sincos_2d(2, 2, 6)


def test_grid_of_equal_size_is_untouched():
    table = jnp.asarray(np.random.default_rng(0).normal(size=(16, 3)), jnp.float32)
    assert posembed.resize_grid(table, 16) is table


def test_grid_keeps_rows_columns_and_smooth_tables():
    y, x = np.mgrid[:4, :4]
    table = jnp.asarray(np.stack([y, x, np.ones_like(x)], axis=-1).reshape(16, 3), jnp.float32)
    large = posembed.resize_grid(table, 64).reshape(8, 8, 3)
    np.testing.assert_allclose(large[:, :, 2], 1, atol=1e-5)
    np.testing.assert_allclose(large[:, :, 0], large[:, :, 1].T, atol=1e-5)  # no row for column
    assert (np.diff(large[2:6, 4, 0]) > 0.4).all() and (np.ptp(large[:, :, 0], axis=1) < 1e-5).all()
    waves = np.cos(0.3 * (y + 2 * x)).reshape(16, 1).astype(np.float32)
    back = posembed.resize_grid(posembed.resize_grid(jnp.asarray(waves), 256), 16)
    np.testing.assert_allclose(back, waves, atol=0.1)


@pytest.mark.parametrize("old, new", [(12, 16), (16, 12)])
def test_grids_are_square(old, new):
    with pytest.raises(check.UserError, match=f"got {old} → {new} positions"):
        posembed.resize_grid(jnp.zeros((old, 2)), new)


def test_sequence_rows_are_absolute_positions():
    old, fresh = jnp.arange(8.0).reshape(4, 2), -jnp.ones((6, 2))
    np.testing.assert_array_equal(
        posembed.resize_sequence(old, fresh), np.concatenate([old, fresh[4:]])
    )
    np.testing.assert_array_equal(posembed.resize_sequence(old, fresh[:3]), old[:3])
    np.testing.assert_array_equal(posembed.resize_sequence(old, fresh[:4]), old)


def test_a_first_row_without_a_place_is_kept():
    table = jnp.asarray(np.random.default_rng(0).normal(size=(1 + 4, 3)), jnp.float32)
    out = posembed.resize_grid_after_first(table, jnp.zeros((1 + 16, 3)))
    np.testing.assert_array_equal(out[0], table[0])
    np.testing.assert_array_equal(out[1:], posembed.resize_grid(table[1:], 16))
