"""What an evaluator is given beside the model: data prepared as in training, and a place for its artefacts."""

from __future__ import annotations

import base64
import dataclasses
import functools
import io as bytes_io
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from vlp.core import local
from vlp.core import mesh as meshes
from vlp.core.types import Evaluator
from vlp.data.loader import Data, Dataset, open_dataset
from vlp.data.tokenizer import Tokenizer
from vlp.models.answers import check_needs


@dataclasses.dataclass(frozen=True)
class IO:
    """data: preprocessing as trained. write(name, dict): keeps an artefact (a gallery) for the report."""

    data: Data
    tokenizer: Tokenizer
    write: Callable[[str, dict[str, Any]], None] = lambda name, artefact: None

    def open(self, split: str) -> Dataset:
        return _open(dataclasses.replace(self.data, split=split, captions="first"), self.tokenizer)

    def provenance(self, dataset: Dataset) -> dict[str, Any]:
        return {
            "split": dataset.data.split,
            "num": dataset.num_records,
            "fingerprint": dataset.fingerprint,
        }


def check_ready(evaluator: Evaluator, model: Any, mesh: Mesh, io: IO, where: str) -> None:
    """Raises UserError for whatever would stop the evaluator after hours of training."""
    meshes.check_batch(evaluator.batch, mesh, where=f"{where}.batch")
    do = "drop this evaluation or change config.model"
    check_needs(model, evaluator.needs, io.data.image_px, io.data.text_len, where, do)
    io.open(evaluator.split)
    if (more := getattr(evaluator, "check", None)) is not None:
        more(io, where)


@functools.lru_cache(maxsize=8)
def _open(data: Data, tokenizer: Tokenizer) -> Dataset:
    return open_dataset(data, tokenizer)


def batches(
    dataset: Dataset, batch: int, mesh: Mesh, *, texts: bool = True
) -> Iterator[tuple[dict[str, jax.Array], np.ndarray]]:
    """One pass: (global device batch, mask over its rows on the host). The last batch is filled up and masked.

    Without `texts`, records need no captions, and their texts are empty.
    """
    meshes.check_batch(batch, mesh, where="config.evals: batch")
    mine = local.rows(batch, mesh)
    for i, leaves in enumerate(dataset.eval_iter(batch, mine, texts=texts)):
        mask_B = np.arange(i * batch, (i + 1) * batch) < dataset.num_records
        yield meshes.to_global(leaves, mesh), mask_B


def data_uri(image: np.ndarray) -> str:
    """A u8 image as a PNG data URI."""
    from PIL import Image

    out = bytes_io.BytesIO()
    Image.fromarray(image).save(out, "PNG")
    return "data:image/png;base64," + base64.b64encode(out.getvalue()).decode()
