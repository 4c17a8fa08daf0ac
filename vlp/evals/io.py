"""An evaluator's input and output: data prepared as in training, and a place for its artefacts."""

from __future__ import annotations

import base64
import dataclasses
import functools
import io as bytes_io
import logging
import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from vlp.core import check, interrupt, local
from vlp.core import mesh as meshes
from vlp.core.types import Apply, Evaluator
from vlp.data.config import Data
from vlp.data.dataset import Dataset, open_dataset
from vlp.data.leaves import READS
from vlp.data.text_ops import BadCaption
from vlp.data.tokenizer import Tokenizer

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class IO:
    """data: preprocessing as trained. write(name, dict): keeps an artefact (a gallery) for the report."""

    data: Data
    tokenizer: Tokenizer
    write: Callable[[str, dict[str, Any]], None] = lambda name, artefact: None

    def open(self, split: str) -> Dataset:
        """Opens a split for evaluation: the first caption, all records, in record order.

        Of a mixture, those parts that have the split; raises UserError if none has.
        """
        parts = tuple(dataclasses.replace(p, split="", skip="") for p in self.data.mixture)
        data = dataclasses.replace(
            self.data, split=split, captions="first", num_captions=1, skip="", group_by="",
            mixture=parts, reweight=(),
        )  # fmt: skip
        return _open(data, self.tokenizer, os.getcwd())

    def provenance(self, dataset: Dataset) -> dict[str, Any]:
        return {
            "split": dataset.data.split,
            "num": dataset.num_records,
            "fingerprint": dataset.fingerprint,
        }


def own_names(evals: Mapping[str, Evaluator], label: str, io: IO) -> IO:
    """Returns an `IO` whose artefacts have names of their own.

    Of two evaluations of one kind, split and `label`, the second would replace the artefacts of the first. So their
    names end in the evaluation's name in the config, which is also the artefact's "eval".

    Args:
        evals: all evaluations, by name in the config.
        label: the name of the one that gets the `IO`.
        io: what all of them share.
    """
    kind = lambda e: (type(e), e.split, getattr(e, "label", None))
    if sum(kind(e) == kind(evals[label]) for e in evals.values()) < 2:
        return io
    write = lambda name, value: io.write(f"{name}_{label}", value | {"eval": label})
    return dataclasses.replace(io, write=write)


def check_ready(evaluator: Evaluator, mesh: Mesh, io: IO, where: str) -> None:
    """Raises UserError for data or a mesh on which the evaluator would fail later, after hours of training."""
    meshes.check_batch(evaluator.batch, mesh, where=f"{where}.batch")
    dataset = io.open(evaluator.split)
    if getattr(evaluator, "reads_captions", True):
        check_captions(dataset, f"{where}.split")
    if (more := getattr(evaluator, "check", None)) is not None:
        more(io, where)


def check_asks(evaluator: Evaluator, apply: Apply, data: Data, where: str) -> None:
    """Raises UserError unless the model answers what the evaluator asks of it for a batch; computes nothing.

    Args:
        evaluator: One without `asks` is not checked.
        apply: Parameters may be shapes.
        data: Sizes of images and texts.
        where: The evaluator's place in the config.
    """
    if (asks := getattr(evaluator, "asks", None)) is None:
        return
    num = evaluator.batch
    image = jax.ShapeDtypeStruct((num, data.image_px, data.image_px, 3), np.uint8)
    text = jax.ShapeDtypeStruct((num, data.text_len), np.int32)
    ask = lambda params, *batch: asks(dataclasses.replace(apply, params=params), *batch)
    try:
        jax.eval_shape(ask, apply.params, image, text)
    except check.UserError as e:
        raise check.UserError(f"{where}: {e}, or drop this evaluation") from None
    except Exception as e:
        raise check.bug(f"{where}: {type(evaluator).__name__}.asks", e) from e


def check_captions(dataset: Dataset, where: str, num: int = 64) -> None:
    """Raises UserError if some of `num` records, spread over the split, have no caption that could be read."""
    looked = np.unique(np.linspace(0, dataset.num_records - 1, num, dtype=np.int64))
    bad = 0
    for i in looked.tolist():
        try:
            dataset.captions(i)
        except BadCaption:
            bad += 1
        except Exception:  # one that cannot be read: the evaluation says so, or replaces it
            continue
    if bad and (bad == len(looked) or dataset.data.bad_records == "error"):
        got = f"{dataset.data.split!r}, in which {bad} of {len(looked)} records looked at have none"
        expected = "records with a caption in config.data.langs"
        raise check.error(
            where, got, expected, "name another split or further langs, or drop this evaluation"
        )


@functools.lru_cache(maxsize=8)
def _open(data: Data, tokenizer: Tokenizer, _where: str) -> Dataset:
    """Opens a split once. _where: the working directory, on which relative paths depend."""
    parts, first = [], None
    for part in data.mixture:
        try:
            open_dataset(dataclasses.replace(data, mixture=(part,)), tokenizer)
            parts.append(part)
        except check.UserError as e:
            first = first or e
            log.warning("evaluation: part %r of the mixture is left out: %s", part.name, e)
    if first is not None and not parts:
        raise first
    return open_dataset(dataclasses.replace(data, mixture=tuple(parts)), tokenizer)


def batches(
    dataset: Dataset, batch: int, mesh: Mesh, *, reads: tuple[str, ...] = READS
) -> Iterator[tuple[dict[str, jax.Array], np.ndarray]]:
    """One pass: (global device batch, mask over its rows on the host). The last batch is filled up and masked.

    reads: names of leaves; without "text", records need no captions.
    """
    meshes.check_batch(batch, mesh, where="config.evals: batch")
    mine = local.rows(batch, mesh)
    for i, leaves in enumerate(dataset.eval_iter(batch, mine, reads=reads)):
        interrupt.poll()
        mask_B = np.arange(i * batch, (i + 1) * batch) < dataset.num_records
        yield meshes.to_global(leaves, mesh), mask_B


def data_uri(image: np.ndarray) -> str:
    """A u8 image as a PNG data URI."""
    from PIL import Image

    out = bytes_io.BytesIO()
    Image.fromarray(image).save(out, "PNG")
    return "data:image/png;base64," + base64.b64encode(out.getvalue()).decode()
