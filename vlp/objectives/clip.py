"""CLIP's contrastive loss (Radford et al. 2021, arXiv:2103.00020), with leave-one-out and focal variants."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import jax

from vlp.core import check
from vlp.core.types import Ctx, Out, Term
from vlp.losses import contrastive, focal
from vlp.objectives.passes import embeds


@dataclasses.dataclass(frozen=True)
class Clip:
    """Symmetric softmax cross-entropy: the mean of both directions, ½ (i→t + t→i).

    Attributes:
        leave_one_out: leaves the positive pair out of the denominators (InfoLOOB; CLOOB, Fürst et al. 2022,
            arXiv:2110.11316, eq. 2, without the factor 1/scale and the Hopfield retrieval). The loss then has no lower
            bound.
        focal: γ of the weight (1 − p)^γ, where p is the probability of the positive pair (Lin et al. 2017,
            arXiv:1708.02002); 0 is the plain loss.
        keep_ratio: fraction of the patches that the image tower sees in training (FLIP, Li et al. 2022,
            arXiv:2212.00794).
    """

    reads: ClassVar[frozenset[str]] = frozenset({"image", "text"})
    leave_one_out: bool = False
    focal: float = 0.0
    keep_ratio: float = 1.0

    def __post_init__(self) -> None:
        valid = self.focal == 0 or (self.focal >= 1 and not self.leave_one_out)
        expected = "0, or at least 1 without leave_one_out"
        check.bounds("config.objective", self, {"focal": (valid, expected)})

    def __call__(self, ctx: Ctx) -> Out:
        zi_BE, zt_BKE = ctx.map(lambda c: embeds(c, self.keep_ratio))
        scale, _ = ctx.student("scale_bias")
        if self.leave_one_out and zi_BE.shape[0] < 2:
            raise check.error("config.batch", 1, "2 or more, for leave_one_out", "raise it")
        others = off_diagonal if self.leave_one_out else None

        def one(zt_BE: jax.Array, where_B: jax.Array | None) -> dict[str, jax.Array]:
            loss = contrastive.softmax(zi_BE, zt_BE, scale, where=others, where_BK=where_B)
            i2t_B, t2i_B = (focal.weigh(loss[name], self.focal) for name in ("i2t", "t2i"))
            return loss | {"nll": 0.5 * (i2t_B + t2i_B)}

        loss = contrastive.over_captions(one, zt_BKE, ctx.batch.get("text.mask"))
        term = Term.mean_of(loss["nll"])
        metrics = contrastive.metrics(loss, scale, int(self.leave_one_out))
        return Out({"contrastive": term}, metrics=metrics)


def off_diagonal(i: jax.Array, j: jax.Array, *_: Any) -> jax.Array:
    """Selects the negative pairs, i ≠ j.

    Masking stays exact where subtracting the positive pair from the denominator would cancel (float32, large scale).
    """
    return i != j
