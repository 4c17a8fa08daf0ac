"""Embeddings of a split's images and of any texts, streamed in batches over all devices."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Iterator, Sequence

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Bool, Float

from vlp.core import check, interrupt, local
from vlp.core import mesh as meshes
from vlp.core.types import Apply
from vlp.data import draws, order, text_ops
from vlp.data.dataset import Dataset
from vlp.evals import io as ios

MOST = 2**10  # captions of an image


def images(
    apply: Apply, dataset: Dataset, batch: int, mesh: Mesh, output: str = "embed"
) -> tuple[Float[np.ndarray, "N E"], Bool[np.ndarray, "N"]]:
    """Embeddings of all records' images, in record order, and whether each is the record's own (no substitute's).

    output: what to take of the model's answer: "embed", or "pooled", which is before the projection.
    """
    run, found, used = apply.jit(image, output=output), [], []
    for rows, mask_B in ios.batches(dataset, batch, mesh, reads=("image",)):
        found.append(meshes.to_host(run(rows["image"]))[mask_B])
        used.append(order.join_words(meshes.to_host(rows["record"]))[mask_B])
    return np.concatenate(found), np.concatenate(used) == np.arange(dataset.num_records)


def texts(
    apply: Apply, ids: Iterable[np.ndarray], batch: int, mesh: Mesh
) -> Float[np.ndarray, "M E"]:
    """Embeddings of texts.

    Args:
        apply: the model.
        ids: i32[L] of each text; read once, a batch at a time. The same on every host.
        batch: texts at a time.
        mesh: of the devices that share them.
    """
    run, found, rows = apply.jit(text), [], iter(ids)
    mine_b = local.indices(batch, mesh)
    while some := list(itertools.islice(rows, batch)):
        interrupt.poll()
        mine_bL = np.stack(some)[np.minimum(mine_b, len(some) - 1)].astype(np.int32)
        zt_BE = meshes.to_host(run(meshes.to_global({"text": mine_bL}, mesh)["text"]))
        found.append(zt_BE[: len(some)])
    return np.concatenate(found)


def image(apply: Apply, image: jax.Array, *, output: str = "embed") -> jax.Array:
    """One batch of images. Raises UserError for a model that does not pool them."""
    found = apply("image", image)[output]
    if found is None:
        do = "set config.model.image_tower.pool to 'cls' or 'mean', or use features='embed'"
        raise check.error("config.model", f"no {output!r} of images", "a pooled output", do)
    return found.astype(np.float32)


def text(apply: Apply, text: jax.Array) -> jax.Array:
    """One batch of texts."""
    return apply("text", text)["embed"].astype(np.float32)


def unit(z: np.ndarray) -> np.ndarray:
    """Rows of length 1, in float64; a row of zeros stays."""
    z = z.astype(np.float64)
    return z / np.maximum(np.linalg.norm(z, axis=-1, keepdims=True), 1e-12)


@dataclasses.dataclass(frozen=True)
class Captions:
    """All captions of a split, up to `num` an image (0: up to 1,024): their images, and ids when iterated."""

    dataset: Dataset
    num: int

    def of(self, record: int) -> list[str]:
        """Returns the captions of a record, in the wanted languages. Raises: `text_ops.BadCaption`."""
        dataset = self.dataset
        data = dataclasses.replace(dataset.data, num_captions=self.num or MOST)
        blank = getattr(dataset.tokenizer, "is_blank", text_ops.is_invisible)
        sources = {c.name: c.weight for c in data.caption_sources}
        found = dataset.source[record]
        return draws.captions_of(found, data, "all", sources=sources, is_blank=blank)

    def good(self, records: Iterable[int]) -> Iterator[tuple[int, list[str]]]:
        """Yields records with their captions; those without are left out if `bad_records` is "replace"."""
        for i in records:
            try:
                yield i, self.of(i)
            except text_ops.BadCaption:
                if self.dataset.data.bad_records == "error":
                    raise
            except check.Failed:
                raise
            except Exception as e:  # by source, where a record cannot be read
                if self.dataset.data.bad_records == "error":
                    got = f"record {i}, which cannot be read ({type(e).__name__}: {e!s:.80})"
                    do = "repair the data, or set config.data.bad_records='replace'"
                    raise check.error("config.evals: split", got, "good records", do) from e

    def ids(self, records: Sequence[int], owner: list[int]) -> Iterator[np.ndarray]:
        """Yields the ids of each caption; to `owner` its place in `records` is added."""
        place = {record: k for k, record in enumerate(records)}
        for i, found in self.good(records):
            for caption in found:
                owner.append(place[i])
                yield self.dataset.tokenizer.encode(caption, self.dataset.data.text_len)
