"""SigLIP: every pair of the batch is one binary decision (Zhai et al. 2023, arXiv:2303.15343)."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

from vlp.core.types import Ctx, Out, Term
from vlp.losses import contrastive


@dataclasses.dataclass(frozen=True)
class Siglip:
    """−(1/B) Σᵢⱼ log σ(zᵢⱼ (t · xᵢ·yⱼ + b)), z = 1 for pairs and −1 for the rest (eq. 2); t and b are learned.

    The model needs a bias: `config.model.scale` 10 and `config.model.bias` −10 are the paper's start (§3.2), so that
    the many negatives do not begin with a large loss. keep_ratio: fraction of patches the image tower sees in training.
    """

    reads: ClassVar[frozenset[str]] = frozenset({"image", "text"})
    needs: ClassVar[frozenset[str]] = frozenset({"image.embed", "text.embed", "scale_bias", "bias"})
    keep_ratio: float = 1.0

    def __call__(self, ctx: Ctx) -> Out:
        zi_BE, captions = ctx.map(self.encode)
        scale, bias = ctx.student("scale_bias")
        loss = contrastive.mean(
            [contrastive.sigmoid(zi_BE, zt_BE, scale, bias) for zt_BE in captions]
        )
        term = Term(loss["loss"].sum(), zi_BE.shape[0])
        metrics = contrastive.metrics(loss, scale) | {"logit_bias": Term(bias, 1)}
        return Out({"sigmoid": term}, metrics=metrics)

    def encode(self, ctx: Ctx) -> Any:
        image = ctx.student("image", ctx.batch["image"], keep_ratio=self.keep_ratio)
        ctx, image = ctx.then(image)
        texts = [ctx.student("text", text, draw=k) for k, text in enumerate(ctx.texts())]
        return image["embed"], [text["embed"] for text in texts]
