"""MaMMUT: contrastive and captioning losses from two runs of one text decoder (Kuo et al. 2023, arXiv:2303.16839)."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import jax

from vlp.core import check
from vlp.core.types import Ctx, Out, Term
from vlp.losses import contrastive, focal
from vlp.objectives.passes import captioned


@dataclasses.dataclass(frozen=True)
class Mammut:
    """contrastive_weight · ½ (i→t + t→i) + caption_weight · captioning.

    The model's `text` sees both ways and no image, its `decode` is causal with cross-attention; the image is encoded
    once. focal: γ of the weight (1 − p)^γ on the softmax's cross-entropy (`losses.focal`; 0 is without); the
    paper's focal contrastive loss and its loss weights could not be checked, so both weights are 1 and γ is 0.
    keep_ratio: fraction of patches the image tower sees in training.
    """

    reads: ClassVar[frozenset[str]] = frozenset({"image", "text"})
    contrastive_weight: float = 1.0
    caption_weight: float = 1.0
    focal: float = 0.0
    keep_ratio: float = 1.0

    def __post_init__(self) -> None:
        right = self.focal == 0 or self.focal >= 1
        bounds = {
            "focal": (right, "0, or at least 1"),
            "contrastive_weight": (self.contrastive_weight >= 0, "at least 0"),
            "caption_weight": (self.caption_weight >= 0, "at least 0"),
        }
        check.bounds("config.objective", self, bounds)

    def __call__(self, ctx: Ctx) -> Out:
        zi_BE, zt_BKE, nll = ctx.map(self.encode)
        scale, _ = ctx.student("scale_bias")

        def one(zt_BE: jax.Array, where_B: jax.Array | None) -> dict[str, jax.Array]:
            loss = contrastive.softmax(zi_BE, zt_BE, scale, where_BK=where_B)
            i2t_B, t2i_B = (focal.weigh(loss[name], self.focal) for name in ("i2t", "t2i"))
            return loss | {"nll": 0.5 * (i2t_B + t2i_B)}

        loss = contrastive.over_captions(one, zt_BKE, ctx.batch.get("text.mask"))
        count = nll["count"].sum()
        terms = {
            "contrastive": Term.mean_of(loss["nll"], self.contrastive_weight),
            "caption": Term(nll["total"].sum(), count, self.caption_weight),
        }
        accuracy = {"caption/accuracy": Term(nll["correct"].sum(), count)}
        return Out(terms, metrics=contrastive.metrics(loss, scale) | accuracy)

    def encode(self, ctx: Ctx) -> Any:
        image, text, nll = captioned(ctx, self.keep_ratio)
        return image["embed"], text["embed"], nll
