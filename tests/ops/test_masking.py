"""Patches dropped and words masked: how many, which, and that each example draws from its own key."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vlp.core.check import UserError
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


TEXT = np.array([1, *range(4, 16), 2, 0, 0], np.int32)  # bos, 12 words, eos, pads


@pytest.mark.parametrize("mask_id", [16, 9])  # behind the vocabulary, and a piece of it
def test_words_are_masked_by_the_law(mask_id):
    text = np.where(TEXT == mask_id, 4, TEXT)
    keys = jax.random.split(jax.random.key(2), 20_000)
    run = jax.jit(lambda keys: masking.mask_words(
        jnp.tile(jnp.asarray(text), (len(keys), 1)), keys, mask_id=mask_id, vocab_size=16
    ))  # fmt: skip
    masked, where = map(np.asarray, run(keys))
    words = text >= 4
    assert not where[:, ~words].any()
    np.testing.assert_array_equal(masked[~where], np.tile(text, (len(keys), 1))[~where])
    num = where.sum()  # of 240,000
    assert abs(num / (len(keys) * words.sum()) - 0.15) < 0.003  # 4 deviations
    new, old = masked[where], np.tile(text, (len(keys), 1))[where]
    hidden, same = new == mask_id, new == old
    ordinary = 12 - (mask_id < 16)
    assert abs(hidden.mean() - 0.8) < 0.009
    assert abs(same.mean() - (0.1 + 0.1 / ordinary)) < 0.008  # kept, or swapped with itself
    swapped = np.bincount(new[~hidden & ~same], minlength=17)
    assert swapped[:4].sum() == 0 and swapped[mask_id] == 0
    assert (swapped[4:16] > 0).sum() == ordinary
    np.testing.assert_allclose(where.mean(0)[words], 0.15, atol=0.011)


def test_a_text_is_masked_by_its_own_key():
    keys = jax.random.split(jax.random.key(3), 5)
    args = {"mask_id": 16, "vocab_size": 16, "ratio": 0.5}
    masked, where = masking.mask_words(jnp.asarray(np.tile(TEXT, (5, 1))), keys, **args)
    alone = masking.mask_words(jnp.asarray(TEXT)[None], keys[3:4], **args)
    np.testing.assert_array_equal(masked[3:4], alone[0])
    np.testing.assert_array_equal(where[3:4], alone[1])
    text, nowhere = masking.mask_words(jnp.asarray(TEXT)[None], None, **args)
    np.testing.assert_array_equal(text, TEXT[None])
    assert not nowhere.any()
    with pytest.raises(UserError, match=r"mask_words: got ratio 0.15, hidden 0.8, swapped 0.3"):
        masking.mask_words(
            jnp.asarray(TEXT)[None], keys[:1], mask_id=16, vocab_size=16, swapped=0.3
        )
