"""CoCa's image-text model (Yu et al. 2022, arXiv:2205.01917, §3.2).

An image encoder; a text decoder whose lower half is unimodal (causal, a learned CLS at the end: the text embedding)
and whose upper half is multimodal (causal self-attention and cross-attention to the image); attentional poolers
between encoder and decoder.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key, Num

from vlp.core import check
from vlp.core.mesh import logical
from vlp.models import heads as parts
from vlp.models.layers import Norm, Stack, fold, rematerialised
from vlp.models.text import Text
from vlp.models.vit import ViT


@dataclasses.dataclass(frozen=True)
class Multimodal:
    """The upper half of the text decoder; its width, heads and compute are the lower half's."""

    depth: int
    tied: bool = (
        False  # output embedding = token embedding; the paper's base and large count them apart
    )
    dropout: float | None = None  # None: as the lower half
    mlp: int = 0  # 0: as the lower half


class Captioner(nn.Module):
    """Answers image, text, decode, head and scale_bias.

    queries: learned queries of the captioning pooler (0: the decoder reads the encoder's tokens themselves).
    cascade: the contrastive pooler (one query) reads what the captioning pooler gives (the paper's default), or
    False: the encoder's tokens, in parallel. contrastive False leaves out what only the embeddings need.
    """

    image_tower: ViT
    text_tower: Text
    multimodal: Multimodal
    embed: int = 512
    queries: int = 256
    pool_heads: int = 0  # 0: as the text tower
    cascade: bool = True
    contrastive: bool = True
    scale: float = 1 / 0.07
    bias: float | None = None
    heads: Mapping[str, parts.HeadSpec] | None = None

    groups: ClassVar[
        dict[str, str]
    ] = {  # lines of the parameter table: full-match patterns of leaf names
        "image": "image_tower/.*",
        "decoder": "(text_tower|decoder|decoder_norm|unembedding).*",
        "poolers, projections and heads": ".*",
    }

    def setup(self) -> None:
        text, upper = self.text_tower, self.multimodal
        if self.contrastive and text.pool == "none":
            expected = "a pooled text for the contrastive embedding"
            raise check.error("config.model.text_tower.pool", "'none'", expected, "use 'cls'")
        if not text.causal:
            expected = "a causal text tower under the decoder"
            raise check.error("config.model.text_tower.causal", False, expected, "set it to True")
        heads = self.pool_heads or text.heads
        pool = rematerialised(parts.AttentionPool, self.image_tower.remat)
        if self.queries:
            self.pool_caption = pool(self.queries, text.width, heads, text.dtype)
        if self.contrastive:
            self.pool_contrast = pool(1, text.width, heads, text.dtype)
            self.joint_image = parts.Joint(self.embed)
            self.joint_text = parts.Joint(self.embed)
            self.temperature = parts.ScaleBias(self.scale, self.bias)
        dropout = text.dropout if upper.dropout is None else upper.dropout
        self.decoder = Stack(
            upper.depth, text.width, text.heads, upper.mlp or text.mlp or 4 * text.width,
            text.activation, dropout, text.drop_path, text.dtype, text.remat, text.scan,
        )  # fmt: skip
        self.decoder_norm = Norm(text.dtype)
        if not upper.tied:
            init = logical(nn.initializers.normal(text.width**-0.5), "embed", "vocab")
            self.unembedding = self.param("unembedding", init, (text.width, text.vocab))
        self.extra_heads = {name: parts.Head(spec) for name, spec in (self.heads or {}).items()}

    def __call__(self, image: Array, text: Array) -> None:
        """Touches every parameter (initialisation)."""
        feats = self.image(image)["feats"]
        self.decode(self.text(text)["tokens"], feats)
        if self.contrastive:
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
        """What ViT returns, and feats [B Q D] for `decode`, and embed: unit vectors [B E] (if contrastive)."""
        out = self.image_tower(image, keep_ratio=keep_ratio, keys=keys, kept=kept, layers=layers)
        feats = self.pool_caption(out["tokens"]) if self.queries else out["tokens"]
        out = out | {"feats": feats}
        if self.contrastive:
            pooled = self.pool_contrast(feats if self.cascade else out["tokens"])[:, 0]
            out |= {"pooled": pooled, "embed": self.joint_image(pooled)}
        return out

    def text(
        self, text: Int[Array, "B L"], *, keys: Key[Array, "B"] | None = None, layers: bool = False
    ) -> dict[str, Any]:
        """What Text returns (tokens: the input of `decode`), and embed: unit vectors [B E] (if contrastive)."""
        out = self.text_tower(text, keys=keys, layers=layers)
        return out | ({"embed": self.joint_text(out["pooled"])} if self.contrastive else {})

    def decode(
        self,
        tokens: Float[Array, "B L D"],
        feats: Float[Array, "B S C"],
        *,
        keys: Key[Array, "B"] | None = None,
    ) -> dict[str, Any]:
        """Multimodal half: hidden [B L D] at each position, and unembed [D V]; logits = hidden · unembed.

        Causal: position t has seen tokens 0..t, and predicts token t+1. The logits are left to the loss, which
        need not hold them all at once.
        """
        x, _ = self.decoder(tokens, context=feats, keys=fold(keys, 1), causal=True)
        unembed = self.text_tower.embedding.T if self.multimodal.tied else self.unembedding
        return {"hidden": self.decoder_norm(x), "unembed": unembed}

    def head(self, name: str, x: Float[Array, "*b D"], *, keys: Any = None) -> Float[Array, "*b E"]:
        return parts.find(self.extra_heads, name)(x)

    def scale_bias(self) -> tuple[Float[Array, ""], Float[Array, ""]]:
        """The logit scale exp(s), and the bias (0 if the model has none)."""
        return self.temperature()
