"""What methods draw for each example: masked words, negatives of the batch."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from vlp.core import check
from vlp.core.types import Ctx

SPECIAL = 3  # ids up to here are the tokenizer's pad, bos, eos and unk


def mask_words(ctx: Ctx, ratio: float, mask_id: int, vocab: int) -> tuple[jax.Array, jax.Array]:
    """Masks words as BERT does: of those chosen 80 % become `mask_id`, 10 % another word, 10 % stay.

    Args:
        ctx: whose batch has "text" i32[B L]. Without keys (evaluation) nothing is masked.
        ratio: probability of each word to be chosen; pads and the first token never are.
        mask_id: the tokenizer's.
        vocab: other words are drawn from the ids above `SPECIAL` and below this.

    Returns:
        The masked ids i32[B L], and which were chosen, bool[B L]: those are to be predicted.

    Source: BERT (Devlin et al. 2019, arXiv:1810.04805, §3.1).
    """
    text_BL, keys_B = ctx.batch["text"], ctx.keys("words")
    if keys_B is None:
        return text_BL, jnp.zeros(text_BL.shape, bool)
    shape = text_BL.shape[1:]

    def draw(key: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        chosen, kind, word = jax.random.split(key, 3)
        words = jax.random.randint(word, shape, SPECIAL + 1, vocab)
        return jax.random.uniform(chosen, shape), jax.random.uniform(kind, shape), words

    chosen_BL, kind_BL, word_BL = jax.vmap(draw)(keys_B)
    first_BL = jnp.arange(shape[0])[None] == 0
    where_BL = (chosen_BL < ratio) & (text_BL != 0) & ~first_BL
    new_BL = jnp.where(kind_BL < 0.8, mask_id, jnp.where(kind_BL < 0.9, word_BL, text_BL))
    return jnp.where(where_BL, new_BL, text_BL), where_BL


def weights(logits_BB: jax.Array) -> jax.Array:
    """For each row, its softmax over the columns that are not its own."""
    own_BB = jnp.eye(logits_BB.shape[0], dtype=bool)
    return jax.nn.softmax(jnp.where(own_BB, -jnp.inf, logits_BB))


def negatives(keys_B: jax.Array | None, logits_BB: jax.Array) -> jax.Array:
    """For each row another column i32[B], drawn by `weights`; the likeliest without keys. No gradient.

    Source: ALBEF (Li et al. 2021, arXiv:2107.07651, §3.2).
    """
    if (num := logits_BB.shape[0]) < 2:
        raise check.error("config.batch", num, "2 or more, for the negatives", "raise it")
    logits_BB = jnp.log(weights(jax.lax.stop_gradient(logits_BB)))
    if keys_B is None:
        return logits_BB.argmax(axis=1)
    return jax.vmap(jax.random.categorical)(keys_B, logits_BB)
