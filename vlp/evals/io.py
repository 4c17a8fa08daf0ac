"""An evaluator's input and output: data prepared as in training, and a place for its artefacts.

Both the training loop and `vlp eval` call `run`. Not here: what an evaluator computes.
"""

from __future__ import annotations

import base64
import dataclasses
import functools
import hashlib
import io as bytes_io
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from vlp.core import check, interrupt, local, paths, tree
from vlp.core import mesh as meshes
from vlp.core.types import Apply, Evaluator, Result
from vlp.data.config import Data
from vlp.data.dataset import Dataset, open_dataset
from vlp.data.leaves import READS
from vlp.data.text_ops import BadCaption
from vlp.data.tokenizer import Tokenizer

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Source:
    """An evaluator's own data: `config.evals.<label>.data`. Images and texts are prepared as the checkpoint's are.

    path: a dataset in any format (docs/data.md); "": the run's own. source: one of vlp.data.SOURCES ("": records and
    files, with a path). langs: languages of captions; (): any with a path, else the run's. ids: a file with the key of
    a record on each line: only these records, in this order. lines: each line of a caption is a caption of its own
    (CLIP_benchmark's retrieval sets). num_records: of source "shapes" (0: the run's).
    """

    path: str = ""
    source: str = ""
    langs: tuple[str, ...] = ()
    ids: str = ""
    lines: bool = False
    num_records: int = 0

    def of(self, data: Data) -> Data:
        """Returns the run's data with this source in its place."""
        given = {
            k: v for k in ("path", "source", "langs", "num_records") if (v := getattr(self, k))
        }
        if self.path or self.source:
            own: dict[str, Any] = {"source": "records", "mixture": (), "reweight": (), "langs": ()}
            own |= {"skip": "", "caption_sources": ()}  # of the run's own records
            given = own | given
        return dataclasses.replace(data, **given)


@dataclasses.dataclass(frozen=True)
class IO:
    """data: preprocessing as trained. write(name, dict): keeps an artefact (a gallery) for the report.

    own: of an evaluator with data of its own.
    """

    data: Data
    tokenizer: Tokenizer
    write: Callable[[str, dict[str, Any]], None] = lambda name, artefact: None
    own: Source = Source()

    def of(self, evaluator: Any) -> IO:
        """Returns the `IO` whose data is the evaluator's own, if it has any."""
        own = getattr(evaluator, "data", None)
        if not isinstance(own, Source):
            return self
        return dataclasses.replace(self, data=own.of(self.data), own=own)

    def open(self, split: str) -> Dataset:
        """Opens a split for evaluation: the first caption, all records (or those of `ids`), in record order.

        Of a mixture, those parts that have the split; raises UserError if none has.
        """
        parts = tuple(dataclasses.replace(p, split="", skip="") for p in self.data.mixture)
        data = dataclasses.replace(
            self.data, split=split, captions="first", num_captions=1, skip="", group_by="",
            mixture=parts, reweight=(),
        )  # fmt: skip
        dataset = _open(data, self.tokenizer, os.getcwd())
        if self.own.lines:
            dataset = _in_lines(dataset)
        return _with_keys(dataset, self.own.ids) if self.own.ids else dataset

    def provenance(self, dataset: Dataset) -> dict[str, Any]:
        """Returns the split, its number of records and its fingerprint, and how images and texts were prepared."""
        data = dataset.data
        where = {
            "split": data.split,
            "num": dataset.num_records,
            "fingerprint": dataset.fingerprint,
        }
        if data.langs:
            where["langs"] = "+".join(data.langs)
        return where | {"preprocessing": preprocessing(data)}


def preprocessing(data: Data) -> str:
    """Returns in words how evaluations prepare images and texts."""
    return f"{data.eval_crop} crop, {data.resize}, {data.image_px} px, {data.text_len} tokens"


def run(
    evals: Mapping[str, Evaluator], label: str, apply: Apply, mesh: Mesh, io: IO
) -> list[Result]:
    """Runs one evaluation.

    Args:
        evals: all evaluations, by name in the config.
        label: the name of the one to run.
        apply: the model.
        mesh: of the devices that share the work.
        io: the run's data, and where artefacts go.

    Returns:
        Its results; the provenance of each also has the dtype that the model computes in.
    """
    found = list(evals[label](apply, mesh, own(evals, label, io)))
    dtype = getattr(getattr(apply.model, "image_tower", apply.model), "dtype", "float32")
    more = {"dtype": dtype if isinstance(dtype, str) else np.dtype(dtype).name}
    return [dataclasses.replace(r, provenance=more | dict(r.provenance)) for r in found]


def own(evals: Mapping[str, Evaluator], label: str, io: IO) -> IO:
    """Returns the `IO` of one evaluation: its own data, and artefacts with names of their own.

    Of two evaluations of one kind, split and `label`, the second would replace the artefacts of the first. So their
    names end in the evaluation's name in the config, which is also the artefact's "eval".

    Args:
        evals: all evaluations, by name in the config.
        label: the name of the one that gets the `IO`.
        io: what all of them share.
    """
    io = io.of(evals[label])
    kind = lambda e: (type(e), e.split, getattr(e, "label", None))
    if sum(kind(e) == kind(evals[label]) for e in evals.values()) < 2:
        return io
    write = lambda name, value: io.write(f"{name}_{label}", value | {"eval": label})
    return dataclasses.replace(io, write=write)


FILES = ("path", "images", "class_set", "template_set", "frequency")  # fields that name a file


def located(evaluator: Any, cwd: str) -> Any:
    """Returns the evaluator; relative paths in it start at `cwd`, where such files are."""

    one = functools.partial(paths.found_from, cwd)
    changes: dict[str, Any] = {
        k: one(v) for k in FILES if isinstance(v := getattr(evaluator, k, None), str)
    }
    if isinstance(own := getattr(evaluator, "data", None), Source):
        changes["data"] = dataclasses.replace(own, path=one(own.path), ids=one(own.ids))
    return dataclasses.replace(evaluator, **changes) if changes else evaluator


def digest(lines: Sequence[str]) -> str:
    """Returns 16 hexadecimal digits of the SHA-256 of the lines, each with a line end."""
    return hashlib.sha256("".join(f"{line}\n" for line in lines).encode()).hexdigest()[:16]


def digest_params(params: Any) -> str:
    """Returns 16 hexadecimal digits of the SHA-256 of all parameters: equal weights, equal digits, in any format."""
    found = hashlib.sha256()
    for name, value in sorted(tree.named(params).items()):
        array = np.ascontiguousarray(meshes.to_host(value))
        found.update(f"{name} {array.dtype} {array.shape}\n".encode())
        found.update(array.reshape(-1).view(np.uint8).data)
    return found.hexdigest()[:16]


def lines_of(path: str, where: str) -> list[str]:
    """Returns the lines of a text file, without those that are blank. Raises UserError if there is none."""
    try:
        with open(path, encoding="utf-8-sig") as f:
            found = [line.rstrip("\r\n") for line in f if line.strip()]
    except (OSError, UnicodeDecodeError) as e:
        do = "correct the path" if isinstance(e, OSError) else "save it as UTF-8"
        raise check.error(where, f"{path!r} ({e!s:.60})", "a text file", do) from None
    if not found:
        raise check.error(where, f"the empty file {path!r}", "a line of text", "fill it")
    return found


def check_ready(evaluator: Evaluator, mesh: Mesh, io: IO, where: str) -> None:
    """Raises UserError for data or a mesh on which the evaluator would fail later, after hours of training."""
    meshes.check_batch(evaluator.batch, mesh, where=f"{where}.batch")
    io = io.of(evaluator)
    if not getattr(evaluator, "reads_dataset", True):
        evaluator.check(io, where)  # type: ignore[attr-defined]
        return
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


@dataclasses.dataclass(frozen=True)
class Chosen:
    """Some records of a source, in any order; those of a class may have no caption."""

    source: Any
    ids: tuple[int, ...]
    fingerprint: str

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, i: int) -> dict[str, Any]:
        return self.source[self.ids[i]]

    def caption(self, i: int) -> str:
        """The record's first own caption, if it has any."""
        captions = self.source[self.ids[i]].get("captions") or [{"text": ""}]
        return captions[0]["text"]


def subset(dataset: Dataset, ids: Sequence[int], fingerprint: str = "") -> Dataset:
    """Returns the dataset of some records. fingerprint: of these; "": the whole dataset's."""
    data = dataclasses.replace(dataset.data, mixture=())
    source = Chosen(dataset.source, tuple(ids), fingerprint or dataset.fingerprint)
    return Dataset(data, source, dataset.tokenizer)


@dataclasses.dataclass(frozen=True)
class Lines:
    """A source each line of whose captions is a caption of its own."""

    source: Any

    @property
    def fingerprint(self) -> str:
        return self.source.fingerprint

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, i: int) -> dict[str, Any]:
        record = self.source[i]
        captions = record.get("captions") or []
        split = [c | {"text": line} for c in captions for line in c["text"].splitlines()]
        return record | {"captions": split}


@functools.lru_cache(maxsize=8)
def _in_lines(dataset: Dataset) -> Dataset:
    """Returns the dataset whose captions are split at line ends."""
    data = dataclasses.replace(dataset.data, mixture=())
    return Dataset(data, Lines(dataset.source), dataset.tokenizer)


@functools.lru_cache(maxsize=8)
def _with_keys(dataset: Dataset, file: str) -> Dataset:
    """Returns the records whose keys a file lists. Raises UserError for a key that is missing or listed twice."""
    where = "config.evals: data.ids"
    keys = [line.strip() for line in lines_of(file, where)]
    if len(set(keys)) < len(keys):
        twice = next(k for i, k in enumerate(keys) if k in keys[:i])
        raise check.error(where, f"{twice!r} twice in {file}", "each key once", "remove one")
    place = {dataset.key(i): i for i in range(dataset.num_records)}
    if missing := [k for k in keys if k not in place]:
        some = f"{len(missing)} of {len(keys)} keys of {file} missing ({missing[0]!r}, …)"
        expected = (
            f"keys of {dataset.data.path or dataset.data.source!r}, such as {next(iter(place))!r}"
        )
        raise check.error(where, some, expected, "give the file of this split")
    return subset(dataset, [place[k] for k in keys], digest([dataset.fingerprint, *keys]))


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
