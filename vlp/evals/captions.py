"""Captioning over a split: loss with the true image and with another one, and greedy captions with their scores."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from vlp.core import check
from vlp.core import mesh as meshes
from vlp.core.types import Apply, Result
from vlp.data import order
from vlp.evals import caption_metrics, embed
from vlp.evals import io as ios
from vlp.losses import caption
from vlp.ops import decoding


@dataclasses.dataclass(frozen=True)
class Captions:
    """caption_loss: nats per real token; caption_loss_shuffled: each text with the image of the record after its own.

    If the two are alike, the decoder ignores the image; caption_gap_se is the standard error of their difference.
    exact_match: greedy captions that equal the reference; distinct: share of different captions among those
    generated; eos_rate: share of those that end before the row is full. BLEU-1 … 4, ROUGE-L, CIDEr-D, words a caption
    and distinct-1, 2 are those of `caption_metrics`, against the first `num_references` captions of a record (0: all),
    which are not cut as the model's own are. items: how many the report shows.

    java: adds METEOR, and the same metrics on the tokens of Java's tokenizer, where pycocoevalcap and Java are
    installed ("java/…"); spice: SPICE too, which downloads its parser. data: another dataset.
    """

    split: str = "test"
    batch: int = 64
    every_steps: int = 0
    items: int = 24
    num_references: int = 0
    java: bool = False
    spice: bool = False
    data: ios.Source = ios.Source()

    def __post_init__(self) -> None:
        bounds = {
            "items": (self.items >= 0, "at least 0"),
            "num_references": (0 <= self.num_references <= embed.MOST, f"in 0 … {embed.MOST:,}"),
            "spice": (self.java or not self.spice, "False without java"),
        }
        check.bounds("config.evals: captions", self, bounds)

    def check(self, io: ios.IO, where: str) -> None:
        """Raises UserError if Java's metrics are asked for and cannot run."""
        if self.java:
            caption_metrics.check_java(f"{where}.java")

    def asks(self, apply: Apply, image: jax.Array, text: jax.Array) -> Any:
        """What is asked of the model for one batch."""
        return _losses(apply, image, text, image[:1], jnp.arange(len(image)))

    def __call__(self, apply: Apply, mesh: Mesh, io: ios.IO) -> Iterator[Result]:
        dataset = io.open(self.split)
        losses = apply.jit(_losses)
        length, vocab_size = dataset.data.text_len, dataset.tokenizer.vocab_size
        names = ("pad_id", "bos_id", "eos_id", "unk_id")
        ids = {name: getattr(dataset.tokenizer, name) for name in names}
        generate = apply.jit(decoding.captions, length=length, vocab_size=vocab_size, **ids)
        found: dict[str, list[np.ndarray]] = {"true": [], "shuffled": [], "count": []}
        generated: list[str] = []
        used: list[int] = []  # the record of each row, or its substitute's
        num_ended = 0
        for i, (rows, mask_B) in enumerate(ios.batches(dataset, self.batch, mesh)):
            after = (
                i + 1
            ) * self.batch  # the record behind the batch; behind the last one, the first
            after_1RRC = dataset.eval_batch(after if after < dataset.num_records else 0, 1)["image"]
            other_B = np.arange(self.batch) + 1
            other_B[mask_B.sum() - 1] = self.batch
            out = losses(rows["image"], rows["text"], after_1RRC, other_B)
            for name, parts in found.items():
                parts.append(meshes.to_host(out[name])[mask_B].astype(np.float64))
            used += order.join_words(meshes.to_host(rows["record"]))[mask_B].tolist()
            tokens = meshes.to_host(generate(rows["image"]))[mask_B]
            num_ended += int((tokens == dataset.tokenizer.eos_id).any(axis=1).sum())
            generated += [dataset.tokenizer.decode(row) for row in tokens]
        where = io.provenance(dataset)
        truth = [normal(dataset, i) for i in used]
        exact = np.mean([a == b for a, b in zip(generated, truth, strict=True)])
        true_N, shuffled_N, count_N = (np.concatenate(parts) for parts in found.values())
        yield Result("caption_loss", float(true_N.sum() / count_N.sum()), where)
        yield Result("caption_loss_shuffled", float(shuffled_N.sum() / count_N.sum()), where)
        if len(count_N) > 1:
            yield Result("caption_gap_se", ratio_error(shuffled_N - true_N, count_N), where)
        yield Result("exact_match", float(exact), where)
        yield Result("distinct", len(set(generated)) / len(generated), where)
        yield Result("eos_rate", num_ended / len(generated), where)
        captions = embed.Captions(dataset, self.num_references)
        references = [captions.of(i) for i in used]
        scores = caption_metrics.score(generated, references)
        if self.java:
            scores |= caption_metrics.with_java(generated, references, self.spice)
        num = {"num_references": sum(map(len, references))}
        for name, value in scores.items():
            yield Result(name, value, where | num)
        if self.items:
            io.write(f"captions_{self.split}", _items(dataset, used, generated, truth, self.items))


def ratio_error(total_N: np.ndarray, count_N: np.ndarray) -> float:
    """Standard error of Σ total / Σ count over N > 1 independent records (the delta method)."""
    num, ratio = len(count_N), total_N.sum() / count_N.sum()
    variance = ((total_N - ratio * count_N) ** 2).sum() * num / (num - 1)
    return float(np.sqrt(variance) / count_N.sum())


def normal(dataset: Any, record: int) -> str:
    """The reference caption as the tokenizer gives it back (lower case, normalised)."""
    text = dataset.reference(record)
    return dataset.tokenizer.decode(dataset.tokenizer.encode(text, dataset.data.text_len))


def _losses(
    apply: Apply, image: jax.Array, text: jax.Array, after_1RRC: jax.Array, other_B: jax.Array
) -> dict[str, jax.Array]:
    """other_B: for each text, the row of [image; after] that it is shuffled with."""
    feats, tokens = apply("image", image)["feats"], apply("text", text)["tokens"]

    def nll(feats: jax.Array) -> dict[str, jax.Array]:
        decoded = apply("decode", tokens, feats)
        return caption.nll(decoded["hidden"], decoded["unembed"], text)

    pool = jnp.concatenate([feats, apply("image", after_1RRC)["feats"]])
    true, shuffled = nll(feats), nll(pool[other_B])
    return {"true": true["total"], "shuffled": shuffled["total"], "count": true["count"]}


def _items(
    dataset: Any, used: list[int], generated: list[str], truth: list[str], num: int
) -> dict[str, Any]:
    shown = np.linspace(0, len(truth) - 1, min(num, len(truth))).astype(int).tolist()
    items = [
        {
            "image": ios.data_uri(dataset.eval_batch(used[i], 1)["image"][0]),
            "caption": truth[i],
            "generated": generated[i],
            "key": dataset.keys([used[i]])[0],
        }
        for i in shown
    ]
    return {"kind": "captions", "split": dataset.data.split, "num": len(truth), "items": items}
