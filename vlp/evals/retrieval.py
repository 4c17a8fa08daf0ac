"""Image-text retrieval over a split: R@1, R@5, R@10 and median rank, both ways."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float, Int

from vlp.core import check
from vlp.core import mesh as meshes
from vlp.core.types import Apply, Result
from vlp.evals import io as ios


@dataclasses.dataclass(frozen=True)
class Retrieval:
    """Every image against every text of `split`. gallery: how many queries the report shows."""

    split: str = "test"
    batch: int = 64
    every_steps: int = 0
    gallery: int = 12

    def __post_init__(self) -> None:
        bounds = {"gallery": (self.gallery >= 0, "at least 0")}
        check.bounds("config.evals: retrieval", self, bounds)

    def asks(self, apply: Apply, image: jax.Array, text: jax.Array) -> Any:
        """What is asked of the model for one batch."""
        return _embed(apply, image, text)

    def __call__(self, apply: Apply, mesh: Mesh, io: ios.IO) -> Iterator[Result]:
        dataset = io.open(self.split)
        zi_NE, zt_NE = embed(apply, dataset, self.batch, mesh)
        scores_NN = zi_NE.astype(np.float64) @ zt_NE.T.astype(np.float64)
        where = io.provenance(dataset)
        ranks = {"i2t": rank_of_pair(scores_NN), "t2i": rank_of_pair(scores_NN.T)}
        for name, ranks_N in ranks.items():
            for k in (1, 5, 10):
                yield Result(f"{name}/R@{k}", float((ranks_N <= k).mean()), where)
            yield Result(f"{name}/median_rank", float(np.median(ranks_N)), where)
        if self.gallery:
            io.write(f"retrieval_{self.split}", _gallery(dataset, scores_NN, ranks, self.gallery))


def embed(apply: Apply, dataset: Any, batch: int, mesh: Mesh) -> tuple[np.ndarray, np.ndarray]:
    """Image and text embeddings of all records, in record order."""
    run = apply.jit(_embed)
    images, texts = [], []
    for rows, mask_B in ios.batches(dataset, batch, mesh):
        zi_BE, zt_BE = run(rows["image"], rows["text"])
        images.append(meshes.to_host(zi_BE)[mask_B])
        texts.append(meshes.to_host(zt_BE)[mask_B])
    return np.concatenate(images), np.concatenate(texts)


def _embed(apply: Apply, image: jax.Array, text: jax.Array) -> tuple[jax.Array, jax.Array]:
    return apply("image", image)["embed"], apply("text", text)["embed"]


def rank_of_pair(scores_NN: Float[np.ndarray, "N N"]) -> Int[np.ndarray, "N"]:
    """Rank (1 is best) of entry (k, k) in row k; a tie counts against it, and so does NaN: a constant or broken
    model has rank N."""
    return (~(scores_NN < np.diagonal(scores_NN)[:, None])).sum(axis=1)


def _gallery(
    dataset: Any, scores_NN: np.ndarray, ranks: dict[str, np.ndarray], num: int
) -> dict[str, Any]:
    shown = np.linspace(0, len(scores_NN) - 1, min(num, len(scores_NN))).astype(int).tolist()

    def image(i: int) -> str:
        return ios.data_uri(dataset.eval_batch(i, 1)["image"][0])

    def caption(i: int) -> str:
        return dataset.reference(i)

    queries = []
    for i in shown:
        texts, images = (np.argsort(-row)[:5].tolist() for row in (scores_NN[i], scores_NN[:, i]))
        queries.append({
            "image": image(i),
            "caption": caption(i),
            "key": dataset.keys([i])[0],
            "rank_i2t": int(ranks["i2t"][i]),
            "rank_t2i": int(ranks["t2i"][i]),
            "top_texts": [
                {"caption": caption(j), "score": float(scores_NN[i, j]), "right": bool(i == j)} for j in texts
            ],
            "top_images": [
                {"image": image(j), "caption": caption(j), "score": float(scores_NN[j, i]), "right": bool(i == j)}
                for j in images
            ],
        })  # fmt: skip
    return {
        "kind": "retrieval",
        "split": dataset.data.split,
        "num": len(scores_NN),
        "queries": queries,
        "similarity": scores_NN[np.ix_(shown, shown)]
        .round(4)
        .tolist(),  # image × caption, of the queries
    }
