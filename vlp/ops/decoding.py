"""Greedy decoding of captions: with any function that gives the next token's logits, and with a model."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from vlp.core.types import Apply


def greedy(
    next_logits: Callable[[Int[Array, "B L"], Int[Array, ""]], Float[Array, "B V"]],
    batch: int,
    length: int,
    *,
    vocab_size: int,
    pad_id: int = 0,
    bos_id: int = 1,
    eos_id: int = 2,
    unk_id: int = 3,
) -> Int[Array, "B L"]:
    """Takes the likeliest token at each position until every row has ended or is full.

    Args:
        next_logits: (tokens, t) → logits of token t + 1 given tokens 0..t; tokens after t are padding.
        batch, length: rows, and tokens of each.
        vocab_size: the tokenizer's. Ids from it on, which a model may have, are never chosen.
        pad_id, bos_id, eos_id, unk_id: of the special tokens. PAD, BOS and UNK are never chosen.

    Returns:
        Rows that begin with BOS, with padding after their EOS.
    """
    tokens = jnp.full((batch, length), pad_id, jnp.int32).at[:, 0].set(bos_id)

    def more(carry: tuple[Array, Array, Array]) -> Array:
        _, t, done_B = carry
        return (t < length - 1) & ~done_B.all()

    def step(carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        tokens_BL, t, done_B = carry
        logits_BV = next_logits(tokens_BL, t)
        ids_V = jnp.arange(logits_BV.shape[-1])
        never_V = (ids_V >= vocab_size) | jnp.isin(ids_V, jnp.array([pad_id, bos_id, unk_id]))
        logits_BV = jnp.where(never_V, -jnp.inf, logits_BV)
        best_B = jnp.where(done_B, pad_id, logits_BV.argmax(axis=-1).astype(jnp.int32))
        return tokens_BL.at[:, t + 1].set(best_B), t + 1, done_B | (best_B == eos_id)

    done_B = jnp.zeros((batch,), bool)
    return jax.lax.while_loop(more, step, (tokens, jnp.int32(0), done_B))[0]


def captions(
    apply: Apply, image: jax.Array, *, length: int, vocab_size: int, **ids: int
) -> jax.Array:
    """Greedy captions of images, i32[B length]. Each image is encoded once.

    Args:
        apply: a model with `image`, `text` and `decode`.
        image: u8, or float in [0, 1], [B R R 3].
        length: tokens of a caption, BOS and EOS among them.
        vocab_size: the tokenizer's.
        ids: those of special tokens, as of `greedy`.
    """
    feats = apply("image", image)["feats"]

    def next_logits(tokens_BL: jax.Array, t: jax.Array) -> jax.Array:
        out = apply("decode", apply("text", tokens_BL)["tokens"], feats)
        return jnp.take(out["hidden"], t, axis=1).astype(jnp.float32) @ out["unembed"]

    return greedy(next_logits, image.shape[0], length, vocab_size=vocab_size, **ids)
