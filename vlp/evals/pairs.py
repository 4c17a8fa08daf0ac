"""Compositional pairs: does the model prefer the caption that fits to one with the same words, and the right image?"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

import jax
import numpy as np
from jax.sharding import Mesh

from vlp.core import check
from vlp.core import mesh as meshes
from vlp.core.types import Apply, Result
from vlp.data.dataset import Dataset
from vlp.evals import embed, instances
from vlp.evals import io as ios
from vlp.losses import caption

SCORES = ("embedding", "likelihood", "likelihood_mean")


@dataclasses.dataclass(frozen=True)
class Pairs:
    """Benchmarks in the formats of `instances`: `path` is the file or folder, `images` the folder of its images.

    accuracy: the right caption scores above every wrong one (a tie is lost). macro: mean accuracy over groups
    (relations, attributes, files) of `min_group` instances or more; accuracy/<group>: of each group, if there are at
    most 32. For instances with two images (Winoground): text_score (each image prefers its caption), image_score (each
    caption prefers its image), group_score (both).

    score: "embedding": cosine; "likelihood": log probability of the caption given the image, summed over its tokens;
    "likelihood_mean": their mean. split: only a name, for the report.
    """

    reads_dataset: ClassVar = False
    path: str
    images: str = ""
    score: str = "embedding"
    min_group: int = 1
    split: str = "pairs"
    batch: int = 64
    every_steps: int = 0

    def __post_init__(self) -> None:
        where = "config.evals: pairs"
        if self.score not in SCORES:
            raise check.unknown(f"{where}.score", self.score, SCORES)
        check.bounds(where, self, {"min_group": (self.min_group >= 1, "1 or more")})

    def check(self, io: ios.IO, where: str) -> None:
        """Raises UserError unless the files can be read and every image is there."""
        instances.read(self.path, self.images, f"{where}.path")

    def asks(self, apply: Apply, image: jax.Array, text: jax.Array) -> Any:
        """What is asked of the model for one batch."""
        if self.score == "embedding":
            return embed.image(apply, image), embed.text(apply, text)
        return likelihoods(apply, image, text)

    def __call__(self, apply: Apply, mesh: Mesh, io: ios.IO) -> Iterator[Result]:
        found, fingerprint = instances.read(self.path, self.images, "config.evals: pairs.path")
        scored = self.scores(apply, mesh, io, found)
        where = io.provenance(_dataset(io, instances.Pictures((), fingerprint)))
        where |= {"split": self.split, "num": len(found), "score": self.score}
        by_group = collections.defaultdict(list)
        marks = collections.defaultdict(list)
        for instance, score_IT in zip(found, scored):
            if len(instance.images) == 1:
                right = bool((score_IT[0, 0] > score_IT[0, 1:]).all())
                by_group[instance.group].append(right)
                continue
            text, image = preferences(score_IT)
            for name, value in {"text": text, "image": image, "group": text and image}.items():
                marks[f"{name}_score"].append(value)
        for name, values in marks.items():
            yield Result(name, float(np.mean(values)), where)
        if by_group:
            everything = [value for values in by_group.values() for value in values]
            yield Result("accuracy", float(np.mean(everything)), where)
            large = [np.mean(v) for v in by_group.values() if len(v) >= self.min_group]
            if large:
                yield Result("macro", float(np.mean(large)), where | {"num_groups": len(large)})
        if 1 < len(by_group) <= 32:
            for name, values in sorted(by_group.items()):
                yield Result(f"accuracy/{name}", float(np.mean(values)), where)

    def scores(
        self, apply: Apply, mesh: Mesh, io: ios.IO, found: Sequence[instances.Instance]
    ) -> Iterator[np.ndarray]:
        """Yields for each instance the scores of its images (rows) and texts (columns), f64."""
        if self.score == "embedding":
            dataset = _dataset(io, instances.Pictures(tuple(instances.regions(found)), ""))
            zi_NE, _ = embed.images(apply, dataset, self.batch, mesh)
            ids = (
                io.tokenizer.encode(text, io.data.text_len)
                for instance in found
                for text in instance.texts
            )
            zi_NE, zt_ME = embed.unit(zi_NE), embed.unit(embed.texts(apply, ids, self.batch, mesh))
            i = j = 0
            for instance in found:
                images, texts = len(instance.images), len(instance.texts)
                yield zi_NE[i : i + images] @ zt_ME[j : j + texts].T
                i, j = i + images, j + texts
            return
        every = [(r, t) for inst in found for r in inst.images for t in inst.texts]
        regions, texts = zip(*every)
        source = instances.Pictures(regions, "", texts)
        run, parts = apply.jit(likelihoods), []
        for rows, mask_B in ios.batches(_dataset(io, source), self.batch, mesh):
            out = run(rows["image"], rows["text"])
            total, count = (
                meshes.to_host(out[k])[mask_B].astype(np.float64) for k in ("total", "count")
            )
            parts.append(-total / (count if self.score == "likelihood_mean" else 1))
        score_P, k = np.concatenate(parts), 0
        for instance in found:
            shape = len(instance.images), len(instance.texts)
            yield score_P[k : k + shape[0] * shape[1]].reshape(shape)
            k += shape[0] * shape[1]


def preferences(score_22: np.ndarray) -> tuple[bool, bool]:
    """Whether each image prefers its text, and each text its image; Winoground's strict inequalities."""
    right = np.diagonal(score_22)
    text = bool(right[0] > score_22[0, 1] and right[1] > score_22[1, 0])
    image = bool(right[0] > score_22[1, 0] and right[1] > score_22[0, 1])
    return text, image


def likelihoods(apply: Apply, image: jax.Array, text: jax.Array) -> dict[str, jax.Array]:
    """Nats of each caption given its image (total), and the number of its tokens (count)."""
    feats, tokens = apply("image", image)["feats"], apply("text", text)["tokens"]
    decoded = apply("decode", tokens, feats)
    return caption.nll(decoded["hidden"], decoded["unembed"], text)


def _dataset(io: ios.IO, source: instances.Pictures) -> Dataset:
    """The regions, prepared as the checkpoint's images."""
    own = {"mixture": (), "reweight": (), "skip": "", "group_by": "", "langs": ()}
    own |= {"caption_sources": (), "captions": "first", "num_captions": 1, "bad_records": "error"}
    own |= {"cache_decoded": False}
    return Dataset(dataclasses.replace(io.data, **own), source, io.tokenizer)
