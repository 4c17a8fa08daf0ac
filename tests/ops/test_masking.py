"""Patch dropping: how many are kept, and that each example draws its own uniform subset."""

import jax
import numpy as np
import pytest

from vlp.ops import masking


@pytest.mark.parametrize(
    "num, keep_ratio, kept",
    [(196, 0.5, 98), (196, 0.25, 49), (256, 0.3, 76), (10, 0.7, 7), (16, 0.01, 1), (9, 1.0, 9)],
)
def test_num_kept_is_static_and_rounds_down(num, keep_ratio, kept):
    assert masking.num_kept(num, keep_ratio) == kept


def test_ids_are_an_ascending_uniform_subset():
    keys = jax.random.split(jax.random.key(0), 3000)
    ids = np.asarray(jax.jit(masking.keep_ids, static_argnums=(1, 2))(keys, 8, 0.5))
    assert ids.shape == (3000, 4) and (np.diff(ids, axis=1) > 0).all()
    assert ids.min() == 0 and ids.max() == 7
    counts = np.bincount(ids.ravel(), minlength=8)  # of 3000 · 4/8 each, deviation 27
    assert np.abs(counts - 1500).max() < 140
    assert len({tuple(row) for row in ids}) == 70  # all subsets of 4 of 8


def test_an_example_draws_from_its_own_key():
    keys = jax.random.split(jax.random.key(1), 6)
    ids = np.asarray(masking.keep_ids(keys, 16, 0.5))
    alone = np.asarray(masking.keep_ids(keys[3:4], 16, 0.5))
    np.testing.assert_array_equal(ids[3:4], alone)
