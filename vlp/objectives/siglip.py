"""SigLIP: every pair of the batch is one binary decision (Zhai et al. 2023, arXiv:2303.15343)."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from vlp.core import check
from vlp.core.types import Ctx, Out, Term
from vlp.losses import contrastive
from vlp.objectives.passes import embeds


@dataclasses.dataclass(frozen=True)
class Siglip:
    """−(1/B) Σᵢⱼ log σ(zᵢⱼ (t · xᵢ·yⱼ + b)), z = 1 for pairs and −1 for the rest (eq. 2); t and b are learned.

    The model needs a bias: `config.model.scale` 10 and `config.model.bias` −10 are the paper's start (§3.2), so that
    the many negatives do not begin with a large loss. keep_ratio: fraction of patches the image tower sees in training.
    """

    reads: ClassVar[frozenset[str]] = frozenset({"image", "text"})
    keep_ratio: float = 1.0

    def __call__(self, ctx: Ctx) -> Out:
        zi_BE, zt_BKE = ctx.map(lambda c: embeds(c, self.keep_ratio))
        scale, bias = ctx.student("scale_bias")
        if bias is None:
            do = "set config.model.scale=10.0 and config.model.bias=-10.0 (the paper's start)"
            raise check.error("config.model.bias", None, "a number, for the sigmoid loss", do)
        exists_BK = ctx.batch.get("text.mask")
        loss = contrastive.sigmoid(zi_BE, zt_BKE, scale, bias, where_BK=exists_BK)
        metrics = contrastive.metrics(loss, scale) | {"logit_bias": Term(bias, 1)}
        return Out({"sigmoid": Term.mean_of(loss["loss"])}, metrics=metrics)
