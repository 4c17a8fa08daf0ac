"""The `Dataset`: maps positions of the sample stream to batches of NumPy arrays; mixtures.

The pipeline's element is one host's rows of one global batch, computed only from the batch's number. So the content of
a batch does not depend on hosts, workers or threads, no sample is dropped, and a run resumes at any `start`.

Not here: the order (order.py, stages.py), one row (samples.py), threads and processes (pipeline.py), device arrays
(core/mesh.py).
"""

import contextlib
import dataclasses
import functools
import logging
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from vlp.core import check
from vlp.core.appended import Appended
from vlp.core.plugins import Plugin
from vlp.data import SOURCES, groups, leaves, order, pipeline, samples, storage, text_ops
from vlp.data import quarantine as quarantine_lib
from vlp.data import tokenizer as tokenizers
from vlp.data.config import Data, check_data
from vlp.data.draws import Draws, captions_of
from vlp.data.loader_stats import BAD, HEADER, STAGES, STATS, LoaderStats, measured
from vlp.data.sources.combined import Concatenated, without
from vlp.data.stages import Begin, mixture_of

log = logging.getLogger(__name__)


def open_dataset(
    data: Data,
    tokenizer: tokenizers.Tokenizer | None = None,
    reads: Iterable[str] = leaves.READS,
    plugins: Sequence[Plugin] = (),
) -> "Dataset":
    """Opens and checks the data.

    Args:
        data: the config section.
        tokenizer: replaces that of the config (for instance with a checkpoint's).
        reads: names of the leaves to make (`leaves.find`).
        plugins: modules with further LEAVES.

    Raises:
        UserError: an invalid config, unreadable data, or a leaf that none of 64 inspected records can fill.
    """
    if data.source not in SOURCES:
        raise check.unknown("config.data.source", data.source, SOURCES)
    check_data(data)
    found = leaves.find(data, reads, plugins)
    source = _open_mixture(data) if data.mixture else _open_one(data)
    if tokenizer is None and data.tokenizer:
        tokenizer = tokenizers.load(data.tokenizer)
    _look(data, source, found)
    words = _with_row(source.tokenizer() if tokenizer is None else tokenizer, data)
    return Dataset(data, source, words, reads=tuple(reads), plugins=tuple(plugins))


def _with_row(tokenizer: Any, data: Data) -> Any:
    """The tokenizer with what the config says of its rows. Raises UserError if it cannot have it."""
    fields = {"bos": data.bos, "fill": data.fill, "clean": data.clean}
    changes = {k: v for k, v in fields.items() if v not in (None, "")}
    if not changes:
        return tokenizer
    if not hasattr(tokenizer, "with_row"):
        where, do = f"config.data.{next(iter(changes))}", "leave it out"
        raise check.error(where, changes, "a tokenizer of vlp, whose rows can change", do)
    text_ops.check_clean("config.data.clean", changes.get("clean", "none"))
    return tokenizer.with_row(**changes)


def _look(data: Data, source: Any, found: Sequence[leaves.Leaf], num: int = 64) -> None:
    """Inspects `num` records, evenly spaced, for the optional fields that the config uses.

    Warns of a name in `caption_sources` that no inspected record has, since it may be mistyped. Raises UserError if all
    inspected records lack a leaf's field.
    """
    optional: list[Any] = [leaf for leaf in found if hasattr(leaf, "is_missing")]
    if not (data.caption_sources or optional) or not len(source):
        return
    rows = []
    for i in np.linspace(0, len(source) - 1, min(num, len(source)), dtype=np.int64).tolist():
        with contextlib.suppress(ValueError):
            rows.append(source[i])
    seen = {c.get("source") for row in rows for c in row.get("captions") or ()}
    if missing := sorted({c.name for c in data.caption_sources} - seen):
        have = sorted(map(str, seen))
        text = "config.data.caption_sources: got %s, in none of %d records looked at, which have %s"
        log.warning(text, missing, len(rows), have)
    for leaf in optional:
        if rows and all(leaf.is_missing(row, data) for row in rows):
            names = " and ".join(leaf.spec(data, 1))
            got = f"nothing for {names} in {len(rows)} records looked at (fields {sorted(rows[0])})"
            do = "convert the data with that field, or change config.objective"
            raise check.error(f"data {data.path or data.source}", got, "it in some of them", do)


def _open_one(data: Data) -> Any:
    source = SOURCES[data.source](data)
    return without(source, data.skip) if data.skip else source


def _open_mixture(data: Data) -> "Concatenated":
    parts = []
    for part in data.mixture:
        given = {k: v for k, v in dataclasses.asdict(part).items() if v and hasattr(data, k)}
        if given.get("source", data.source) not in SOURCES:
            raise check.unknown(f"config.data.mixture {part.name!r}", part.source, SOURCES)
        parts.append(_open_one(dataclasses.replace(data, mixture=(), **given)))
    return Concatenated(tuple(parts))


class Dataset:
    """One split, read in batches. Picklable, and safe to use from several threads.

    A batch is a dict of NumPy arrays with the b rows of this host: the leaves in `reads` (leaves.py), and
      mask    bool[b]        True; False on the rows that fill the last batch of an evaluation
      index   u32[b, 2]      the sample's position in the global stream, as (high, low) words
      record  u32[b, 2]      its record id, likewise (`order.join_words` joins them)
    """

    def __init__(
        self,
        data: Data,
        source: Any,
        tokenizer: tokenizers.Tokenizer,
        begin: Begin = Begin(),
        reads: tuple[str, ...] = leaves.READS,
        plugins: tuple[Plugin, ...] = (),
    ):
        self.data, self.source, self.tokenizer, self.begin = data, source, tokenizer, begin
        self.reads, self.plugins = reads, plugins
        self._leaves = leaves.find(data, reads, plugins)
        self.num_records: int = len(source)
        self.fingerprint: str = source.fingerprint
        self.loader_stats = LoaderStats()
        self._mixture = mixture_of(data, source.sizes, begin) if data.mixture else None
        self._groups = groups.read(source, data.group_by) if data.group_by else None
        self._reader = samples.Reader(data, source)

    def __reduce__(self):  # without the cache: each worker fills its own
        args = (self.data, self.source, self.tokenizer, self.begin, self.reads, self.plugins)
        return Dataset, args

    @property
    def epoch_len(self) -> int:
        """Samples in an epoch: records, or groups of them."""
        return self._groups.num if self._groups else self.num_records

    def record_ids(self, start: int, count: int, seed: int) -> np.ndarray:
        """Returns i64[count], the records at stream positions start … start + count - 1."""
        return self._records(start, count, seed)[0]

    def _records(self, start: int, count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns the record ids and the epochs of stream positions from `start` on, i64[count] each."""
        shuffle = order.Shuffle.of(self.data)
        if self._mixture:
            return self._mixture.record_ids(start, count, seed, shuffle)
        start += sum(self.begin.given) - self.begin.position
        seed += sum(self.begin.orders)
        epoch_b = np.arange(start, start + count, dtype=np.int64) // self.epoch_len
        if self._groups:
            return self._groups.record_ids(start, count, seed, shuffle), epoch_b
        return order.record_ids(start, count, self.num_records, seed, shuffle), epoch_b

    def beginning(self, begin: Begin) -> "Dataset":
        """Returns the same data, but with its order starting at `begin`."""
        out = object.__new__(Dataset)
        out.__dict__ |= self.__dict__ | {"begin": begin}
        out._mixture = (
            mixture_of(self.data, self.source.sizes, begin) if self.data.mixture else None
        )
        return out

    def given(self, position: int) -> tuple[int, ...]:
        """Returns for each part how many of the run's samples before a stream position came from it."""
        if self._mixture:
            return tuple(self._mixture.counts(position).tolist())
        return (sum(self.begin.given) + position - self.begin.position,)

    def source_counts(self, position: int) -> dict[str, int]:
        """Returns {name of a mixture's part: number of the run's samples from it}; {} for other data."""
        before = self.begin.before or (0,) * len(self.data.mixture)
        counts = (n + more for n, more in zip(self.given(position), before))
        return dict(zip((p.name for p in self.data.mixture), counts))

    def laws(self) -> tuple[tuple, ...]:
        """Returns for each part a unique key of everything, except the seed, that its record order depends on."""
        parts = self.source.parts if isinstance(self.source, Concatenated) else (self.source,)
        names = [part.fingerprint for part in parts]
        how = (order.Shuffle.of(self.data), self.data.group_by)
        return tuple((name, names[:k].count(name), *how) for k, name in enumerate(names))

    def record(self, record_id: int) -> dict:
        """Returns a record with its image decoded: u8[H, W, 3]. Do not write into it."""
        return self._reader.decoded(int(record_id))

    def key(self, record_id: int) -> str:
        """Returns a record's key, or "record N" if the record cannot be read."""
        return self._reader.key(record_id)

    def reference(self, record_id: int) -> str:
        """Returns the caption that evaluations compare with: the first in the wanted languages."""
        return self._first_caption(self.record(record_id))[0]

    def captions(self, record_id: int) -> list[str]:
        """Returns [the reference caption], without decoding the image. Raises: `text_ops.BadCaption`."""
        return self._first_caption(self.source[record_id])

    def _first_caption(self, record: dict) -> list[str]:
        sources = {c.name: c.weight for c in self.data.caption_sources}
        draws = Draws(self.data, self.tokenizer, 0, 0, 0, training=False)
        return captions_of(record, self.data, "first", sources=sources, is_blank=draws.is_blank)

    def keys(self, record_ids: Sequence[int] | np.ndarray) -> list[str]:
        """Returns the keys of the records."""
        return [self.source[int(i)]["key"] for i in record_ids]

    def batch_at(
        self, start: int, batch: int, seed: int, rows: range | slice | None = None
    ) -> dict[str, np.ndarray]:
        """Returns rows of the global batch that begins at stream position `start`.

        A pure function of its arguments and the data. A leaf's random draws depend on the seed, the leaf's name and the
        sample's stream position (for captions: on the epoch and the record's key).

        Args:
            start: number of samples before the batch.
            batch: rows of the global batch.
            seed: of the order and of all draws.
            rows: consecutive rows to return (default: all).
        """
        rows = range(batch) if rows is None else rows
        (rows,) = _blocks([range(batch)[rows] if isinstance(rows, slice) else rows], batch)
        return self._train_batch(start + rows.start, len(rows), seed, carry=False)

    def _train_batch(self, first: int, count: int, seed: int, carry: bool = True) -> dict:
        ids_b, epochs_b = self._records(first, count, seed)
        return self._collate(first, ids_b, epochs_b, seed, self._leaves, carry=carry)

    def train_iter(
        self,
        *,
        start: int,
        batch: int,
        num_batches: int,
        seed: int,
        rows: Sequence[range] | None = None,
        quarantine: Appended | None = None,
    ) -> Iterator[dict[str, np.ndarray]]:
        """Yields this host's rows of `num_batches` global batches.

        Args:
            start: number of samples seen before; any number.
            batch: rows of a global batch.
            num_batches: number of batches to yield.
            seed: of the order and of all draws.
            rows: blocks of consecutive rows of this host (default: all rows).
            quarantine: file that lists replaced records, one JSON line each, as `Data.skip` reads it. `loader_stats`
                counts them in any case.

        Raises:
            UserError: more than `max_bad_frac` of the records were replaced.
        """
        blocks = _blocks(rows, batch)
        batches = pipeline.iterate(
            _TrainBatch(self, start, batch, seed, blocks), num_batches, self.data
        )
        return quarantine_lib.watched(batches, self, seed, quarantine)

    def num_eval_batches(self, batch: int) -> int:
        """Returns how many batches `eval_iter` yields, on every host."""
        return -(-self.num_records // batch)

    def eval_iter(
        self,
        batch: int,
        rows: Sequence[range] | None = None,
        *,
        reads: Sequence[str] | None = None,
    ) -> Iterator[dict[str, np.ndarray]]:
        """Yields one pass in record order, without augmentation, with the first caption instead of a drawn one.

        Every host yields the same number of full batches: rows past the end repeat the last record with mask False.

        Args:
            batch: rows of a global batch.
            rows: blocks of consecutive rows of this host (default: all rows).
            reads: names of the leaves to make (default: the dataset's). Without "text", records need no captions.
        """
        blocks = _blocks(rows, batch)
        # no worker processes: starting them takes longer than one pass
        data = dataclasses.replace(self.data, workers=0)
        make = _EvalBatch(self, batch, blocks, None if reads is None else tuple(reads))
        return pipeline.iterate(make, self.num_eval_batches(batch), data)

    def eval_batch(
        self,
        number: int,
        batch: int,
        rows: range | None = None,
        *,
        reads: Sequence[str] | None = None,
    ) -> dict[str, np.ndarray]:
        """Returns rows of one batch of `eval_iter`.

        Args:
            number: index of the batch.
            batch: rows of a global batch.
            rows: consecutive rows to return (default: all).
            reads: names of the leaves to make (default: the dataset's).
        """
        rows = range(batch) if rows is None else rows
        first = number * batch + rows.start
        positions_b = np.arange(first, first + len(rows))
        ids_b = np.minimum(positions_b, self.num_records - 1)
        found = self._leaves if reads is None else leaves.find(self.data, reads, self.plugins)
        out = self._collate(first, ids_b, np.zeros_like(ids_b), 0, found, training=False)
        out["mask"][:] = positions_b < self.num_records
        return out

    def _collate(
        self,
        first: int,
        ids_b: np.ndarray,
        epochs_b: np.ndarray,
        seed: int,
        found: Sequence[leaves.Leaf],
        *,
        training: bool = True,
        carry: bool = False,
    ) -> dict[str, np.ndarray]:
        """Makes a batch of the given records, writing each sample into preallocated arrays.

        Args:
            first: stream position of the first row.
            ids_b, epochs_b: i64[b], the record ids and their epochs.
            seed: of all draws.
            found: the leaves to make.
            training: whether to draw augmentations and captions.
            carry: whether to add the counts for `LoaderStats`.
        """
        b, data = len(ids_b), self.data
        specs = {name: s for leaf in found for name, s in leaf.spec(data, b).items()}
        arrays = {name: np.empty(shape, dtype) for name, (shape, dtype) in specs.items()}
        bad_b, secs, num_texts, num_cut = np.zeros(b, np.uint8), np.zeros(len(STAGES)), 0, 0
        ids_b, ordered = ids_b.copy(), leaves.in_order(found)
        stored_crop = leaves.uses_stored_crops(data, found)
        for i, (record_id, epoch) in enumerate(zip(ids_b.tolist(), epochs_b.tolist())):
            draws = Draws(data, self.tokenizer, seed, first + i, epoch, training, stored_crop)
            row = {name: array[i, ...] for name, array in arrays.items()}
            ids_b[i], bad_b[i] = self._reader.fill(ordered, record_id, draws, row, secs)
            num_texts, num_cut = num_texts + draws.texts, num_cut + draws.texts_cut
        out = arrays | {
            "mask": np.ones(b, bool),
            "index": order.split_words(np.arange(first, first + b)),
            "record": order.split_words(ids_b),
        }
        if not carry:
            return out
        return out | {BAD: bad_b, STATS: measured(secs, num_texts, num_cut)}


def start_plan(dataset: Dataset, *, batch: int, samples: int, num_hosts: int = 1) -> str:
    """Returns the line that a run logs before it starts: the data to read and the memory of prefetched batches.

    Args:
        dataset: the data.
        batch: rows of a global batch.
        samples: number of samples to read.
        num_hosts: number of hosts that share the rows.
    """
    data, rows = dataset.data, batch // num_hosts
    specs = leaves.spec(data, 1, dataset.reads, dataset.plugins).values()
    row_bytes = sum(math.prod(shape) * np.dtype(dtype).itemsize for shape, dtype in specs)
    held = max(data.workers, 1) * (data.prefetch + max(data.read_threads, 1)) + 2
    size = getattr(dataset.source, "num_bytes", None)
    lower = "lower-cased, " if dataset.tokenizer.lower else ""
    parts = [
        f"{dataset.num_records:,} records" + (f", {size / 1e9:.2f} GB" if size else ""),
        f"{samples:,} samples = {samples / dataset.epoch_len:.2f} epochs",
        f"{rows} of {batch} rows on each of {num_hosts} hosts",
        f"texts {lower}padded with {dataset.tokenizer.pad_id} or cut ({data.shorten}, eos kept) "
        f"to {data.text_len}",
        f"at most {held * rows * row_bytes / 1e6:.0f} MB of batches ahead",
    ]
    if data.cache_decoded:
        parts[-1] += f" and {data.cache_mb} MB of decoded images a process"
    if storage.is_remote(data.path) or any(storage.is_remote(p.path) for p in data.mixture):
        parts[-1] += f", {storage.bounds()}"
    return "; ".join(parts)


@dataclasses.dataclass(frozen=True)
class _TrainBatch:
    """Maps the index of a batch, counted from `start`, to the host's rows of it."""

    dataset: Dataset
    start: int
    batch: int
    seed: int
    blocks: tuple[range, ...]

    def __call__(self, number: int) -> dict[str, np.ndarray]:
        first = self.start + int(number) * self.batch
        return _joined(
            [self.dataset._train_batch(first + b.start, len(b), self.seed) for b in self.blocks]
        )


@dataclasses.dataclass(frozen=True)
class _EvalBatch:
    """Maps the index of an evaluation batch to the host's rows of it."""

    dataset: Dataset
    batch: int
    blocks: tuple[range, ...]
    reads: tuple[str, ...] | None = None

    def __call__(self, number: int) -> dict[str, np.ndarray]:
        make = functools.partial(self.dataset.eval_batch, int(number), self.batch)
        return _joined([make(b, reads=self.reads) for b in self.blocks])


def _blocks(rows: Sequence[range] | None, batch: int) -> tuple[range, ...]:
    blocks = (range(batch),) if rows is None else tuple(rows)
    for block in blocks:
        if block.step != 1 or not 0 <= block.start < block.stop <= batch:
            raise check.error("rows", block, f"a block of 0 … {batch}", "use order.host_rows")
    return blocks


def _joined(parts: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Concatenates blocks of rows to one batch and adds up their counts."""
    if len(parts) == 1:
        return parts[0]
    out = {k: np.concatenate([p[k] for p in parts]) for k in parts[0] if k != STATS}
    if STATS in parts[0]:
        numbers = np.sum([p[STATS] for p in parts], axis=0)
        numbers[:HEADER] = parts[-1][STATS][:HEADER]
        out[STATS] = numbers
    return out
