"""The joint space: modality gap, alignment and uniformity of the unit embeddings of images and their texts."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float

from vlp.core.types import Apply, Result
from vlp.evals import embed, retrieval
from vlp.evals import io as ios

_ROWS = 2**10


@dataclasses.dataclass(frozen=True)
class Geometry:
    """modality_gap: distance of the two means (Liang et al. 2022, arXiv:2203.02053, §2). alignment: mean squared
    distance of an image and its text. uniformity_image, uniformity_text: log of the mean of exp(−2 · squared distance)
    over all pairs of different records (Wang & Isola 2020, arXiv:2005.10242, eq. 4 and 5). Lower is better for all but
    the gap. cosine: mean cosine of an image and its text."""

    split: str = "test"
    batch: int = 64
    every_steps: int = 0
    data: ios.Source = ios.Source()

    def asks(self, apply: Apply, image: jax.Array, text: jax.Array) -> Any:
        """What is asked of the model for one batch."""
        return embed.image(apply, image), embed.text(apply, text)

    def __call__(self, apply: Apply, mesh: Mesh, io: ios.IO) -> Iterator[Result]:
        dataset = io.open(self.split)
        zi_NE, zt_NE = retrieval.pairs(apply, dataset, self.batch, mesh)
        zi_NE, zt_NE = embed.unit(zi_NE), embed.unit(zt_NE)
        where = io.provenance(dataset)
        yield Result("modality_gap", modality_gap(zi_NE, zt_NE), where)
        yield Result("alignment", float(((zi_NE - zt_NE) ** 2).sum(1).mean()), where)
        yield Result("cosine", float((zi_NE * zt_NE).sum(1).mean()), where)
        if len(zi_NE) > 1:
            yield Result("uniformity_image", uniformity(zi_NE), where)
            yield Result("uniformity_text", uniformity(zt_NE), where)


def modality_gap(a_NE: Float[np.ndarray, "N E"], b_NE: Float[np.ndarray, "N E"]) -> float:
    """Euclidean distance of the means of two sets of unit vectors."""
    return float(np.linalg.norm(a_NE.mean(axis=0) - b_NE.mean(axis=0)))


def uniformity(z_NE: Float[np.ndarray, "N E"], t: float = 2.0) -> float:
    """log mean exp(−t · squared distance) over the pairs of different unit vectors; some rows at a time."""
    total, num = 0.0, len(z_NE)
    for k in range(0, num, _ROWS):
        rows = z_NE[k : k + _ROWS]
        total += float(np.exp(-t * np.maximum(2 - 2 * (rows @ z_NE.T), 0)).sum())
        total -= float(np.exp(-t * np.maximum(2 - 2 * (rows * rows).sum(1), 0)).sum())
    return float(np.log(max(total, 1e-300) / (num * (num - 1))))
