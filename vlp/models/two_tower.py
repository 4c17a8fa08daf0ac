"""The two-tower model: an image tower, a text tower, and optional parts on top of them.

A dual encoder (CLIP, Radford et al. 2021, arXiv:2103.00020) has a joint space. CoCa (Yu et al. 2022, arXiv:2205.01917,
§3.2) adds attentional poolers and a decoder above the text tower. MaMMUT (Kuo et al. 2023, arXiv:2303.16839) runs the
text tower a second time as the decoder.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import flax.linen as nn
from jaxtyping import Array, Float, Int, Key, Num

from vlp.core import check
from vlp.core.config import named
from vlp.core.mesh import logical
from vlp.models import heads as parts
from vlp.models.layers import BlockConfig, Norm, Stack, fold, rematerialised
from vlp.models.towers import TOWERS


@dataclasses.dataclass(frozen=True)
class Decoder:
    """Predicts the caption's next token from the tokens before it and the image.

    depth: blocks above the text tower, with causal self-attention and cross-attention to the image (CoCa). None: the
    text tower itself runs again, causal and with cross-attention in every block (MaMMUT; in the paper only some blocks
    have one). tied: the output embedding is the token embedding (CoCa's base and large count them apart). dropout, mlp:
    of the blocks above; None and 0: the text tower's. norm_image: each of them normalises the image's tokens.
    mlp_self: each has an MLP after its self-attention too (both: OpenCLIP's CoCa). Width, heads and compute are always
    the text tower's.
    """

    depth: int | None = None
    tied: bool = False
    dropout: float | None = None
    mlp: int = 0
    norm_image: bool = False
    mlp_self: bool = False


@dataclasses.dataclass(frozen=True)
class Poolers:
    """CoCa's attentional poolers of the image's tokens, with the text tower's width.

    queries: learned queries of the captioning pooler, whose output the decoder reads (0: the decoder reads the image
    tower's tokens). heads: of the attention; None: the text tower's. cascade: the contrastive pooler (one query) reads
    the captioning pooler's output (the paper's default); False: the image tower's tokens. shared: one pooler of
    1 + queries queries; the first is the contrastive one (OpenCLIP's CoCa, which has `cascade` False).
    """

    queries: int = 256
    heads: int | None = None
    cascade: bool = True
    shared: bool = False


class TwoTower(nn.Module):
    """Two-tower model with methods `image`, `text`, `head`; `scale_bias` with a joint space; `decode` with a decoder.

    embed: width of the joint space; 0: none. scale, bias: initial logit scale and logit bias (None: no bias).
    project_image False and text_bias True give SigLIP's model: no projection of the image, a bias in the text's.
    Without `poolers`, the image's embedding is a projection of the image tower's pooled output.
    heads: {name: specification}, from the objective.
    """

    image_tower: Any = named(TOWERS, "vit", kind="image")
    text_tower: Any = named(TOWERS, "transformer", kind="text")
    embed: int = 0
    scale: float = 1 / 0.07
    bias: float | None = None
    project_image: bool = True
    text_bias: bool = False
    decoder: Decoder | None = None
    poolers: Poolers | None = None
    heads: Mapping[str, Any] | None = None

    # what to do where a caller asks for something that this model does not return
    MADE_BY: ClassVar[dict[str, str]] = {
        "feats": "give the model a decoder: config.model.decoder=dict(depth=6)",
        "embed": "give the model a joint space: config.model.embed=512",
    }

    @property
    def groups(self) -> dict[str, str]:
        """Lines of the parameter table: full-match patterns of leaf names. The first that matches counts."""
        text = "text" if self.decoder is None else "decoder"
        rest = "poolers, projections and heads" if self.poolers else "projections and heads"
        decoder = "(text_tower|decoder|decoder_norm|unembedding).*"
        return {"image": "image_tower/.*", text: decoder, rest: ".*"}

    def setup(self) -> None:
        text = self.text_tower
        eps = getattr(text, "eps", Norm.eps)
        self._check()
        if self.poolers:
            remat = getattr(self.image_tower, "remat", "none")
            pool = rematerialised(parts.AttentionPool, remat)
            size = text.width, self.poolers.heads or text.heads, text.dtype, eps
            if self.poolers.shared:
                self.pool_shared = pool(1 + self.poolers.queries, *size)
            if self.poolers.queries and not self.poolers.shared:
                self.pool_caption = pool(self.poolers.queries, *size)
            if self.embed and not self.poolers.shared:
                self.pool_contrast = pool(1, *size)
        if self.embed:
            self.joint_image = parts.Joint(self.embed, project=self.project_image)
            self.joint_text = parts.Joint(self.embed, bias=self.text_bias)
            self.temperature = parts.ScaleBias(self.scale, self.bias)
        if self.decoder:
            if self.decoder.depth is not None:
                self.upper = self._upper(self.decoder.depth, self.decoder)
                self.decoder_norm = Norm(text.dtype, eps)

    def image(
        self,
        image: Num[Array, "B R R 3"],
        *,
        keep_ratio: float = 1.0,
        keys: Key[Array, "B"] | None = None,
        kept: Int[Array, "B M"] | None = None,
        layers: bool = False,
        frames: int = 1,
    ) -> dict[str, Any]:
        """Encodes images; arguments as of the image tower.

        frames: that many rows in turn are one clip: the poolers read the tokens of all, and `pooled` of a tower of its
        own is their mean. What is returned is then of clips.

        Returns:
            What the image tower returns. With a joint space also embed [B E]: unit vectors; with a decoder also
            feats [B S C]: what `decode` reads. With poolers `pooled` is what the contrastive pooler returns.
        """
        out = self.image_tower(image, keep_ratio=keep_ratio, keys=keys, kept=kept, layers=layers)
        out = out if frames == 1 else _clips(out, frames)
        feats = out["tokens"]
        if self.poolers and self.poolers.shared:
            pooled = self.pool_shared(feats)
            out |= {"pooled": pooled[:, 0]}
            feats = pooled[:, 1:] if self.poolers.queries else feats
        elif self.poolers and self.poolers.queries:
            feats = self.pool_caption(feats)
        if self.decoder:
            out |= {"feats": feats}
        if self.embed and self.poolers and not self.poolers.shared:
            read = feats if self.poolers.cascade else out["tokens"]
            out |= {"pooled": self.pool_contrast(read)[:, 0]}
        return out | ({"embed": self.joint_image(out["pooled"])} if self.embed else {})

    def text(
        self, text: Int[Array, "B L"], *, keys: Key[Array, "B"] | None = None, layers: bool = False
    ) -> dict[str, Any]:
        """Encodes texts; arguments as of the text tower.

        Returns:
            What the text tower returns; `tokens` are the input of `decode`. With a joint space also embed [B E]: unit
            vectors. Where the text tower is the decoder too, `tokens` are the words' embeddings and no block's output:
            what `decode` reads must not know the future.
        """
        out = self.text_tower(text, keys=keys, layers=layers)
        if self.decoder and self.decoder.depth is None:
            out |= {"tokens": out["words"]}
        return out | ({"embed": self.joint_text(out["pooled"])} if self.embed else {})

    def decode(
        self,
        tokens: Float[Array, "B L D"],
        feats: Float[Array, "B S C"],
        *,
        keys: Key[Array, "B"] | None = None,
    ) -> dict[str, Any]:
        """Reads a caption and its image: position t sees tokens 0..t and the image, and predicts token t + 1.

        Args:
            tokens: as `text` returns them.
            feats: as `image` returns them.
            keys: one key per example for dropout; None: deterministic.

        Returns:
            hidden [B L D] and unembed [D V]; the logits are hidden · unembed. Their product is left to the loss, which
            need not hold all logits at once.
        """
        if self.decoder is None:
            do = "add the section, for instance decoder=dict(depth=6)"
            raise check.error("config.model.decoder", "none", "a decoder, to caption", do)
        if self.decoder.depth is None:
            hidden = self.text_tower.decode(tokens, feats, keys=keys)
        else:
            x, _ = self.upper(tokens, context=feats, keys=fold(keys, 1), causal=True)
            hidden = self.decoder_norm(x)
        return {"hidden": hidden, "unembed": self._unembed(self.decoder)}

    def head(self, name: str, *x: Array, **kwargs: Any) -> Any:
        """The result of one of the objective's heads (`models.heads`)."""
        return parts.call(self, name, *x, **kwargs)

    def scale_bias(self) -> tuple[Float[Array, ""], Float[Array, ""] | None]:
        """The logit scale exp(s), and the logit bias (None if the model has none)."""
        if not self.embed:
            do = "set it to the size of the joint space"
            raise check.error("config.model.embed", 0, "a joint space, for its logit scale", do)
        return self.temperature()

    @nn.compact
    def _unembed(self, decoder: Decoder) -> Any:
        """The output embedding [D V]."""
        text = self.text_tower
        if decoder.tied:
            return text.embedding.T
        init = logical(nn.initializers.normal(text.width**-0.5), "embed", "vocab")
        return self.param("unembedding", init, (text.width, text.vocab))

    def _upper(self, depth: int, decoder: Decoder) -> Stack:
        """The decoder's own blocks."""
        text = self.text_tower
        dropout = text.dropout if decoder.dropout is None else decoder.dropout
        mlps = dict(mlp=decoder.mlp or text.mlp, mlp_self=decoder.mlp_self)
        config = BlockConfig.of(text, dropout=dropout, norm_context=decoder.norm_image, **mlps)
        return Stack(depth, config, name="decoder")

    def _check(self) -> None:
        """Raises UserError for parts that do not fit together."""
        image, text = self.image_tower, self.text_tower
        pools = {"text": text} | ({} if self.poolers else {"image": image})
        for what, tower in pools.items():
            if self.embed and getattr(tower, "pool", "") == "none":
                where, expected = f"config.model.{what}_tower.pool", f"a pooled {what} to embed"
                raise check.error(where, "'none'", expected, "use 'cls' or 'mean'")
        if self.poolers and self.poolers.shared and self.poolers.cascade:
            do = "set cascade=False"
            raise check.error("config.model.poolers", "shared and cascade", "one of them", do)
        if self.decoder is None:
            return
        if self.decoder.depth is not None and not getattr(text, "causal", True):
            expected = "a causal text tower under the decoder"
            raise check.error("config.model.text_tower.causal", False, expected, "set it to True")
        if self.decoder.depth is None and not hasattr(text, "decode"):
            got = f"a {type(text).__name__}, which has no method decode"
            do = "set config.model.decoder.depth"
            raise check.error("config.model.text_tower", got, "a tower that decodes", do)


def _clips(out: Mapping[str, Any], frames: int) -> dict[str, Any]:
    """The image tower's answer for clips: the tokens of all frames [B T·N D], and the mean of what is pooled."""
    tokens = out["tokens"]
    clips = {"tokens": tokens.reshape(-1, frames * tokens.shape[1], tokens.shape[2])}
    if (pooled := out["pooled"]) is not None:
        clips["pooled"] = pooled.reshape(-1, frames, pooled.shape[-1]).mean(axis=1)
    return clips
