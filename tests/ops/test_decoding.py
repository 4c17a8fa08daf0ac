"""Greedy decoding over next-token functions whose best continuation is known."""

import jax
import jax.numpy as jnp
import numpy as np

from vlp.ops import decoding

VOCAB, LENGTH = 12, 7


def chain(start_B):
    """Token after BOS: start; after k: k + 1; after 11: EOS. PAD and BOS score highest of all."""

    def next_logits(tokens_BL, t):
        last_B = tokens_BL[:, t]
        want_B = jnp.where(t == 0, start_B, jnp.where(last_B == VOCAB - 1, 2, last_B + 1))
        logits_BV = jax.nn.one_hot(want_B, VOCAB)
        return logits_BV.at[:, :2].set(5.0)

    return next_logits


def test_rows_end_at_eos_or_when_full():
    start_B = jnp.array([11, 9, 4, 2])
    tokens = decoding.greedy(chain(start_B), 4, LENGTH, vocab_size=VOCAB)
    want = [
        [1, 11, 2, 0, 0, 0, 0],
        [1, 9, 10, 11, 2, 0, 0],
        [1, 4, 5, 6, 7, 8, 9],
        [1, 2, 0, 0, 0, 0, 0],
    ]
    np.testing.assert_array_equal(tokens, want)


def test_a_row_does_not_depend_on_the_others():
    starts = np.array([11, 9, 4, 10])
    together = decoding.greedy(chain(jnp.asarray(starts)), 4, LENGTH, vocab_size=VOCAB)
    for row, start in enumerate(starts):
        alone = decoding.greedy(chain(jnp.array([start])), 1, LENGTH, vocab_size=VOCAB)
        np.testing.assert_array_equal(together[row], alone[0])


def test_special_tokens_are_the_callers():
    tokens = decoding.greedy(
        lambda tokens, t: jax.nn.one_hot(jnp.full(2, 3), VOCAB), 2, 4,
        vocab_size=VOCAB, pad_id=9, bos_id=8, eos_id=3, unk_id=7,
    )  # fmt: skip
    np.testing.assert_array_equal(tokens, [[8, 3, 9, 9]] * 2)


def test_only_ids_with_a_piece_are_chosen():
    """The likeliest of all are those of no piece, the next likeliest the control tokens."""
    scores_V = jnp.arange(VOCAB).at[:4].set(VOCAB).at[8:].set(2 * VOCAB).at[2].set(0)
    next_logits = lambda tokens_BL, t: jnp.tile(scores_V * 1.0, (2, 1))
    tokens = decoding.greedy(next_logits, 2, 4, vocab_size=8)
    np.testing.assert_array_equal(tokens, [[1, 7, 7, 7]] * 2)


def test_it_stops_when_all_rows_have_ended():
    asked = []

    def next_logits(tokens_BL, t):
        jax.debug.callback(lambda t: asked.append(int(t)), t)
        return chain(jnp.array([11, 10]))(tokens_BL, t)

    jax.block_until_ready(decoding.greedy(next_logits, 2, LENGTH, vocab_size=VOCAB))
    jax.effects_barrier()
    assert sorted(asked) == [0, 1, 2]
