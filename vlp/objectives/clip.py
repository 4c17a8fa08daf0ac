"""Contrastive language-image pretraining (Radford et al. 2021, arXiv:2103.00020)."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

from vlp.core.types import Ctx, Out, Term
from vlp.losses import contrastive


@dataclasses.dataclass(frozen=True)
class Clip:
    """Symmetric softmax loss: the mean of both directions, ½ (i→t + t→i).

    keep: fraction of patches the image tower sees in training (FLIP, Li et al. 2022, arXiv:2212.00794).
    """

    reads: ClassVar[frozenset[str]] = frozenset({"image", "text"})
    needs: ClassVar[frozenset[str]] = frozenset({"image.embed", "text.embed", "scale_bias"})
    keep: float = 1.0

    def __call__(self, ctx: Ctx) -> Out:
        zi_BE, zt_BE = ctx.map(self.encode)
        scale, _ = ctx.student("scale_bias")
        loss = contrastive.softmax(zi_BE, zt_BE, scale)
        term = Term((0.5 * (loss["i2t"] + loss["t2i"])).sum(), zi_BE.shape[0])
        return Out({"contrastive": term}, metrics=contrastive.metrics(loss, scale))

    def encode(self, ctx: Ctx) -> Any:
        image = ctx.student("image", ctx.batch["image"], keep=self.keep)
        text = ctx.student("text", ctx.batch["text"])
        return image["embed"], text["embed"]
