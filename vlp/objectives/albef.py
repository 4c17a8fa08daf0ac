"""ALBEF: align before fuse, with soft targets from a momentum teacher (Li et al. 2021, arXiv:2107.07651)."""

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
    """Contrastive loss over batch and queue + image-text matching + masked language modelling (§3.2, eq. 8).

    The three losses have equal weights. The teacher "ema" (config.teachers.ema.decay) gives the contrastive keys, and
    the soft targets of the contrastive and the masked-language loss.

    Attributes:
        mask_id: the tokenizer's mask token.
        vocab_size: the tokenizer's number of tokens.
        alpha: weight of the soft targets, in [0, 1]: a number, or (progress, value) points.
        queue: number of past teacher embeddings kept, of images and of texts.
        mask_ratio: fraction of the text tokens that are masked.
        fusion_depth: number of fusion blocks.
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
        """Returns the student's embeddings and tokens, the teacher's embeddings, and the loss of the masked tokens."""
        text, words = ctx.batch["text"], (self.mask_id or 0, self.vocab_size or 0)
        masked, where = mask_words(text, ctx.keys("words"), *words, ratio=self.mask_ratio)

        def run(c: Ctx) -> tuple[Any, Any, Any]:
            c, image = after(c, c.student("image", ctx.batch["image"]))
            text = c.student("text", ctx.batch["text"])
            corrupted = c.student("text", masked, pass_id=1)
            fused = c.head("fuse", corrupted["tokens"], image["tokens"], mask=corrupted["mask"])
            return image, text, c.head("words", fused["tokens"])

        (image, text, words), (image_m, text_m, words_m) = run(ctx), run(ctx.teacher("ema"))
        student, teacher = ((w["hidden"], w["unembed"]) for w in (words, words_m))
        nll = caption.nll(*student, ctx.batch["text"], where=where, shift=False, teacher=teacher)
        own = {"image": image["embed"], "patches": image["tokens"]}
        own |= {"text": text["embed"], "words": text["tokens"], "mask": text["mask"]}
        return own, {"image": image_m["embed"], "text": text_m["embed"]}, nll

    def contrast(
        self, rows: str, keys: str, own: Any, ema: Any, queue: Any, scale: Any, alpha: Any
    ) -> Any:
        """Contrastive loss in one direction (eq. 6): student rows against the teacher's keys and queue.

        Args:
            rows: "image" or "text", the side that queries.
            keys: the other side.
            own: the student's embeddings [B E] by side.
            ema: the teacher's embeddings [B E] by side.
            queue: the teacher's past embeddings [Q E] by side.
            scale: the logit scale.
            alpha: weight of the soft targets.

        Returns:
            Numbers per row, [B]: the result of `losses.contrastive.one_way`.
        """
        more = queue[keys] if self.queue else None
        targets = contrastive.teacher_targets(ema[rows], ema[keys], scale, alpha, more=more)
        return contrastive.one_way(own[rows], ema[keys], scale, **targets)

    def negatives(self, ctx: Ctx, own: Any, ema: Any, scale: Any) -> tuple[Any, Any]:
        """Draws a hard negative image for each text and a hard negative text for each image.

        Args:
            ctx: gives one random key per example.
            own: the student's embeddings and tokens, from `encode`.
            ema: the teacher's embeddings, from `encode`.
            scale: the logit scale; negatives are drawn by the softmax of the scaled student-teacher similarities.

        Returns:
            The patches of the negative images; the words and masks of the negative texts.
        """
        image_B = sampling.negatives(ctx.keys("image"), scale * own["text"] @ ema["image"].T)
        text_B = sampling.negatives(ctx.keys("text"), scale * own["image"] @ ema["text"].T)
        take = lambda name, ids_B: sampling.take(own[name], ids_B)
        return {"patches": take("patches", image_B)}, {
            k: take(k, text_B) for k in ("words", "mask")
        }

    def match(self, ctx: Ctx, own: Any, *negatives: Any) -> dict[str, jax.Array]:
        """Matching loss of each pair, of its text with a negative image, and of its image with a negative text.

        Args:
            ctx: applies the heads.
            own: `patches` [B N D], `words` [B L D] and their `mask` [B L].
            negatives: what replaces the leaves of `own`, from `self.negatives`.

        Returns:
            `nll`: binary cross-entropy [B 3]. `correct`: 1 where the right class has more than half [B 3].
        """
        found = []
        for k, pair in enumerate((own, *(own | other for other in negatives))):
            fused = ctx.head(
                "fuse", pair["words"], pair["patches"], mask=pair["mask"], pass_id=k + 1
            )
            logits = ctx.head("match", fused["pooled"], pass_id=k).astype(jnp.float32)
            found.append(jax.nn.log_softmax(logits)[:, int(k == 0)])
        log_p_B3 = jnp.stack(found, axis=1)
        return {"nll": -log_p_B3, "correct": (jnp.exp(log_p_B3) > 0.5).astype(jnp.float32)}
