"""Text tower: a causal or bidirectional transformer with the poolings of the contrastive papers."""

from __future__ import annotations

from typing import Any, ClassVar

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from vlp.core import check
from vlp.core.mesh import constrain, logical
from vlp.models.heads import MapPool
from vlp.models.layers import BlockConfig, Norm, Stack, fold
from vlp.ops.params import rows, spread

CLS_MASKS = ("real", "shifted")
POOLS = ("cls", "first", "eos", "last", "mean", "norm_mean", "map", "none")


class Text(nn.Module):
    """Transformer over tokens. An `mlp` of 0 means 4 · width.

    pool: how a text becomes one vector.
        "cls": a learned token behind the text, which sees every real token and is seen by none (CoCa, Yu et al. 2022,
            arXiv:2205.01917, §3.2).
        "eos": the first end-of-text token (CLIP).
        "first": the first token, for bidirectional towers (BERT's [CLS]; FLIP, ALIGN).
        "last": the last position, even if it is padding (SigLIP).
        "mean": the mean of the real tokens, then the final norm. "norm_mean": the norm first (MaMMUT).
        "map": attention pooling over the real tokens.
        "none": no vector.
    attend_padding: treats a pad as a word like any other (the released FLIP and SigLIP towers have no mask). Otherwise
    no token attends to padding, and the number of pads changes only the result of "last".
    cls_mask: what the CLS sees: "real", as above, or "shifted": OpenCLIP's CoCa, whose mask is one position late. It
    sees the first pad too, as a word, and sees itself only if there is no pad. cls_pos: the CLS has a learned position
    (OpenCLIP's CoCa). eps: of the norms.
    """

    kind: ClassVar[str] = "text"

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
    cls_mask: str = "real"
    cls_pos: bool = False
    eps: float = 1e-6
    activation: str = "gelu"
    dropout: float = 0.0
    drop_path: float = 0.0
    dtype: str = "float32"
    remat: str = "none"
    scan: bool = True

    def setup(self) -> None:
        if self.pool not in POOLS:
            raise check.unknown("model.text.pool", self.pool, POOLS)
        if self.cls_mask not in CLS_MASKS:
            raise check.unknown("model.text.cls_mask", self.cls_mask, CLS_MASKS)
        if self.cls_mask == "shifted" and (self.pool != "cls" or not self.causal):
            got, expected = f"'shifted' with pool={self.pool!r}", "a causal tower with pool='cls'"
            raise check.error("model.text.cls_mask", got, expected, "set it to 'real'")
        if self.pool == "first" and self.causal:
            got = "'first' in a causal tower, where the first token sees nothing else"
            do = "set causal=False, or pool='eos'"
            raise check.error("model.text.pool", got, "'eos', or causal=False", do)
        init = nn.initializers.normal(0.02)
        self.embedding = self.param(
            "embedding", logical(init, "vocab", "embed"), (self.vocab, self.width)
        )
        if self.pool == "cls":
            self.cls = self.param("cls", logical(init, "embed"), (self.width,))
            if self.cls_pos:
                self.cls_place = self.param("cls_pos", logical(init, "embed"), (self.width,))
        config = BlockConfig.of(self)
        self.stack = Stack(self.depth, config, name="encoder")
        self.norm = Norm(self.dtype, self.eps)
        self.pool_map = MapPool(self.heads, config.mlp, self.activation, self.dtype, self.eps)

    def __call__(
        self, text: Int[Array, "B L"], *, keys: Key[Array, "B"] | None = None, layers: bool = False
    ) -> dict[str, Any]:
        """Encodes texts.

        Args:
            text: token ids.
            keys: one key per example for dropout; None: deterministic.
            layers: also return every block's output.

        Returns:
            words [B L D]: the input of the blocks. tokens [B L D]: their output, before the final norm. pooled [B D]
            or None. mask bool[B L]: True for a real token. layers [depth B T D] on request.
        """
        length = text.shape[1]
        mask_BL = text != self.pad_id
        shifted = self.cls_mask == "shifted"
        seen_BL = jnp.ones_like(mask_BL) if self.attend_padding else mask_BL
        words_BLD = x = self._words(text, jnp.ones_like(mask_BL) if shifted else seen_BL)
        if self.pool == "cls":
            cls = self.cls + self.cls_place if self.cls_pos else self.cls
            cls = spread(cls, (x.shape[0], 1, self.width), x.dtype)
            x = jnp.concatenate([x, cls], axis=1)
        x = constrain(x, "batch", None, None)
        if shifted:
            mask_BTS = shifted_mask(seen_BL)
        else:
            mask_BTS = attention_mask(seen_BL, causal=self.causal, cls=self.pool == "cls")
        x, collected = self.stack(x, mask=mask_BTS, keys=fold(keys, 1), collect=layers)
        pooled = None if self.pool == "none" else self._pool(x, text, seen_BL)
        out = {"words": words_BLD, "tokens": x[:, :length], "pooled": pooled, "mask": mask_BL}
        return out | ({"layers": collected} if layers else {})

    def decode(
        self,
        words: Float[Array, "B L D"],
        feats: Float[Array, "B S C"],
        *,
        keys: Key[Array, "B"] | None = None,
    ) -> Float[Array, "B L D"]:
        """Runs the blocks again, causal, each with cross-attention to an image's `feats`; then the final norm."""
        x, _ = self.stack(words, context=feats, keys=fold(keys, 1), causal=True)
        return self.norm(x)

    @nn.compact
    def _words(self, text: Int[Array, "B L"], seen_BL: Bool[Array, "B L"]) -> Float[Array, "B L D"]:
        """Token and position embeddings. Zero for a pad, so that its row of the table cannot matter."""
        init = logical(nn.initializers.normal(0.01), "tokens", "embed")
        pos = self.param("pos", init, (text.shape[1], self.width))
        x: Any = rows(self.embedding, text, self.dtype)
        x += spread(pos, x.shape, x.dtype)
        return jnp.where(seen_BL[..., None], x, jnp.zeros((), x.dtype))

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
        if self.pool == "norm_mean":
            return mean(self.norm(x), seen_BL)
        return self.norm(mean(x, seen_BL))


def mean(x_BLD: Float[Array, "B L D"], seen_BL: Bool[Array, "B L"]) -> Float[Array, "B D"]:
    """Mean over the real tokens (0 without any)."""
    count_B1 = jnp.maximum(seen_BL.sum(axis=1, keepdims=True), 1)
    return ((x_BLD * seen_BL[..., None]).sum(axis=1) / count_B1).astype(x_BLD.dtype)


def attention_mask(mask_BL: Bool[Array, "B L"], *, causal: bool, cls: bool) -> Bool[Array, "B T T"]:
    """Attention mask: [b, t, s] is True if token t attends to token s.

    Every token attends to itself, so that no softmax is empty, and to the real tokens (if causal, only to earlier
    ones). A CLS at the end attends to all real tokens, and no other token attends to it.
    """
    length = mask_BL.shape[1] + int(cls)
    keys_BT = jnp.pad(mask_BL, ((0, 0), (0, int(cls))))  # no other token attends to the CLS
    seen_TT = (
        jnp.tril(jnp.ones((length, length), bool)) if causal else jnp.ones((length, length), bool)
    )
    return (keys_BT[:, None, :] & seen_TT[None]) | jnp.eye(length, dtype=bool)[None]


def shifted_mask(mask_BL: Bool[Array, "B L"]) -> Bool[Array, "B T T"]:
    """Attention mask of OpenCLIP's CoCa, T = L + 1: causal, and key s is seen if token s − 1 is real (key 0 always).

    Source: open_clip, `TextTransformer._build_additive_mask` without `correct_cls_mask`, as its weights were trained.
    """
    keys_BT = jnp.pad(mask_BL, ((0, 0), (1, 0)), constant_values=True)
    length = keys_BT.shape[1]
    return keys_BT[:, None, :] & jnp.tril(jnp.ones((length, length), bool))[None]
