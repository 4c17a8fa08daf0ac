"""What is hidden from a model: patches dropped (FLIP), words masked (BERT). Each example draws from its own key."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int, Key

from vlp.core import check


def num_kept(num_tokens: int, keep_ratio: float) -> int:
    """How many of N tokens are kept: int(N · keep_ratio), at least one (the reference code rounds down too)."""
    return max(1, int(num_tokens * keep_ratio + 1e-6))


def keep_ids(keys_B: Key[Array, "B"], num_tokens: int, keep_ratio: float) -> Int[Array, "B M"]:
    """A uniform random subset of each example's tokens, in ascending order, from that example's own key.

    Args:
        keys_B: A key per example.
        num_tokens: N, patches of an image.
        keep_ratio: Share that is kept; a static number of them.

    Source: FLIP (Li et al. 2022, arXiv:2212.00794, §3).
    """
    noise_BN = jax.vmap(lambda key: jax.random.uniform(key, (num_tokens,)))(keys_B)
    return jnp.sort(jnp.argsort(noise_BN, axis=1)[:, : num_kept(num_tokens, keep_ratio)], axis=1)


NUM_SPECIAL = 4  # pad, bos, eos, unk


def mask_words(
    text_BL: Int[Array, "B L"],
    keys_B: Key[Array, "B"] | None,
    mask_id: int,
    vocab_size: int,
    *,
    ratio: float = 0.15,
    hidden: float = 0.8,
    swapped: float = 0.1,
) -> tuple[Int[Array, "B L"], Bool[Array, "B L"]]:
    """Hides words for masked language modelling. Each word is chosen independently, special ids (0 … 3) never.

    Args:
        text_BL: The ids.
        keys_B: A key per example; None (in evaluation): nothing is masked.
        mask_id: What stands for a hidden word (`Tokenizer.mask_id`).
        vocab_size: The tokenizer's; a swapped word is one of its ordinary pieces, each as likely.
        ratio: Share of words that are chosen.
        hidden: Share of the chosen that become `mask_id`.
        swapped: Share of the chosen that become a random word. The rest is left as it is.

    Returns:
        The text with masks, and which positions were chosen: the targets, with the words of `text_BL`.

    Raises:
        UserError: for shares that are no shares.

    Source: BERT (Devlin et al. 2019, arXiv:1810.04805, §3.1), which chooses 15 %: 80 % hidden, 10 % swapped.
    """
    if not (0 <= ratio <= 1 and min(hidden, swapped) >= 0 and hidden + swapped <= 1):
        got = f"ratio {ratio}, hidden {hidden}, swapped {swapped}"
        do = "give shares, such as 0.15, 0.8 and 0.1"
        raise check.error("mask_words", got, "all in [0, 1], hidden + swapped at most 1", do)
    if keys_B is None:
        return text_BL, jnp.zeros(text_BL.shape, bool)
    inside = mask_id < vocab_size
    length, words = text_BL.shape[1], vocab_size - NUM_SPECIAL - inside

    def draw(key: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        chosen, how, word = jax.random.split(key, 3)
        ids_L = jax.random.randint(word, (length,), NUM_SPECIAL, NUM_SPECIAL + words)
        return jax.random.uniform(chosen, (length,)), jax.random.uniform(how, (length,)), ids_L

    chosen_BL, how_BL, ids_BL = jax.vmap(draw)(keys_B)
    if inside:
        ids_BL += ids_BL >= mask_id  # every ordinary piece but the mask
    where_BL = (chosen_BL < ratio) & (text_BL >= NUM_SPECIAL) & (text_BL != mask_id)
    new_BL = jnp.where(how_BL < hidden + swapped, ids_BL, text_BL)
    new_BL = jnp.where(how_BL < hidden, mask_id, new_BL)
    return jnp.where(where_BL, new_BL, text_BL), where_BL
