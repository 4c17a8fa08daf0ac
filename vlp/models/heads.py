"""Parts that sit on top of towers: joint projection, logit scale and bias, attention pooling, extra heads."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.core import FrozenDict
from jaxtyping import Array, Bool, Float, Key, Num

from vlp.core import check
from vlp.core.config import build_named
from vlp.core.mesh import logical
from vlp.models.layers import (
    ACTIVATIONS,
    Attention,
    BatchNorm,
    BlockConfig,
    Linear,
    Mlp,
    Norm,
    Stack,
)


class Joint(nn.Module):
    """Projects to the joint space and normalises to unit length, in float32 (epsilon 1e-8, FLIP).

    project False: only normalises (SigLIP's image side); x must then have the joint space's width.
    """

    embed: int
    bias: bool = False
    project: bool = True

    @nn.compact
    def __call__(self, x: Float[Array, "B D"]) -> Float[Array, "B E"]:
        width, names = x.shape[-1], ("embed", "joint")
        dtype = jnp.promote_types(x.dtype, jnp.float32).name
        if self.project:
            y = Linear((width,), (self.embed,), names, bias=self.bias, dtype=dtype, name="proj")(x)
        elif width == self.embed:
            y = x.astype(dtype)
        else:
            do = "make them equal or set config.model.project_image"
            raise check.error("config.model.embed", self.embed, f"the tower's width {width}", do)
        return y * jax.lax.rsqrt(jnp.square(y).sum(-1, keepdims=True) + 1e-16)


class ScaleBias(nn.Module):
    """Learned logit scale, in log space, and bias (None: no parameter)."""

    scale: float = 1 / 0.07
    bias: float | None = None

    @nn.compact
    def __call__(self) -> tuple[Float[Array, ""], Float[Array, ""] | None]:
        scale = self.param("logit_scale", lambda _: jnp.log(jnp.float32(self.scale)))
        if self.bias is None:
            return jnp.exp(scale), None
        return jnp.exp(scale), self.param("logit_bias", lambda _: jnp.float32(self.bias))


class AttentionPool(nn.Module):
    """Attentional pooler: one attention layer of `queries` learned queries over the tokens (CoCa §3.2)."""

    queries: int
    width: int
    heads: int
    dtype: str = "float32"
    eps: float = 1e-6

    @nn.compact
    def __call__(self, x: Float[Array, "B N C"]) -> Float[Array, "B Q D"]:
        shape = (self.queries, self.width)
        query = self.param("query", logical(nn.initializers.normal(0.02), "tokens", "embed"), shape)
        query = Norm(self.dtype, self.eps, name="norm_query")(query.astype(self.dtype)[None])
        y = Attention(self.heads, self.width, self.dtype, name="attention")(query, x)
        return Norm(self.dtype, self.eps, name="norm")(y)


class MapPool(nn.Module):
    """Multihead attention pooling: one learned query, attention to the tokens, and a residual MLP.

    Source: Zhai et al. 2022 (arXiv:2106.04560, §3.1), as in SigLIP. `mask` bool[B N]: which tokens count.
    """

    heads: int
    mlp: int
    activation: str = "gelu"
    dtype: str = "float32"
    eps: float = 1e-6

    @nn.compact
    def __call__(
        self, x: Float[Array, "B N D"], mask: Bool[Array, "B N"] | None = None
    ) -> Float[Array, "B D"]:
        width = x.shape[-1]
        init = logical(nn.initializers.xavier_uniform(), None, "embed")
        query = self.param("query", init, (1, width)).astype(self.dtype)[None]
        mask_B1N = None if mask is None else mask[:, None]
        x = Attention(self.heads, width, self.dtype, name="attention")(query, x, mask_BTS=mask_B1N)
        y = Norm(self.dtype, self.eps, name="norm")(x)
        return (x + Mlp(self.mlp, self.activation, self.dtype, name="mlp")(y))[:, 0]


class MlpHead(nn.Module):
    """Linear maps with an activation between them: predictors, projectors, classifiers.

    width_out: of the result. hidden: width in between (0: the input's). depth: number of linear maps.
    """

    width_out: int
    hidden: int = 0
    depth: int = 2
    activation: str = "gelu"

    @nn.compact
    def __call__(
        self, x: Float[Array, "*b D"], *, keys: Key[Array, "B"] | None = None
    ) -> Float[Array, "*b E"]:
        hidden = self.hidden or x.shape[-1]
        widths = [hidden] * (self.depth - 1) + [self.width_out]
        for i, width in enumerate(widths):
            x = activation(self.activation)(x) if i else x
            x = Linear((x.shape[-1],), (width,), ("embed", "mlp"), name=f"layer{i}")(x)
        return x


class NormMlpHead(nn.Module):
    """Linear maps, each but the last followed by a norm and an activation (SimCLR's and SimSiam's projectors).

    width_out: of the result. hidden: width in between (0: the input's). depth: number of linear maps. norm: "batch",
    over all rows of the global batch, or "layer". norm_out: norm, without activation, after the last map.
    """

    width_out: int
    hidden: int = 0
    depth: int = 2
    activation: str = "relu"
    norm: str = "batch"
    norm_out: bool = False

    @nn.compact
    def __call__(
        self, x: Float[Array, "*b D"], *, keys: Key[Array, "B"] | None = None
    ) -> Float[Array, "*b E"]:
        if self.norm not in NORMS:
            raise check.unknown("objective: head norm", self.norm, NORMS)
        hidden = self.hidden or x.shape[-1]
        widths = [hidden] * (self.depth - 1) + [self.width_out]
        for i, width in enumerate(widths):
            last = i == self.depth - 1
            normed = not last or self.norm_out
            map_ = Linear((x.shape[-1],), (width,), ("embed", "mlp"), not normed, name=f"layer{i}")
            x = map_(x)
            if normed:
                x = self._norm(x, f"norm{i}", train=keys is not None)
            x = x if last else activation(self.activation)(x)
        return x

    def _norm(self, x: Array, name: str, train: bool) -> Array:
        if self.norm == "layer":
            return Norm(name=name)(x)
        return BatchNorm(name=name)(x, train=train)


class FusionHead(nn.Module):
    """Cross-attention encoder: text tokens that attend to each other and to an image's tokens (ALBEF, §3.1).

    depth: blocks of self-attention, cross-attention and MLP. heads: of the attention (None: width / 64, 1 at least).
    mlp: hidden width (0: 4 · width). remat, scan: as of a tower's blocks. The width is the text tokens'.
    """

    depth: int
    heads: int | None = None
    mlp: int = 0
    activation: str = "gelu"
    dropout: float = 0.0
    remat: str = "none"
    scan: bool = True

    @nn.compact
    def __call__(
        self,
        text: Float[Array, "B L D"],
        image: Float[Array, "B S C"],
        *,
        mask: Bool[Array, "B L"] | None = None,
        keys: Key[Array, "B"] | None = None,
    ) -> dict[str, Array]:
        """Fuses a text with an image.

        Args:
            text: tokens.
            image: tokens.
            mask: which text tokens are real; None: all.
            keys: one key per example for dropout; None: deterministic.

        Returns:
            tokens [B L D], and pooled [B D]: the first token's, the text's [CLS].
        """
        width, dtype = text.shape[-1], str(text.dtype)
        config = BlockConfig(
            width, self.heads or max(1, width // 64), self.mlp or 4 * width,
            activation=self.activation, dropout=self.dropout, dtype=dtype, remat=self.remat, scan=self.scan,
        )  # fmt: skip
        seen = None
        if mask is not None:  # a token sees itself, so that no softmax is empty
            seen = mask[:, None, :] | jnp.eye(text.shape[1], dtype=bool)[None]
        x, _ = Stack(self.depth, config, name="encoder")(text, context=image, mask=seen, keys=keys)
        x = Norm(dtype, name="norm")(x)
        return {"tokens": x, "pooled": x[:, 0]}


class WordsHead(nn.Module):
    """Vocabulary head: linear map, activation and norm, then the output embedding with a bias (BERT's MLM head).

    vocab: size of the vocabulary (None: the text tower's). tied: the output embedding is the text tower's own.
    """

    vocab: int | None = None
    tied: bool = True
    activation: str = "gelu"

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "*b L D"],
        *,
        embedding: Float[Array, "V W"],
        keys: Key[Array, "B"] | None = None,
    ) -> dict[str, Array]:
        """Returns what `losses.caption.nll` takes: hidden [… L W+1] and unembed [W+1 V]; logits = hidden · unembed.

        The last row of `unembed` is the bias, the last column of `hidden` is 1. embedding: the text tower's.
        """
        vocab, width = embedding.shape
        dtype = str(x.dtype)
        x = Linear((x.shape[-1],), (width,), ("embed", "mlp"), dtype=dtype, name="dense")(x)
        x = Norm(dtype, name="norm")(activation(self.activation)(x))
        unembed = jnp.asarray(embedding).T
        if not self.tied:
            vocab = self.vocab or vocab
            init = logical(nn.initializers.normal(width**-0.5), "embed", "vocab")
            unembed = self.param("unembedding", init, (width, vocab))
        bias = self.param("bias", logical(nn.initializers.zeros, "vocab"), (vocab,))
        ones = jnp.ones((*x.shape[:-1], 1), x.dtype)
        unembed = jnp.concatenate([unembed, bias[None].astype(unembed.dtype)])
        return {"hidden": jnp.concatenate([x, ones], axis=-1), "unembed": unembed}


class PrototypesHead(nn.Module):
    """MLP to a unit vector, then its cosines with `num` prototypes (DINO, Caron et al. 2021, arXiv:2104.14294, §A).

    The prototypes are kept at unit length: a weight-normalised last layer with the gain fixed at 1. hidden, depth:
    of the MLP (hidden 0: the input's width). bottleneck: width of the unit vector.
    """

    num: int
    hidden: int = 0
    bottleneck: int = 256
    depth: int = 3

    @nn.compact
    def __call__(
        self, x: Float[Array, "*b D"], *, keys: Key[Array, "B"] | None = None
    ) -> Float[Array, "*b K"]:
        x = MlpHead(self.bottleneck, self.hidden, self.depth, name="mlp")(x)
        init = logical(nn.initializers.normal(1.0), "embed", "vocab")
        prototypes_EK = jnp.asarray(self.param("prototypes", init, (self.bottleneck, self.num)))
        return unit(x.astype(jnp.float32), -1) @ unit(prototypes_EK, 0)


class RegionsHead(nn.Module):
    """Pools an image's patch tokens over regions, and projects them to `width_out` (0: no projection).

    A region is a box, whose weight on a patch is the share of the patch that it covers, or a mask with weights.
    """

    width_out: int = 0

    @nn.compact
    def __call__(
        self,
        tokens: Float[Array, "B N D"],
        regions: Num[Array, "B M W"],
        *,
        boxes: bool = True,
        keys: Key[Array, "B"] | None = None,
    ) -> Float[Array, "B M E"]:
        """Returns the regions' vectors; a region that covers nothing gives the mean of all tokens.

        Args:
            tokens: of the patches, row by row, without CLS: a square grid if the regions are boxes.
            regions: boxes (left, top, right, bottom) as shares of the sides [B M 4], or weights of patches [B M N].
            boxes: which of the two.
            keys: not used.
        """
        weight_BMN = covered(regions, tokens.shape[1]) if boxes else regions
        weight_BMN = weight_BMN.astype(jnp.float32)
        total_BM1 = weight_BMN.sum(-1, keepdims=True)
        uniform = 1 / tokens.shape[1]
        weight_BMN = jnp.where(
            total_BM1 > 0, weight_BMN / jnp.where(total_BM1 > 0, total_BM1, 1), uniform
        )
        x = jnp.einsum("bmn,bnd->bmd", weight_BMN, tokens.astype(jnp.float32))
        if not self.width_out:
            return x
        return Linear((x.shape[-1],), (self.width_out,), ("embed", "joint"), name="proj")(x)


class MixtureHead(nn.Module):
    """Attention pooling of an example's K tokens by a query (Llip, Lavoie et al. 2024, arXiv:2405.00740, §3).

    One attention layer: queries from the text, keys and values from the image's tokens. width_out: output width.
    heads: attention heads. scale: factor of the logits, in addition to 1/√(head size) (Llip's inverse temperature).
    """

    width_out: int
    heads: int = 1
    scale: float = 1.0

    @nn.compact
    def __call__(
        self,
        tokens: Float[Array, "B K D"],
        query: Float[Array, "#B Q C"],
        *,
        keys: Key[Array, "B"] | None = None,
    ) -> Float[Array, "B Q E"]:
        """Returns a vector for each example and query. A query [1 Q C] serves every example."""
        query = query * jnp.asarray(self.scale, query.dtype)
        return Attention(self.heads, self.width_out, str(tokens.dtype), name="attention")(
            query, tokens
        )


HEADS = {
    "fusion": FusionHead,
    "mixture": MixtureHead,
    "mlp": MlpHead,
    "norm_mlp": NormMlpHead,
    "prototypes": PrototypesHead,
    "regions": RegionsHead,
    "words": WordsHead,
}
NORMS = ("batch", "layer")


def build(
    heads: Mapping[str, Any], where: str = "objective.heads", table: Any = None
) -> FrozenDict:
    """The heads that an objective declares, as flax modules (unbound) that a model takes as its field `heads`.

    Args:
        heads: name → {"name": one of HEADS, …its fields}, or a flax module.
        where: for errors.
        table: heads by name; None: HEADS.

    Raises:
        UserError: an unknown head or field.
    """
    make = lambda name, spec: build_named(table or HEADS, spec, f"{where}.{name}")
    return FrozenDict(
        {
            name: spec if isinstance(spec, nn.Module) else make(name, spec)
            for name, spec in heads.items()
        }
    )


def call(model: Any, name: str, *x: Any, **kwargs: Any) -> Any:
    """The result of one of a model's heads; words heads are given the text tower's embedding.

    Raises UserError for a head that the model does not have.
    """
    heads = model.heads or {}
    if name not in heads:
        do = f"declare heads = {{{name!r}: {{'name': …}}}} in the objective"
        do = check.did_you_mean(name, heads, do)
        raise check.error("objective: head", repr(name), f"one of {sorted(heads)}", do)
    if isinstance(heads[name], WordsHead):
        kwargs["embedding"] = model.text_tower.embedding
    return heads[name](*x, **kwargs)


def covered(boxes: Num[Array, "B M 4"], num: int) -> Float[Array, "B M N"]:
    """The share of each of `num` square grid cells that each box (left, top, right, bottom in [0, 1]) covers."""
    side = round(num**0.5)
    if side * side != num:
        raise check.error(
            "head regions", f"{num} tokens", "a square grid of patches", "drop the CLS"
        )
    edges = jnp.arange(side)[None, None] / side

    def overlap(low: Array, high: Array) -> Array:
        inside = jnp.minimum(high[..., None], edges + 1 / side) - jnp.maximum(low[..., None], edges)
        return jnp.clip(inside, 0, None) * side

    left, top, right, bottom = jnp.moveaxis(boxes.astype(jnp.float32), -1, 0)
    share = overlap(top, bottom)[..., :, None] * overlap(left, right)[..., None, :]
    return share.reshape(*share.shape[:-2], num)


def unit(x: Float[Array, "*b"], axis: int) -> Float[Array, "*b"]:
    """x with length 1 along an axis (epsilon 1e-8)."""
    return x * jax.lax.rsqrt(jnp.square(x).sum(axis, keepdims=True) + 1e-16)


def activation(name: str) -> Any:
    if name not in ACTIVATIONS:
        raise check.unknown("objective: head activation", name, ACTIVATIONS)
    return ACTIVATIONS[name]
