"""MaMMUT's image-text model (Kuo et al. 2023, arXiv:2303.16839): one text decoder, run in two ways.

For the contrast it sees both ways and no image; for captions it is causal and every block attends to the image's
tokens. Both runs share embedding, self-attention and MLPs; the cross-attentions serve captions alone. Here every block
has a cross-attention, and a text's embedding is the mean over its real tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key, Num

from vlp.core import check
from vlp.core.mesh import logical
from vlp.models import heads as parts
from vlp.models.layers import Norm, Stack, fold
from vlp.models.text import attention_mask
from vlp.models.vit import ViT
from vlp.ops.params import rows, spread


class Decoder(nn.Module):
    """The text decoder: `words` embeds, a call runs the blocks, with or without an image. `mlp` 0 means 4 · width."""

    vocab: int
    width: int
    depth: int
    heads: int
    mlp: int = 0
    pad_id: int = 0
    eos_id: int = 2
    activation: str = "gelu"
    dropout: float = 0.0
    drop_path: float = 0.0
    dtype: str = "float32"
    remat: str = "none"
    scan: bool = True

    def setup(self) -> None:
        init = logical(nn.initializers.normal(0.02), "vocab", "embed")
        self.embedding = self.param("embedding", init, (self.vocab, self.width))
        self.stack = Stack(
            self.depth, self.width, self.heads, self.mlp or 4 * self.width, self.activation, self.dropout,
            self.drop_path, self.dtype, self.remat, self.scan, name="encoder",
        )  # fmt: skip
        self.norm = Norm(self.dtype)

    @nn.compact
    def words(self, text: Int[Array, "B L"]) -> Float[Array, "B L D"]:
        """Token and position embeddings; zero where there is padding."""
        init = logical(nn.initializers.normal(0.01), "tokens", "embed")
        pos = self.param("pos", init, (text.shape[1], self.width))
        x: Any = rows(self.embedding, text, self.dtype)
        x += spread(pos, x.shape, x.dtype)
        return jnp.where((text != self.pad_id)[..., None], x, jnp.zeros((), x.dtype))

    def __call__(
        self,
        x: Float[Array, "B L D"],
        *,
        context: Float[Array, "B S C"] | None = None,
        mask: Bool[Array, "B L L"] | None = None,
        keys: Key[Array, "B"] | None = None,
    ) -> Float[Array, "B L D"]:
        """The blocks and the final norm; causal and with cross-attention if there is an image to attend to."""
        causal = context is not None
        x, _ = self.stack(x, context=context, mask=mask, keys=fold(keys, 1), causal=causal)
        return self.norm(x)


class Mammut(nn.Module):
    """Answers image, text, decode, head and scale_bias. embed: size of the joint space."""

    image_tower: ViT
    text_tower: Decoder
    embed: int
    scale: float = 1 / 0.07
    bias: float | None = None
    heads: Mapping[str, parts.HeadSpec] | None = None

    groups: ClassVar[
        dict[str, str]
    ] = {  # lines of the parameter table: full-match patterns of leaf names
        "image": "image_tower/.*",
        "decoder": "(text_tower|unembedding).*",
        "projections and heads": ".*",
    }

    def setup(self) -> None:
        if self.image_tower.pool == "none":
            where, do = "config.model.image_tower.pool", "use 'mean' or 'cls'"
            raise check.error(where, "'none'", "a pooled image for the contrastive embedding", do)
        self.joint_image = parts.Joint(self.embed)
        self.joint_text = parts.Joint(self.embed)
        self.temperature = parts.ScaleBias(self.scale, self.bias)
        width = self.text_tower.width
        init = logical(nn.initializers.normal(width**-0.5), "embed", "vocab")
        self.unembedding = self.param("unembedding", init, (width, self.text_tower.vocab))
        self.extra_heads = {name: parts.Head(spec) for name, spec in (self.heads or {}).items()}

    def __call__(self, image: Array, text: Array) -> None:
        """Touches every parameter (initialisation): the captioning run first, which has them all."""
        feats = self.image(image)["feats"]
        self.decode(self.text_tower.words(text), feats)
        self.text(text)
        self.scale_bias()
        for name, spec in (self.heads or {}).items():
            self.head(name, jnp.zeros((1, spec.width_in)))

    def image(
        self,
        image: Num[Array, "B R R 3"],
        *,
        keep_ratio: float = 1.0,
        keys: Key[Array, "B"] | None = None,
        kept: Int[Array, "B M"] | None = None,
        layers: bool = False,
    ) -> dict[str, Any]:
        """What ViT returns, and feats (its tokens) for `decode`, and embed: unit vectors [B E]."""
        out = self.image_tower(image, keep_ratio=keep_ratio, keys=keys, kept=kept, layers=layers)
        return out | {"feats": out["tokens"], "embed": self.joint_image(out["pooled"])}

    def text(
        self, text: Int[Array, "B L"], *, keys: Key[Array, "B"] | None = None
    ) -> dict[str, Any]:
        """The run that sees both ways: embed, unit vectors [B E], pooled [B D], mask bool[B L].

        tokens [B L D] are the words' embeddings, no block's output: what `decode` reads must not know the future.
        """
        words = self.text_tower.words(text)
        mask_BL = text != self.text_tower.pad_id
        both = attention_mask(mask_BL, causal=False, cls=False)
        x = self.text_tower(words, mask=both, keys=keys)
        count_B1 = jnp.maximum(mask_BL.sum(axis=1, keepdims=True), 1)
        pooled = ((x * mask_BL[..., None]).sum(axis=1) / count_B1).astype(x.dtype)
        return {
            "tokens": words,
            "pooled": pooled,
            "mask": mask_BL,
            "embed": self.joint_text(pooled),
        }

    def decode(
        self,
        tokens: Float[Array, "B L D"],
        feats: Float[Array, "B S C"],
        *,
        keys: Key[Array, "B"] | None = None,
    ) -> dict[str, Any]:
        """The captioning run: hidden [B L D] at each position, which has seen tokens 0..t, and unembed [D V]."""
        hidden = self.text_tower(tokens, context=feats, keys=keys)
        return {"hidden": hidden, "unembed": self.unembedding}

    def head(self, name: str, x: Float[Array, "*b D"], *, keys: Any = None) -> Float[Array, "*b E"]:
        return parts.find(self.extra_heads, name)(x)

    def scale_bias(self) -> tuple[Float[Array, ""], Float[Array, ""]]:
        """The logit scale exp(s), and the bias (0 if the model has none)."""
        return self.temperature()
