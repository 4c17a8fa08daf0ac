"""Image-text retrieval over a split: R@1, R@5, R@10 and median rank, both ways."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from vlp.core import check
from vlp.core import mesh as meshes
from vlp.core.types import Apply, Result
from vlp.data.dataset import Dataset
from vlp.evals import embed, ranks
from vlp.evals import io as ios


@dataclasses.dataclass(frozen=True)
class Retrieval:
    """Every image against every caption of `split`.

    num_captions: captions of an image that count, each a query of its own; 1: the first, 0: all. An image finds its
    text if any of its captions is among the first k (Karpathy's protocol: 5). A tie counts against the model. Omitted
    and counted with bad_records "replace": images that cannot be read or have no caption (num_bad). gallery: how many
    queries the report shows. tile: see `ranks.ranks`. data: another dataset, or some records of it by `data.ids`.
    """

    split: str = "test"
    batch: int = 64
    every_steps: int = 0
    gallery: int = 12
    num_captions: int = 1
    tile: int = 4096
    data: ios.Source = ios.Source()

    def __post_init__(self) -> None:
        bounds = {
            "gallery": (self.gallery >= 0, "at least 0"),
            "num_captions": (0 <= self.num_captions <= embed.MOST, f"in 0 … {embed.MOST:,}"),
            "tile": ranks.rule(self.tile),
        }
        check.bounds("config.evals: retrieval", self, bounds)

    def asks(self, apply: Apply, image: jax.Array, text: jax.Array) -> Any:
        """What is asked of the model for one batch."""
        return embed.image(apply, image), embed.text(apply, text)

    def __call__(self, apply: Apply, mesh: Mesh, io: ios.IO) -> Iterator[Result]:
        dataset, zi_NE, zt_ME, owner_M = self.embeddings(apply, mesh, io.open(self.split))
        ranks_N, ranks_M = ranks.ranks(zi_NE, zt_ME, owner_M, mesh, self.tile)
        where = io.provenance(dataset)
        if self.num_captions != 1:
            num_bad = io.open(self.split).num_records - dataset.num_records
            where |= {"num_captions": len(zt_ME), "num_bad": num_bad}
        yield from ranks.results((ranks_N, ranks_M), where)
        if self.gallery:
            captions = embed.Captions(dataset, self.num_captions)
            shown = Shown(dataset, captions, zi_NE, zt_ME, owner_M, ranks_N, ranks_M)
            io.write(f"retrieval_{self.split}", gallery(shown, self.gallery))

    def embeddings(
        self, apply: Apply, mesh: Mesh, dataset: Dataset
    ) -> tuple[Dataset, np.ndarray, np.ndarray, np.ndarray]:
        """Returns the records that count, the embeddings of their images and captions, and each caption's image."""
        if self.num_captions == 1:
            zi_NE, zt_NE = pairs(apply, dataset, self.batch, mesh)
            return dataset, zi_NE, zt_NE, np.arange(len(zt_NE))
        captions = embed.Captions(dataset, self.num_captions)
        zi_NE, good_N = embed.images(apply, dataset, self.batch, mesh)
        good, owner = np.flatnonzero(good_N), []
        zt_ME = embed.texts(apply, captions.ids(good.tolist(), owner), self.batch, mesh)
        kept, owner_M = np.unique(np.array(owner), return_inverse=True)
        if len(kept) < dataset.num_records:
            dataset = ios.subset(dataset, good[kept].tolist())
        return dataset, zi_NE[good[kept]], zt_ME, owner_M


def pairs(apply: Apply, dataset: Any, batch: int, mesh: Mesh) -> tuple[np.ndarray, np.ndarray]:
    """Embeddings of all images and of the first caption of each, in record order."""
    run = apply.jit(_pair)
    images, texts = [], []
    for rows, mask_B in ios.batches(dataset, batch, mesh):
        zi_BE, zt_BE = run(rows["image"], rows["text"])
        images.append(meshes.to_host(zi_BE)[mask_B])
        texts.append(meshes.to_host(zt_BE)[mask_B])
    return np.concatenate(images), np.concatenate(texts)


def _pair(apply: Apply, image: jax.Array, text: jax.Array) -> tuple[jax.Array, jax.Array]:
    return embed.image(apply, image), embed.text(apply, text)


@dataclasses.dataclass(frozen=True)
class Shown:
    """What a gallery shows: the split, its embeddings, and the ranks."""

    dataset: Any
    captions: embed.Captions
    images_NE: np.ndarray
    texts_ME: np.ndarray
    owner_M: np.ndarray
    ranks_N: np.ndarray
    ranks_M: np.ndarray

    def image(self, i: int) -> str:
        """Image i as a data URI."""
        return ios.data_uri(self.dataset.eval_batch(i, 1, reads=("image",))["image"][0])

    def caption(self, j: int) -> str:
        """Text j."""
        record = int(self.owner_M[j])
        if self.captions.num == 1:
            return self.dataset.reference(record)
        return self.captions.of(record)[j - int(np.searchsorted(self.owner_M, record))]


def gallery(shown: Shown, num: int) -> dict[str, Any]:
    """The artefact: `num` images and the first caption of each, with the best answers to both."""
    total = len(shown.images_NE)
    chosen = np.linspace(0, total - 1, min(num, total)).astype(int).tolist()
    firsts = [int(np.searchsorted(shown.owner_M, i)) for i in chosen]
    queries = []
    for i, j in zip(chosen, firsts):
        texts = ranks.top(shown.images_NE[i], shown.texts_ME, 5)
        images = ranks.top(shown.texts_ME[j], shown.images_NE, 5)
        queries.append({
            "image": shown.image(i),
            "caption": shown.caption(j),
            "key": shown.dataset.keys([i])[0],
            "rank_i2t": int(shown.ranks_N[i]),
            "rank_t2i": int(shown.ranks_M[j]),
            "top_texts": [
                {"caption": shown.caption(m), "score": s, "right": int(shown.owner_M[m]) == i}
                for m, s in zip(*texts)
            ],
            "top_images": [
                {
                    "image": shown.image(n),
                    "caption": shown.caption(int(np.searchsorted(shown.owner_M, n))),
                    "score": s,
                    "right": n == i,
                }
                for n, s in zip(*images)
            ],
        })  # fmt: skip
    similarity = shown.images_NE[chosen].astype(np.float64) @ shown.texts_ME[firsts].T
    return {
        "kind": "retrieval",
        "split": shown.dataset.data.split,
        "num": total,
        "queries": queries,
        "similarity": similarity.round(4).tolist(),  # image × caption, of the queries
    }
