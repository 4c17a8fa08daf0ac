"""Captioning only: the image-conditioned language model of CoCa (LCap only in its table 8a)."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from vlp.core.types import Ctx, Out, Term
from vlp.objectives.passes import captioned


@dataclasses.dataclass(frozen=True)
class Cap:
    """−log P(token | tokens before it, image), over the number of real tokens of the global batch.

    keep_ratio: fraction of patches the image tower sees in training (FLIP).
    """

    reads: ClassVar[frozenset[str]] = frozenset({"image", "text"})
    keep_ratio: float = 1.0

    def __call__(self, ctx: Ctx) -> Out:
        nll = ctx.map(lambda c: captioned(c, self.keep_ratio)[2])
        count = nll["count"].sum()
        accuracy = Term(nll["correct"].sum(), count)
        return Out(
            {"caption": Term(nll["total"].sum(), count)}, metrics={"caption/accuracy": accuracy}
        )
