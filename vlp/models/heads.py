"""Parts that sit on top of towers: joint projection, logit scale and bias, attention pooling, extra heads."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from vlp.core import check
from vlp.core.mesh import logical
from vlp.models.layers import Attention, Linear, Mlp, Norm


class Joint(nn.Module):
    """Projects to the joint space and normalises to unit length, in float32 (epsilon 1e-8, FLIP).

    project False: normalises alone (SigLIP's image side), and then x must have the joint space's width.
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
    """Learned logit scale, in log space, and bias (None: no parameter, and 0)."""

    scale: float = 1 / 0.07
    bias: float | None = None

    @nn.compact
    def __call__(self) -> tuple[Float[Array, ""], Float[Array, ""]]:
        scale = self.param("logit_scale", lambda _: jnp.log(jnp.float32(self.scale)))
        if self.bias is None:
            return jnp.exp(scale), jnp.float32(0)
        return jnp.exp(scale), self.param("logit_bias", lambda _: jnp.float32(self.bias))


class AttentionPool(nn.Module):
    """Attentional pooler: one attention layer of `queries` learned queries over the tokens (CoCa §3.2)."""

    queries: int
    width: int
    heads: int
    dtype: str = "float32"

    @nn.compact
    def __call__(self, x: Float[Array, "B N C"]) -> Float[Array, "B Q D"]:
        shape = (self.queries, self.width)
        query = self.param("query", logical(nn.initializers.normal(0.02), "tokens", "embed"), shape)
        query = Norm(self.dtype, name="norm_query")(query.astype(self.dtype)[None])
        y = Attention(self.heads, self.width, self.dtype, name="attention")(query, x)
        return Norm(self.dtype, name="norm")(y)


class MapPool(nn.Module):
    """Multihead attention pooling: one learned query, attention to the tokens, and a residual MLP.

    Source: Zhai et al. 2022 (arXiv:2106.04560, §3.1), as in SigLIP. `mask` bool[B N]: which tokens count.
    """

    heads: int
    mlp: int
    activation: str = "gelu"
    dtype: str = "float32"

    @nn.compact
    def __call__(
        self, x: Float[Array, "B N D"], mask: Bool[Array, "B N"] | None = None
    ) -> Float[Array, "B D"]:
        width = x.shape[-1]
        init = logical(nn.initializers.xavier_uniform(), None, "embed")
        query = self.param("query", init, (1, width)).astype(self.dtype)[None]
        mask_B1N = None if mask is None else mask[:, None]
        x = Attention(self.heads, width, self.dtype, name="attention")(query, x, mask_BTS=mask_B1N)
        y = Norm(self.dtype, name="norm")(x)
        return (x + Mlp(self.mlp, self.activation, self.dtype, name="mlp")(y))[:, 0]


@dataclasses.dataclass(frozen=True)
class HeadSpec:
    """A further head (predictor, projector …): an MLP of `depth` layers."""

    width_in: int
    width_out: int
    hidden: int = 0  # 0: width_in
    depth: int = 2


class Head(nn.Module):
    """The MLP that a HeadSpec describes."""

    spec: HeadSpec

    @nn.compact
    def __call__(self, x: Float[Array, "*b D"]) -> Float[Array, "*b E"]:
        s = self.spec
        if x.shape[-1] != s.width_in:
            raise check.error(
                "model.heads: width_in", s.width_in, x.shape[-1], "match the head to its input"
            )
        widths = [s.width_in] + [s.hidden or s.width_in] * (s.depth - 1) + [s.width_out]
        for i, (a, b) in enumerate(zip(widths[:-1], widths[1:])):
            x = nn.gelu(x) if i else x
            x = Linear((a,), (b,), ("embed", "mlp"), name=f"layer{i}")(x)
        return x


def find(heads: Mapping[str, Head], name: str) -> Head:
    if name not in heads:
        raise check.unknown("objective: head", name, heads)
    return heads[name]
