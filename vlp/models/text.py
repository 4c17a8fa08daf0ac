"""Text tower: causal or bidirectional transformer with the poolings of the contrastive papers."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from vlp.core import check
from vlp.core.mesh import constrain, logical
from vlp.models.heads import MapPool
from vlp.models.layers import Norm, Stack, fold
from vlp.ops.params import rows, spread

POOLS = ("cls", "first", "eos", "last", "mean", "map", "none")


class Text(nn.Module):
    """Text tower (CoCa's unimodal decoder when causal with pool "cls"). `mlp` 0 means 4 · width.

    pool: "cls" appends a learned token behind the text, which sees every real token and is seen
    by none (CoCa, Yu et al. 2022, arXiv:2205.01917, §3.2); "eos" takes the first end-of-text token
    (CLIP); "first" the first token, for towers that see the future (BERT's [CLS]; FLIP, ALIGN);
    "last" the last position whatever it holds (SigLIP); "mean" averages the real tokens; "map" is
    attention pooling over them; "none" pools nothing. Padding is never looked at, and the number of
    pads changes nothing but for "last", which is defined by the padded length; with attend_padding a pad
    is a word like any other (the released FLIP and SigLIP towers have no mask).
    """

    vocab: int
    width: int
    depth: int
    heads: int
    mlp: int = 0
    causal: bool = True
    pool: str = "cls"
    pad_id: int = 0
    eos_id: int = 2
    attend_padding: bool = False
    activation: str = "gelu"
    dropout: float = 0.0
    drop_path: float = 0.0
    dtype: str = "float32"
    remat: str = "none"
    scan: bool = True

    def setup(self) -> None:
        if self.pool not in POOLS:
            raise check.unknown("model.text.pool", self.pool, POOLS)
        if self.pool == "first" and self.causal:
            got = "'first' in a causal tower, where the first token sees nothing else"
            raise check.error("model.text.pool", got, "'eos', or causal=False", "change one")
        init = nn.initializers.normal(0.02)
        self.embedding = self.param(
            "embedding", logical(init, "vocab", "embed"), (self.vocab, self.width)
        )
        if self.pool == "cls":
            self.cls = self.param("cls", logical(init, "embed"), (self.width,))
        mlp = self.mlp or 4 * self.width
        self.stack = Stack(
            self.depth, self.width, self.heads, mlp, self.activation, self.dropout,
            self.drop_path, self.dtype, self.remat, self.scan, name="encoder",
        )  # fmt: skip
        if self.pool != "none":
            self.norm = Norm(self.dtype)
        if self.pool == "map":
            self.pool_map = MapPool(self.heads, mlp, self.activation, self.dtype)

    @nn.compact
    def __call__(
        self, text: Int[Array, "B L"], *, keys: Key[Array, "B"] | None = None, layers: bool = False
    ) -> dict[str, Any]:
        """Returns tokens [B L D] (before the final norm), pooled [B D] or None, mask bool[B L] (True: a real token)."""
        length = text.shape[1]
        pos = self.param(
            "pos", logical(nn.initializers.normal(0.01), "tokens", "embed"), (length, self.width)
        )
        mask_BL = text != self.pad_id
        seen_BL = jnp.ones_like(mask_BL) if self.attend_padding else mask_BL
        x: Any = rows(self.embedding, text, self.dtype)
        x += spread(pos, x.shape, x.dtype)
        x = jnp.where(
            seen_BL[..., None], x, jnp.zeros((), x.dtype)
        )  # what the PAD row holds cannot leak
        if self.pool == "cls":
            cls = spread(self.cls, (x.shape[0], 1, self.width), x.dtype)
            x = jnp.concatenate([x, cls], axis=1)
        x = constrain(x, "batch", None, None)
        mask_BTS = attention_mask(seen_BL, causal=self.causal, cls=self.pool == "cls")
        x, collected = self.stack(x, mask=mask_BTS, keys=fold(keys, 1), collect=layers)
        pooled = None if self.pool == "none" else self._pool(x, text, seen_BL)
        out = {"tokens": x[:, :length], "pooled": pooled, "mask": mask_BL}
        return out | ({"layers": collected} if layers else {})

    def _pool(
        self, x: Array, text: Int[Array, "B L"], seen_BL: Bool[Array, "B L"]
    ) -> Float[Array, "B D"]:
        if self.pool == "map":
            return self.pool_map(self.norm(x), seen_BL)
        if self.pool in ("cls", "last"):
            return self.norm(x[:, -1])
        if self.pool == "first":
            return self.norm(x[:, 0])
        if self.pool == "eos":
            ids_B = jnp.argmax(text == self.eos_id, axis=1)
            return self.norm(jnp.take_along_axis(x, ids_B[:, None, None], axis=1)[:, 0])
        count_B1 = jnp.maximum(seen_BL.sum(axis=1, keepdims=True), 1)
        mean_BD = (x * seen_BL[..., None]).sum(axis=1) / count_B1
        return self.norm(mean_BD.astype(x.dtype))


def attention_mask(mask_BL: Bool[Array, "B L"], *, causal: bool, cls: bool) -> Bool[Array, "B T T"]:
    """Who sees whom: real tokens (before them, if causal), everyone itself; a CLS at the end sees all real tokens.

    A row that sees nothing else still sees itself, so that no softmax is empty.
    """
    length = mask_BL.shape[1] + int(cls)
    keys_BT = jnp.pad(mask_BL, ((0, 0), (0, int(cls))))  # nobody else sees the CLS
    seen_TT = (
        jnp.tril(jnp.ones((length, length), bool)) if causal else jnp.ones((length, length), bool)
    )
    return (keys_BT[:, None, :] & seen_TT[None]) | jnp.eye(length, dtype=bool)[None]
