"""The `Dataset`: from stream positions to batches of numpy arrays; mixtures, and the stages of a run.

An element of the pipeline is one host's rows of one global batch, computed from its number alone.
So hosts, workers and threads change the speed and never the content, nothing is dropped, and a run
resumes anywhere by passing `start`. Not here: the order (order.py), one row (samples.py), threads and
processes (pipeline.py), device arrays (core/mesh.py).
"""

import contextlib
import dataclasses
import functools
import logging
import os
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from vlp.core import check
from vlp.data import SOURCES, index, order, pipeline, samples, sources, storage
from vlp.data import quarantine as quarantine_lib
from vlp.data import tokenizer as tokenizers
from vlp.data.config import Data, check_data
from vlp.data.loader_stats import BAD, HEADER, STAGES, STATS, LoaderStats, measured
from vlp.data.sources.combined import Concatenated, without

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Begin:
    """Where a dataset's order begins: a position of the stream, the samples that each of its parts
    (itself, if it is no mixture) had given by then, and what is added to the seed for each."""

    position: int = 0
    given: tuple[int, ...] = ()  # () = none
    orders: tuple[int, ...] = ()  # () = 0, 1, …
    before: tuple[int, ...] = ()  # beside `given`, samples in another order, for the counts alone


def open_dataset(data: Data, tokenizer: tokenizers.Tokenizer | None = None) -> "Dataset":
    """Opens and checks the data; `tokenizer` overrides the config's (a checkpoint's own, say)."""
    if data.source not in SOURCES:
        raise check.unknown("config.data.source", data.source, SOURCES)
    check_data(data)
    source = _open_mixture(data) if data.mixture else _open_one(data)
    if tokenizer is None and data.tokenizer:
        tokenizer = tokenizers.load(data.tokenizer)
    _look_for_sources(data, source)
    return Dataset(data, source, source.tokenizer() if tokenizer is None else tokenizer)


def _look_for_sources(data: Data, source: Any, num: int = 64) -> None:
    """Warns of names in `caption_sources` that none of `num` records has: mistyped ones pass for rare."""
    if not data.caption_sources or not len(source):
        return
    seen = set()
    for i in np.linspace(0, len(source) - 1, min(num, len(source)), dtype=np.int64).tolist():
        with contextlib.suppress(ValueError):
            seen |= {c.get("source") for c in source[i].get("captions") or ()}
    if missing := sorted({c.name for c in data.caption_sources} - seen):
        have = sorted(map(str, seen))
        text = "config.data.caption_sources: got %s, in none of %d records looked at, which have %s"
        log.warning(text, missing, min(num, len(source)), have)


def leaves(data: Data, batch: int) -> dict[str, tuple[tuple[int, ...], Any]]:
    """Shape and type of every leaf of a batch of `batch` rows; known without opening the data."""
    captions = (data.num_captions,) if data.captions == "all" else ()
    return {
        "image": ((batch, data.image_px, data.image_px, 3), np.uint8),
        "text": ((batch, *captions, data.text_len), np.int32),
        "mask": ((batch,), np.bool_),
        "index": ((batch, 2), np.uint32),
        "record": ((batch, 2), np.uint32),
    }


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
    """One split, ready to be read in batches: picklable, safe to use from several threads.

    A batch is a dict of numpy arrays, b rows of this host:
      image   u8[b, R, R, 3]
      text    i32[b, L]      [bos] pieces [eos] pads; i32[b, K, L] with captions="all"
      mask    bool[b]        True; False on the rows that fill the last batch of an evaluation
      index   u32[b, 2]      the sample's position in the global stream, as (high, low) words
      record  u32[b, 2]      its record id, likewise (`order.join_words` joins them)
    """

    def __init__(self, data: Data, source, tokenizer: tokenizers.Tokenizer, begin: Begin = Begin()):
        self.data, self.source, self.tokenizer, self.begin = data, source, tokenizer, begin
        self.num_records: int = len(source)
        self.fingerprint: str = source.fingerprint
        self.loader_stats = LoaderStats()
        self._mixture = _mixture(data, source, begin) if data.mixture else None
        self._groups = self._group(data.group_by) if data.group_by else None
        self._reader = samples.Reader(data, source)

    def __reduce__(self):  # the cache stays behind; workers fill their own
        return Dataset, (self.data, self.source, self.tokenizer, self.begin)

    def _group(self, field: str) -> order.Groups:
        """Reads that field of every record once; what it finds is kept in the cache, and mapped."""
        if field not in self.source[0]:
            known = sorted(k for k, v in self.source[0].items() if isinstance(v, str))
            raise check.unknown("config.data.group_by", field, known)
        import pyarrow  # here, because only this asks for it

        def found() -> order.Groups:
            names = (self._group_name(i, field) for i in range(self.num_records))
            chunks = [pyarrow.array(c, pyarrow.large_string()) for c in index.batched(names)]
            return order.Groups.of(pyarrow.chunked_array(chunks))

        def build(path: str) -> None:
            groups = found()
            with index.Writer(path, {"members": "<i8", "first": "<i8"}) as writer:
                writer.add("members", groups.members)
                writer.add("first", groups.first)
                writer.finish({})

        if not hasattr(getattr(self.source, "source", self.source), "inputs"):
            return found()
        stamp = f"groups 1:{self.fingerprint}:{field}:{sources.stamp(self.source)}"
        kept = index.cached("groups", stamp, build)
        return order.Groups(kept["members"], kept["first"])

    def _group_name(self, i: int, field: str) -> str:
        """Names the group of record i; one that is bad or lacks the field is a group of its own, at the end."""
        try:
            value = self.source[i].get(field)
        except check.UserError:
            raise
        except ValueError:  # a bad image or row: another takes its place when its turn comes
            value = None
        if value is None:
            return f"\U0010ffff{i:020d}"
        return f"{value + 2**63:020d}" if isinstance(value, int) else str(value)

    @property
    def epoch_len(self) -> int:
        """Samples in an epoch: records, or groups of them."""
        return self._groups.num if self._groups else self.num_records

    def record_ids(self, start: int, count: int, seed: int) -> np.ndarray:
        """Returns i64[count], the records at stream positions start … start + count - 1."""
        return self._records(start, count, seed)[0]

    def _records(self, start: int, count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns i64[count] twice: the records at stream positions from `start` on, their epochs."""
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
        """Returns the same data with another beginning of its order."""
        out = object.__new__(Dataset)
        out.__dict__ |= self.__dict__ | {"begin": begin}
        out._mixture = _mixture(self.data, self.source, begin) if self.data.mixture else None
        return out

    def given(self, position: int) -> tuple[int, ...]:
        """How many of the samples before a stream position each part gave, since the run began."""
        if self._mixture:
            return tuple(self._mixture.counts(position).tolist())
        return (sum(self.begin.given) + position - self.begin.position,)

    def source_counts(self, position: int) -> dict[str, int]:
        """By the names of a mixture's parts, how many samples each gave the run; {} for other data."""
        before = self.begin.before or (0,) * len(self.data.mixture)
        counts = (n + more for n, more in zip(self.given(position), before))
        return dict(zip((p.name for p in self.data.mixture), counts))

    def laws(self) -> tuple[tuple, ...]:
        """Of each part, what decides the order of its records, beside the seed; all different."""
        parts = self.source.parts if isinstance(self.source, Concatenated) else (self.source,)
        names = [part.fingerprint for part in parts]
        how = (order.Shuffle.of(self.data), self.data.group_by)
        return tuple((name, names[:k].count(name), *how) for k, name in enumerate(names))

    def record(self, record_id: int) -> dict:
        """Returns a record with its image decoded: u8[H, W, 3]. Do not write into it."""
        return self._reader.decoded(int(record_id))

    def key(self, record_id: int) -> str:
        """Returns a record's key, or "record N" for one that cannot be read."""
        return self._reader.key(record_id)

    def reference(self, record_id: int) -> str:
        """The caption that evaluations compare with: the first in the wanted languages."""
        return samples.texts_of(self.record(record_id), self.data, "first", None, self.tokenizer)[0]

    def captions(self, record_id: int) -> list[str]:
        """The same without a look at the image. Raises: `text_ops.BadCaption`."""
        return samples.texts_of(self.source[record_id], self.data, "first", None, self.tokenizer)

    def keys(self, record_ids: Sequence[int] | np.ndarray) -> list[str]:
        """Returns the keys of the records."""
        return [self.source[int(i)]["key"] for i in record_ids]

    def batch_at(
        self, start: int, batch: int, seed: int, rows: range | slice | None = None
    ) -> dict[str, np.ndarray]:
        """Returns rows (default: all) of the global batch that begins at stream position `start`.

        A pure function of its arguments and the data. Image and caption draws depend on (seed,
        stream position).
        """
        rows = range(batch) if rows is None else rows
        (rows,) = _blocks([range(batch)[rows] if isinstance(rows, slice) else rows], batch)
        return self._train_batch(start + rows.start, len(rows), seed, carry=False)

    def _train_batch(self, first: int, count: int, seed: int, carry: bool = True) -> dict:
        ids_b, epochs_b = self._records(first, count, seed)
        prepare = functools.partial(samples.train_sample, seed, self.tokenizer)
        return self._collate(first, ids_b, epochs_b, prepare, seed, carry)

    def train_iter(
        self,
        *,
        start: int,
        batch: int,
        num_batches: int,
        seed: int,
        rows: Sequence[range] | None = None,
        quarantine: str | os.PathLike | None = None,
    ) -> Iterator[dict[str, np.ndarray]]:
        """Yields rows (blocks of them, default: all) of `num_batches` global batches from stream position `start` on.

        `start` is the number of samples seen so far and need not be a multiple of anything. What
        was replaced is counted in `loader_stats`, and listed in the file `quarantine` if given: one JSON
        line a record, which `Data.skip` reads. Raises: `UserError` past `max_bad_frac`.
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
        self, batch: int, rows: Sequence[range] | None = None, *, texts: bool = True
    ) -> Iterator[dict[str, np.ndarray]]:
        """Yields one pass in record order, without augmentation; "uniform" captions become "first".

        Without `texts`, captions are not looked at (records may have only a label): texts are empty.

        Every host yields equally many full batches of its rows (default: all): rows past the end
        repeat the last record and have mask False.
        """
        blocks = _blocks(rows, batch)
        quiet = dataclasses.replace(
            self.data, workers=0
        )  # starting processes costs more than one pass
        make = _EvalBatch(self, batch, blocks, texts)
        return pipeline.iterate(make, self.num_eval_batches(batch), quiet)

    def eval_batch(
        self, number: int, batch: int, rows: range | None = None, *, texts: bool = True
    ) -> dict[str, np.ndarray]:
        """Returns rows of evaluation batch `number`: what `eval_iter` yields."""
        rows = range(batch) if rows is None else rows
        first = number * batch + rows.start
        positions_b = np.arange(first, first + len(rows))
        ids_b = np.minimum(positions_b, self.num_records - 1)
        zeros = np.zeros_like(ids_b)
        prepare = samples.eval_sample if texts else samples.eval_image_alone
        prepare = functools.partial(prepare, self.tokenizer)
        out = self._collate(first, ids_b, zeros, prepare, 0, carry=False)
        out["mask"][:] = positions_b < self.num_records
        return out

    def _collate(
        self,
        first: int,
        ids_b: np.ndarray,
        epochs_b: np.ndarray,
        prepare: Callable,
        seed: int,
        carry: bool,
    ) -> dict[str, np.ndarray]:
        """Prepares every sample straight into one preallocated batch."""
        b, data = len(ids_b), self.data
        image_bRRC, text_bKL = (np.empty(*leaves(data, b)[name]) for name in ("image", "text"))
        bad_b, secs, cut = np.zeros(b, np.uint8), np.zeros(len(STAGES)), 0
        ids_b = ids_b.copy()
        for row, (record_id, epoch) in enumerate(zip(ids_b.tolist(), epochs_b.tolist())):
            place = (first + row, epoch)
            fill = lambda r, row=row, place=place: prepare(r, data, place, image_bRRC[row])
            texts, ids_b[row], bad_b[row] = self._reader.good(
                record_id, first + row, seed, fill, secs
            )
            began = time.perf_counter()
            rows_KL = text_bKL[row] if data.captions == "all" else text_bKL[row : row + 1]
            for ids_L, (text, was_cut) in zip(rows_KL, texts):
                cut += self.tokenizer.encode_into(text, ids_L) or was_cut
            secs[2] += time.perf_counter() - began
        out = {
            "image": image_bRRC,
            "text": text_bKL,
            "mask": np.ones(b, bool),
            "index": order.split_words(np.arange(first, first + b)),
            "record": order.split_words(ids_b),
        }
        if not carry:
            return out
        texts = text_bKL.size // data.text_len
        return out | {BAD: bad_b, STATS: measured(secs, texts, cut)}


def in_stages(stages: Sequence[tuple[Dataset, int, int]]) -> list[Dataset]:
    """The datasets of a stream, one for each stage, such that each goes on where it was left.

    stages: dataset, position of its first sample in the stream, number of samples. Data that stays
    as it is continues as if the stages were one. Where the data or the weights change, what was
    read before goes on with its next record, wherever it stands in a mixture, and what is new
    begins with its first epoch.
    """
    out: list[Dataset] = []
    given: dict[tuple, int] = {}  # by law
    read: dict[tuple, int] = {}  # by data
    orders: dict[tuple, int] = {}
    for dataset, position, num in stages:
        laws = dataset.laws()
        if out and _same(out[-1], dataset, position):
            begin = out[-1].begin
        else:
            own = tuple(orders.setdefault(law, k) for k, law in enumerate(laws))
            had = tuple(given.get(law, 0) for law in laws)
            before = tuple(read.get(law[:2], 0) - n for law, n in zip(laws, had))
            begin = Begin(position, had, own, before)
        out.append(dataset.beginning(begin))
        given |= dict(zip(laws, out[-1].given(position + num)))
        read |= {law[:2]: given[law] + n for law, n in zip(laws, begin.before)}
    return out


def _same(a: Dataset, b: Dataset, position: int) -> bool:
    """Whether the order of b at a position of the stream is that of a."""

    def law(d: Dataset) -> tuple:
        changes = (r for r in d.data.reweight if r.samples <= position)
        return d.laws(), tuple(p.weight for p in d.data.mixture), tuple(changes)

    return law(a) == law(b)


def _mixture(data: Data, source: Concatenated, begin: Begin) -> order.Mixture:
    starts, weights = [begin.position], [[p.weight for p in data.mixture]]
    for k, change in enumerate(data.reweight):
        where = f"config.data.reweight.{k}"
        if change.samples <= starts[-1]:
            raise check.error(f"{where}.samples", change.samples, f"over {starts[-1]}", "raise it")
        if len(change.weights) != len(data.mixture):
            do = "give one for each part"
            raise check.error(f"{where}.weights", change.weights, f"{len(data.mixture)}", do)
        starts.append(change.samples)
        weights.append(list(change.weights))
    shares = tuple(order.whole_shares(w, "config.data.mixture") for w in weights)
    return order.Mixture(source.sizes, shares, tuple(starts), begin.given, begin.orders)


def start_plan(dataset: Dataset, *, batch: int, samples: int, num_hosts: int = 1) -> str:
    """The line that a run prints before it starts: what will be read, and the memory it takes."""
    data, rows = dataset.data, batch // num_hosts
    captions = data.num_captions if data.captions == "all" else 1
    row_bytes = 3 * data.image_px**2 + 4 * data.text_len * captions + 17
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
    """Number of a batch since `start` → the host's rows of it."""

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
    """Number of an evaluation batch → the host's rows of it."""

    dataset: Dataset
    batch: int
    blocks: tuple[range, ...]
    texts: bool = True

    def __call__(self, number: int) -> dict[str, np.ndarray]:
        make = functools.partial(self.dataset.eval_batch, int(number), self.batch)
        return _joined([make(b, texts=self.texts) for b in self.blocks])


def _blocks(rows: Sequence[range] | None, batch: int) -> tuple[range, ...]:
    blocks = (range(batch),) if rows is None else tuple(rows)
    for block in blocks:
        if block.step != 1 or not 0 <= block.start < block.stop <= batch:
            raise check.error("rows", block, f"a block of 0 … {batch}", "use order.host_rows")
    return blocks


def _joined(parts: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Blocks of rows as one batch; what was counted of them is added up."""
    if len(parts) == 1:
        return parts[0]
    out = {k: np.concatenate([p[k] for p in parts]) for k in parts[0] if k != STATS}
    if STATS in parts[0]:
        numbers = np.sum([p[STATS] for p in parts], axis=0)
        numbers[:HEADER] = parts[-1][STATS][:HEADER]
        out[STATS] = numbers
    return out
