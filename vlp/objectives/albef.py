"""ALBEF: align, then fuse, with the targets of a moving average (Li et al. 2021, arXiv:2107.07651)."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from vlp.core.types import Ctx, Out, Term, Weight
from vlp.losses import caption, contrastive
from vlp.objectives import queues, sampling
from vlp.objectives.passes import after
from vlp.ops.masking import mask_words


@dataclasses.dataclass(frozen=True)
class Albef:
    """Contrast over batch and queue + matching of fused pairs + masked words, with equal weights (§3.2, eq. 8).

    The teacher "ema" (config.teachers.ema.decay) gives the keys of the contrast, and the soft part of the targets.
    alpha: share of the soft part, a number or (progress, value) points. queue: past embeddings of each side.
    mask_ratio: share of the words that are masked. mask_id, vocab_size: of the tokenizer. fusion_depth: blocks that
    fuse.
    """

    reads: ClassVar[frozenset[str]] = frozenset({"image", "text"})
    mask_id: int | None = None
    vocab_size: int | None = None
    alpha: Weight = ((0.0, 0.0), (1 / 30, 0.4))
    queue: int = 65_536
    mask_ratio: float = 0.15
    fusion_depth: int = 6

    @property
    def heads(self) -> dict[str, Any]:
        fuse = {"name": "fusion", "depth": self.fusion_depth}
        match = {"name": "mlp", "depth": 1, "width_out": 2}
        return {"fuse": fuse, "match": match, "words": {"name": "words"}}

    def init_method_state(self, key: jax.Array, model: Any) -> Any:
        return queues.start(key, ("image", "text"), self.queue, model.embed)

    def __call__(self, ctx: Ctx) -> Out:
        own, ema, words = ctx.map(self.encode)
        (scale, _), alpha, queue = ctx.student("scale_bias"), ctx.at(self.alpha), ctx.method_state
        i2t = self.contrast("image", "text", own, ema, queue, scale, alpha)
        t2i = self.contrast("text", "image", own, ema, queue, scale, alpha)
        match = ctx.map(self.match, own, *self.negatives(ctx, own, ema, scale))
        count = words["count"].sum()
        mlm = (1 - alpha) * words["total"].sum() + alpha * words["soft"].sum()
        terms = {
            "contrastive": Term.mean_of(0.5 * (i2t["nll"] + t2i["nll"])),
            "matching": Term.mean_of(match["nll"]),
            "words": Term(mlm, count),
        }
        metrics = {
            "contrastive/retrieval@1": Term.mean_of(0.5 * (i2t["hit"] + t2i["hit"])),
            "matching/accuracy": Term.mean_of(match["correct"]),
            "words/accuracy": Term(words["correct"].sum(), count),
        }
        pushed = {name: queues.push(queue[name], ema[name]) for name in queue}
        return Out(terms, pushed, metrics)

    def encode(self, ctx: Ctx) -> Any:
        """The student's embeddings and tokens, the teacher's embeddings, the masked words' losses."""
        text, words = ctx.batch["text"], (self.mask_id or 0, self.vocab_size or 0)
        masked, where = mask_words(text, ctx.keys("words"), *words, ratio=self.mask_ratio)

        def run(c: Ctx) -> tuple[Any, Any, Any]:
            c, image = after(c, c.student("image", ctx.batch["image"]))
            text = c.student("text", ctx.batch["text"])
            seen = c.student("text", masked, pass_id=1)
            fused = c.head("fuse", seen["tokens"], image["tokens"], mask=seen["mask"])
            return image, text, c.head("words", fused["tokens"])

        (image, text, words), (image_m, text_m, words_m) = run(ctx), run(ctx.teacher("ema"))
        ours, soft = ((w["hidden"], w["unembed"]) for w in (words, words_m))
        nll = caption.nll(*ours, ctx.batch["text"], where=where, shift=False, teacher=soft)
        own = {"image": image["embed"], "patches": image["tokens"]}
        own |= {"text": text["embed"], "words": text["tokens"], "mask": text["mask"]}
        return own, {"image": image_m["embed"], "text": text_m["embed"]}, nll

    def contrast(
        self, a: str, b: str, own: Any, ema: Any, queue: Any, scale: Any, alpha: Any
    ) -> Any:
        """One direction (eq. 6): rows of `a` over the teacher's keys of `b` and their queue."""
        more = queue[b] if self.queue else None
        targets = contrastive.teacher_targets(ema[a], ema[b], scale, alpha, more=more)
        return contrastive.one_way(own[a], ema[b], scale, **targets)

    def negatives(self, ctx: Ctx, own: Any, ema: Any, scale: Any) -> tuple[Any, Any]:
        """Another image's patches for each text; another text's words and their mask for each image."""
        image_B = sampling.negatives(ctx.keys("image"), scale * own["text"] @ ema["image"].T)
        text_B = sampling.negatives(ctx.keys("text"), scale * own["image"] @ ema["text"].T)
        return {"patches": own["patches"][image_B]}, {k: own[k][text_B] for k in ("words", "mask")}

    def match(self, ctx: Ctx, own: Any, *wrong: Any) -> dict[str, jax.Array]:
        """Cross-entropy [B 3] of the pair, of its text with another image, of its image with another text."""
        found = []
        for k, pair in enumerate((own, *(own | other for other in wrong))):
            fused = ctx.head(
                "fuse", pair["words"], pair["patches"], mask=pair["mask"], pass_id=k + 1
            )
            logits = ctx.head("match", fused["pooled"], pass_id=k).astype(jnp.float32)
            found.append(jax.nn.log_softmax(logits)[:, int(k == 0)])
        log_p_B3 = jnp.stack(found, axis=1)
        return {"nll": -log_p_B3, "correct": (jnp.exp(log_p_B3) > 0.5).astype(jnp.float32)}
