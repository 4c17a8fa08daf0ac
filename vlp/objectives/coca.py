"""CoCa: contrastive and captioning losses from one pass through each tower (Yu et al. 2022, arXiv:2205.01917)."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

from vlp.core import check
from vlp.core.types import Ctx, Out, Term
from vlp.losses import contrastive
from vlp.objectives.passes import captioned


@dataclasses.dataclass(frozen=True)
class Coca:
    """λ_con · (i→t + t→i) + λ_cap · captioning (eq. 2–4).

    As in the paper, the two contrastive directions are summed; CLIP, FLIP and open_clip's CoCa take their mean,
    which is contrastive_weight 0.5 here. Captioning divides by the real tokens of the global batch.
    keep_ratio: fraction of patches the image tower sees in training (FLIP, Li et al. 2022, arXiv:2212.00794); both
    losses read the same masked pass.
    """

    reads: ClassVar[frozenset[str]] = frozenset({"image", "text"})
    contrastive_weight: float = 1.0
    caption_weight: float = 2.0
    keep_ratio: float = 1.0

    def __post_init__(self) -> None:
        bounds = {
            "contrastive_weight": (self.contrastive_weight >= 0, "at least 0"),
            "caption_weight": (self.caption_weight >= 0, "at least 0"),
        }
        check.bounds("config.objective", self, bounds)

    def __call__(self, ctx: Ctx) -> Out:
        zi_BE, zt_BKE, nll = ctx.map(self.encode)
        scale, _ = ctx.student("scale_bias")
        exists_BK = ctx.batch.get("text.mask")
        loss = contrastive.softmax(zi_BE, zt_BKE, scale, where_BK=exists_BK)
        count = nll["count"].sum()
        terms = {
            "contrastive": Term.mean_of(loss["i2t"] + loss["t2i"], self.contrastive_weight),
            "caption": Term(nll["total"].sum(), count, self.caption_weight),
        }
        accuracy = {"caption/accuracy": Term(nll["correct"].sum(), count)}
        return Out(terms, metrics=contrastive.metrics(loss, scale) | accuracy)

    def encode(self, ctx: Ctx) -> Any:
        image, text, nll = captioned(ctx, self.keep_ratio)
        return image["embed"], text["embed"], nll
