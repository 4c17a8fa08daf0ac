"""Captioning alone: the image-conditioned language model of CoCa's second term (LCap only, its table 8a)."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

from vlp.core.types import Ctx, Out, Term
from vlp.losses import caption


@dataclasses.dataclass(frozen=True)
class Cap:
    """−log P(token | tokens before it, image), over the number of real tokens of the global batch.

    keep_ratio: fraction of patches the image tower sees in training (FLIP).
    """

    reads: ClassVar[frozenset[str]] = frozenset({"image", "text"})
    needs: ClassVar[frozenset[str]] = frozenset({"image.feats", "text.tokens", "decode"})
    keep_ratio: float = 1.0

    def __call__(self, ctx: Ctx) -> Out:
        loss = ctx.map(self.encode)
        count = loss["count"].sum()
        accuracy = Term(loss["correct"].sum(), count)
        return Out(
            {"caption": Term(loss["total"].sum(), count)}, metrics={"caption/accuracy": accuracy}
        )

    def encode(self, ctx: Ctx) -> Any:
        image = ctx.student("image", ctx.batch["image"], keep_ratio=self.keep_ratio)
        captions = []
        for k, words in enumerate(ctx.texts()):
            text = ctx.student("text", words, draw=k)
            decoded = ctx.student("decode", text["tokens"], image["feats"], draw=k)
            captions.append(caption.nll(decoded["hidden"], decoded["unembed"], words))
        return caption.add(captions)
