"""Dual encoder: two towers and a joint space (CLIP, Radford et al. 2021, arXiv:2103.00020)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key, Num

from vlp.core import check
from vlp.models import heads as parts
from vlp.models.text import Text
from vlp.models.vit import ViT


class Dual(nn.Module):
    """Answers image, text, head and scale_bias. embed: size of the joint space.

    SigLIP has no projection of the image, and a bias in that of the text: project_image False, text_bias True.
    """

    image_tower: ViT
    text_tower: Text
    embed: int
    scale: float = 1 / 0.07
    bias: float | None = None
    project_image: bool = True
    text_bias: bool = False
    heads: Mapping[str, parts.HeadSpec] | None = None

    groups: ClassVar[
        dict[str, str]
    ] = {  # lines of the parameter table: full-match patterns of leaf names
        "image": "image_tower/.*",
        "text": "text_tower/.*",
        "projections and heads": ".*",
    }

    def setup(self) -> None:
        for what in ("image", "text"):
            if getattr(self, f"{what}_tower").pool == "none":
                where = f"config.model.{what}_tower.pool"
                raise check.error(where, "'none'", f"a pooled {what}", "use 'cls' or 'mean'")
        self.joint_image = parts.Joint(self.embed, project=self.project_image)
        self.joint_text = parts.Joint(self.embed, bias=self.text_bias)
        self.temperature = parts.ScaleBias(self.scale, self.bias)
        self.extra_heads = {name: parts.Head(spec) for name, spec in (self.heads or {}).items()}

    def __call__(self, image: Array, text: Array) -> None:
        """Touches every parameter (initialisation)."""
        self.image(image)
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
        """What ViT returns, and embed: unit vectors [B E]."""
        out = self.image_tower(image, keep_ratio=keep_ratio, keys=keys, kept=kept, layers=layers)
        return out | {"embed": self.joint_image(out["pooled"])}

    def text(
        self, text: Int[Array, "B L"], *, keys: Key[Array, "B"] | None = None, layers: bool = False
    ) -> dict[str, Any]:
        """What Text returns, and embed: unit vectors [B E]."""
        out = self.text_tower(text, keys=keys, layers=layers)
        return out | {"embed": self.joint_text(out["pooled"])}

    def head(self, name: str, x: Float[Array, "*b D"], *, keys: Any = None) -> Float[Array, "*b E"]:
        return parts.find(self.extra_heads, name)(x)

    def scale_bias(self) -> tuple[Float[Array, ""], Float[Array, ""]]:
        """The logit scale exp(s), and the bias (0 if the model has none)."""
        return self.temperature()
