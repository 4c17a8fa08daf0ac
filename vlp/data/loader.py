"""Batches: the config section `data`, and the `Dataset` from stream positions to numpy arrays.

An element of the pipeline is one host's rows of one global batch, computed from its number alone.
So hosts, workers and threads change the speed and never the content, nothing is dropped, and a run
resumes anywhere by passing `start`. Not here: the order (order.py), what a record is
(records.py), device arrays (core/mesh.py).
"""

import atexit
import collections
import contextlib
import dataclasses
import functools
import hashlib
import json
import logging
import os
import re
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from vlp.core import check
from vlp.data import SOURCES, image_ops, index, order, processes, sources, storage, text_ops
from vlp.data import tokenizer as tokenizers

log = logging.getLogger(__name__)
BAD_RECORDS = ("error", "replace")
REASONS = (*image_ops.REASONS, *text_ops.REASONS, "unreadable")  # why a record was replaced
STAGES = ("read", "image", "text")  # of making a sample
MAX_BAD_IN_A_ROW = 100
MIN_SEEN = 1000  # samples that `max_bad_frac` counts as seen at least
_BAD, _TOLD = "_bad", "_told"  # what elements carry from the workers to `Tally`, beside the batch


@dataclasses.dataclass(frozen=True)
class Part:
    """One source of a mixture; what it leaves empty is as in `Data`."""

    name: str
    weight: float = 1.0
    source: str = ""
    path: str = ""
    split: str = ""
    skip: str = ""
    num_records: int = 0


@dataclasses.dataclass(frozen=True)
class Reweight:
    """From stream position `samples` on, the parts of a mixture have these weights."""

    samples: int
    weights: tuple[float, ...]


@dataclasses.dataclass(frozen=True)
class CaptionSource:
    """A source tag of captions ("alt", "rewrite"), and its share where they are drawn "weighted"."""

    name: str
    weight: float = 1.0


@dataclasses.dataclass(frozen=True)
class Begin:
    """Where a dataset's order begins: a position of the stream, the samples that each of its parts
    (itself, if it is no mixture) had given by then, and what is added to the seed for each."""

    position: int = 0
    given: tuple[int, ...] = ()  # () = none
    orders: tuple[int, ...] = ()  # () = 0, 1, …
    before: tuple[int, ...] = ()  # beside `given`, samples in another order, for the counts alone


@dataclasses.dataclass(frozen=True)
class Data:
    """What is read and how it is prepared."""

    source: str = "records"  # one of vlp.data.SOURCES
    path: str = ""  # directory of the records
    split: str = "train"
    tokenizer: str = ""  # path of a model; "" = the source's own
    num_records: int = 512  # source "shapes" only
    shuffle: bool = True
    shuffle_block: int = 0  # slow media: runs of so many records stay together (0: each for itself)
    shuffle_window: int = 8  # … of which so many runs are mixed at a time
    group_rows: bool = True  # a table's rows of one image are one record, with all their captions
    allow_outside: bool = False  # follow a table's or a link's paths out of the dataset's directory
    group_by: str = ""  # a field of the records: an epoch visits each of its values once
    image_px: int = 64
    text_len: int = 16  # tokens, with bos and eos
    captions: str = "first"  # first | uniform | weighted | all (num_captions of them, cycled)
    num_captions: int = 1
    langs: tuple[str, ...] = ()  # captions in these languages alone (("en",)); () = in every one
    caption_sources: tuple[
        CaptionSource, ...
    ] = ()  # () = every source, by the captions' own weights
    shorten: str = "truncate"  # how training texts are cut to text_len (text_ops.SHORTEN)
    min_area_frac: float = 0.6  # the crop's share of the area
    max_area_frac: float = 1.0
    max_aspect: float = 1.25
    translate_frac: float = 0.0  # white border that crops may include, as a share of the side
    flip: bool = False
    jitter: float = 0.0  # largest relative change of brightness, contrast, saturation
    randaugment: int = 0  # operations an image
    randaugment_magnitude: float = 9.0  # of 10
    resize: str = "bicubic"  # one of image_ops.FILTERS
    bad_records: str = "error"  # or "replace": by one that the stream position decides
    max_bad_frac: float = 0.05  # a run with more to replace stops
    skip: str = ""  # a quarantine file (of an earlier run): its records are left out
    mixture: tuple[Part, ...] = ()  # several sources instead of one
    reweight: tuple[Reweight, ...] = ()  # changes of the mixture's weights, in order
    cache_decoded: bool = False  # keep decoded images in memory (once per worker process)
    cache_mb: int = 1024  # … up to this size, counted as image bytes
    workers: int = 0  # processes; 0 = threads of this process only
    read_threads: int = 2  # threads that make batches, per process; 0 = none, made when asked for
    prefetch: int = 4  # batches ready ahead of the consumer, per process


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


class Concatenated:
    """The records of several sources, one after the other."""

    def __init__(self, parts: tuple):
        self.parts = parts
        self.sizes = tuple(len(p) for p in parts)
        self._ends = np.cumsum(self.sizes)
        text = ":".join(p.fingerprint for p in parts)
        self.fingerprint = hashlib.sha256(f"mixture:{text}".encode()).hexdigest()

    def __reduce__(self):
        return Concatenated, (self.parts,)

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, i: int) -> dict:
        k = int(np.searchsorted(self._ends, i, side="right"))
        return self.parts[k][int(i - self._ends[k] + self.sizes[k])]

    @property
    def num_bytes(self) -> int | None:
        """Encoded bytes, where every source knows them."""
        known = [n for p in self.parts if (n := getattr(p, "num_bytes", None)) is not None]
        return sum(known) if len(known) == len(self.parts) else None

    def tokenizer(self) -> tokenizers.Tokenizer:
        """Returns the tokenizer that all sources bring."""
        first, *others = (p.tokenizer() for p in self.parts)
        if any(o != first for o in others):
            got, do = "mixtures of sources with other tokenizers", "set config.data.tokenizer"
            raise check.error("config.data.mixture", got, "one tokenizer", do)
        return first


class Without:
    """A source less the records `skipped` (sorted ids)."""

    def __init__(self, source: Any, skipped: np.ndarray):
        self.source, self.skipped = source, skipped
        text = f"{source.fingerprint}:{skipped.tolist()}"
        self.fingerprint = hashlib.sha256(text.encode()).hexdigest()

    def __reduce__(self):
        return Without, (self.source, self.skipped)

    def __len__(self) -> int:
        return len(self.source) - len(self.skipped)

    def __getitem__(self, i: int) -> dict:
        if not 0 <= i < len(self):
            raise IndexError(f"record {i} of {len(self)}")
        return self.source[int(order.skipping(np.array([i]), self.skipped)[0])]

    def inputs(self) -> Iterable[str]:
        """Returns the paths of all files behind it."""
        return self.source.inputs()

    @property
    def num_bytes(self) -> int | None:
        """Encoded bytes of the whole source, where it knows them."""
        return getattr(self.source, "num_bytes", None)

    def tokenizer(self) -> tokenizers.Tokenizer:
        """Returns the source's tokenizer."""
        return self.source.tokenizer()


def without(source: Any, path: str) -> Without:
    """Returns the source less the records that a quarantine file lists for it.

    Raises: `UserError` if there is no such file, or it lists none of this source's.
    """
    if not os.path.isfile(path):
        raise check.error(
            "config.data.skip", f"{path!r}, which is no file", "a quarantine file", "correct it"
        )
    try:
        with open(path, encoding="utf-8") as f:
            rows = [json.loads(line) for line in f if line.strip()]
        mine = sorted({int(r["record"]) for r in rows if r["fingerprint"] == source.fingerprint})
    except (ValueError, TypeError, KeyError) as e:
        got, do = f"{type(e).__name__} ({e!s:.60})", "give a run's quarantine_0.jsonl"
        expected = "lines with the fields record and fingerprint"
        raise check.error(f"config.data.skip {path}", got, expected, do) from None
    if not mine or mine[0] < 0 or mine[-1] >= len(source):
        got, do = f"no line of {len(rows)} about this data", "use the file of a run on this data"
        raise check.error(f"config.data.skip {path}", got, f"data {source.fingerprint[:12]}", do)
    return Without(source, np.array(mine, np.int64))


def check_data(data: Data) -> None:
    """Raises UserError for a value that can never work; opens nothing."""
    image_ops.check_filter("config.data.resize", data.resize)
    text_ops.check_shorten("config.data.shorten", data.shorten)
    enums = (
        ("captions", text_ops.POLICIES),
        ("bad_records", BAD_RECORDS),
    )
    for field, known in enums:
        if getattr(data, field) not in known:
            raise check.unknown(f"config.data.{field}", getattr(data, field), known)
    sources = data.caption_sources
    bounds = (
        ("min_area_frac", 0 < data.min_area_frac <= data.max_area_frac, "in (0, max_area_frac]"),
        ("max_area_frac", data.max_area_frac <= 1, "at most 1"),
        ("max_aspect", data.max_aspect >= 1, "at least 1"),
        ("translate_frac", 0 <= data.translate_frac <= 1, "in [0, 1]"),
        ("jitter", 0 <= data.jitter < 1, "in [0, 1)"),
        ("randaugment", data.randaugment >= 0, "at least 0"),
        ("randaugment_magnitude", 0 <= data.randaugment_magnitude <= 10, "in [0, 10]"),
        ("shuffle_block", data.shuffle_block >= 0, "at least 0"),
        ("shuffle_window", data.shuffle_window >= 1, "at least 1"),
        ("shuffle_block", data.shuffle or not data.shuffle_block, "0 without shuffle"),
        ("shuffle_block", data.shuffle_block < 2**31, "below 2^31"),
        ("shuffle_window", data.shuffle_window < 2**31, "below 2^31"),
        ("image_px", data.image_px >= 1, "at least 1"),
        ("image_px", data.image_px <= 2**14, "at most 16,384"),
        ("text_len", data.text_len >= 3, "at least 3 (bos, a piece, eos)"),
        ("text_len", data.text_len <= 2**17, "at most 131,072"),
        ("num_captions", data.num_captions >= 1, "at least 1"),
        ("num_captions", data.num_captions <= 2**10, "at most 1,024"),
        (
            "num_captions",
            data.num_captions == 1 or data.captions == "all",
            "1, but for captions 'all'",
        ),
        ("captions", data.captions != "weighted" or sources, "caption_sources beside 'weighted'"),
        (
            "caption_sources",
            len({c.name for c in sources}) == len(sources) and all(c.weight > 0 for c in sources),
            "names that differ, weights above 0",
        ),
        ("max_bad_frac", 0 <= data.max_bad_frac <= 1, "in [0, 1]"),
        ("mixture", not (data.mixture and data.group_by), "no group_by beside it"),
        (
            "mixture",
            len({p.name for p in data.mixture}) == len(data.mixture),
            "a name of its own for each part",
        ),
        ("reweight", data.mixture or not data.reweight, "a mixture beside it"),
        ("cache_mb", data.cache_mb >= 0, "at least 0"),
        ("workers", data.workers >= 0, "at least 0"),
        ("read_threads", data.read_threads >= 0, "at least 0"),
        ("prefetch", data.prefetch >= 1, "at least 1"),
        ("workers", data.workers <= 2**10, "at most 1,024"),
        ("read_threads", data.read_threads <= 2**10, "at most 1,024"),
        ("prefetch", data.prefetch <= 2**16, "at most 65,536"),
    )
    for field, good, expected in bounds:
        if not good:
            raise check.error(
                f"config.data.{field}", getattr(data, field), expected, "change the config"
            )


WHO = 2  # entries at the start of what is told that say which process, and its memory
COUNTS = ("texts", "texts_truncated", *(f"read_{k}" for k in storage.COUNTS))


@dataclasses.dataclass
class Tally:
    """What this run has read so far: what was bad of it, and where the time and memory went."""

    seen: int = 0
    bad: collections.Counter = dataclasses.field(default_factory=collections.Counter)
    worst: dict[str, list[str]] = dataclasses.field(default_factory=dict)  # reason → a few keys
    secs: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(len(STAGES)))
    counts: collections.Counter = dataclasses.field(default_factory=collections.Counter)  # `COUNTS`
    rss_mb: dict[int, float] = dataclasses.field(default_factory=dict)  # by process, as last told

    def add(self, bad_b: np.ndarray, told: np.ndarray) -> None:
        """Takes in what came with a batch (`_telling`)."""
        pid, rss_mb, *rest = told.tolist()
        self.seen += len(bad_b)
        self.rss_mb[int(pid)] = rss_mb
        self.secs += rest[: len(STAGES)]
        self.counts.update(dict(zip(COUNTS, map(int, rest[len(STAGES) :]))))

    def limiting(self) -> str:
        """The stage in which the loader spends most of its time, with its share."""
        share = self.secs / max(self.secs.sum(), 1e-9)
        return f"{STAGES[int(share.argmax())]} {share.max():.0%}"

    def metrics(self) -> dict[str, float]:
        """What was measured, as numbers by name, for the metrics record."""
        total, texts = max(self.secs.sum(), 1e-9), max(self.counts["texts"], 1)
        out = {f"share_{k}": round(float(x / total), 4) for k, x in zip(STAGES, self.secs)}
        out["truncated_frac"] = round(self.counts["texts_truncated"] / texts, 4)
        out |= {k: float(self.counts[k]) for k in COUNTS if k[:5] == "read_" and self.counts[k]}
        workers = [mb for pid, mb in self.rss_mb.items() if pid != os.getpid()]
        return out | ({"worker_rss_mb": round(max(workers), 1)} if workers else {})

    def text(self) -> str:
        """Counts by reason, most first, with examples."""
        return ", ".join(
            f"{reason} {n} ({', '.join(self.worst[reason])})"
            for reason, n in self.bad.most_common()
        )


def _telling(secs: np.ndarray, texts: int, cut: int) -> np.ndarray:
    """f64: process id, its MB, seconds by stage, and `COUNTS` since this process told last."""
    new = storage.news()
    counts = [texts, cut, *(new[k] for k in storage.COUNTS)]
    return np.array([os.getpid(), resident_mb(), *secs, *counts], np.float64)


def resident_mb() -> float:
    """Resident memory of this process; 0 where the system does not tell."""
    try:
        with open("/proc/self/statm") as f:
            return int(f.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6
    except OSError:
        return 0.0


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
        self.tally = Tally()
        self._mixture = _mixture(data, source, begin) if data.mixture else None
        self._groups = self._group(data.group_by) if data.group_by else None
        self._cache: dict[int, dict] = {}
        self._cache_left = data.cache_mb * 10**6 if data.cache_decoded else 0
        self._lock = threading.Lock()

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
        try:
            found = self._read(int(record_id))
            if isinstance(found["image"], image_ops.Picture):
                found = found | {"image": found["image"].pixels()[0]}
            return found
        except (_Bad, image_ops.BadImage) as e:
            raise self._refusal(int(record_id), e) from e

    def _read(self, record_id: int) -> dict:
        """Returns a record whose image is an array or a `Picture`. Raises: `BadImage`, `_Bad`."""
        if (found := self._cache.get(record_id)) is not None:
            return found
        try:
            found = self.source[record_id]
            image = found["image"]
            if not isinstance(image, bytes | np.ndarray):
                raise TypeError(f"image is a {type(image).__name__}")
        except image_ops.BadImage:  # of a source that looks at the file itself
            raise
        except Exception as e:  # by source: OSError, zlib.error, msgpack's, KeyError …
            if fault := check.machine(f"record {record_id} of {self.data.path}", e):
                raise fault from None
            raise _Bad("unreadable", f"{type(e).__name__}: {e!s:.120}") from e
        if isinstance(image, bytes):
            found["image"] = image = image_ops.Picture(image)
        if not self.data.cache_decoded:
            return found
        if isinstance(image, image_ops.Picture):  # whole, whether or not there is room for it
            found["image"] = image = image.pixels()[0]
        with self._lock:
            if self._cache_left >= image.nbytes and record_id not in self._cache:
                self._cache[record_id] = found
                self._cache_left -= image.nbytes
        return found

    def _refusal(self, record_id: int, e: Any) -> check.UserError:
        if isinstance(e, check.UserError):  # of the captions: it says what to do
            return e
        what = "a bad image" if isinstance(e, image_ops.BadImage) else "a bad record"
        where = f"record {record_id} of {self.data.split!r}{self._named(record_id)}"
        do = "remove it or set config.data.bad_records='replace'"
        return check.error(where, f"{what} ({e})", "an image and a caption", do)

    def _named(self, record_id: int) -> str:
        key = self._key(record_id)
        return f" (key {key!r}, {self.data.path or self.data.source})"

    def _key(self, record_id: int) -> str:
        try:
            return str(self.source[record_id]["key"])
        except Exception:
            return f"record {record_id}"

    def reference(self, record_id: int) -> str:
        """The caption that evaluations compare with: the first in the wanted languages."""
        return _texts(self.record(record_id), self.data, "first", None, self.tokenizer)[0]

    def captions(self, record_id: int) -> list[str]:
        """The same without a look at the image. Raises: `text_ops.BadCaption`."""
        return _texts(self.source[record_id], self.data, "first", None, self.tokenizer)

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
        prepare = functools.partial(_train_sample, seed, self.tokenizer)
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
        was replaced is counted in `tally`, and listed in the file `quarantine` if given: one JSON
        line a record, which `Data.skip` reads. Raises: `UserError` past `max_bad_frac`.
        """
        blocks = _blocks(rows, batch)
        batches = _iterate(_TrainBatch(self, start, batch, seed, blocks), num_batches, self.data)
        return self._watched(batches, seed, quarantine)

    def _watched(
        self, batches: Iterator[dict], seed: int, quarantine: str | os.PathLike | None
    ) -> Iterator[dict[str, np.ndarray]]:
        """Passes batches on, less what the workers tell of them, which goes into the tally."""
        tally, listed = self.tally, set()
        for batch in batches:
            bad_b, told = batch.pop(_BAD), batch.pop(_TOLD)
            tally.add(bad_b, told)
            for row in np.flatnonzero(bad_b):
                position = int(order.join_words(batch["index"][row : row + 1])[0])
                record, reason = int(self.record_ids(position, 1, seed)[0]), REASONS[bad_b[row] - 1]
                tally.bad[reason] += 1
                if record not in listed:
                    listed.add(record)
                    key = self._key(record)
                    if len(worst := tally.worst.setdefault(reason, [])) < 3:
                        worst.append(key)
                    log.warning("record %d (%s) replaced: %s", record, key, reason)
                    if quarantine is not None:
                        self._quarantine(quarantine, record, key, reason)
            num = tally.bad.total()
            if num > self.data.max_bad_frac * max(tally.seen, MIN_SEEN):
                raise check.error(
                    "data",
                    f"{num} bad records of {tally.seen}: {tally.text()}",
                    f"at most config.data.max_bad_frac = {self.data.max_bad_frac}",
                    f"repair the data{f' (see {quarantine})' if quarantine else ''} or raise it",
                )
            yield batch

    def _quarantine(self, path: str | os.PathLike, record: int, key: str, reason: str) -> None:
        """Appends a line: the record as the innermost source counts it, with that one's fingerprint."""
        source: Any = self.source
        if isinstance(source, Concatenated):
            k = int(np.searchsorted(np.cumsum(source.sizes), record, side="right"))
            source, record = source.parts[k], record - sum(source.sizes[:k])
        if isinstance(source, Without):
            record = int(order.skipping(np.array([record]), source.skipped)[0])
            source = source.source
        row = {
            "record": record, "key": key, "reason": reason, "fingerprint": source.fingerprint
        }  # fmt: skip
        with open(path, "a") as f:
            f.write(json.dumps(row) + "\n")

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
        return _iterate(make, self.num_eval_batches(batch), quiet)

    def eval_batch(
        self, number: int, batch: int, rows: range | None = None, *, texts: bool = True
    ) -> dict[str, np.ndarray]:
        """Returns rows of evaluation batch `number`: what `eval_iter` yields."""
        rows = range(batch) if rows is None else rows
        first = number * batch + rows.start
        positions_b = np.arange(first, first + len(rows))
        ids_b = np.minimum(positions_b, self.num_records - 1)
        zeros = np.zeros_like(ids_b)
        prepare = _eval_sample if texts else _eval_image
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
            texts, ids_b[row], bad_b[row] = self._good(record_id, first + row, seed, fill, secs)
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
        return out | {_BAD: bad_b, _TOLD: _telling(secs, texts, cut)}

    def _good(
        self, record_id: int, position: int, seed: int, fill: Callable, secs: np.ndarray
    ) -> tuple[list[tuple[str, bool]], int, int]:
        """Fills a row from the record, or from the first good one of its substitutes.

        Returns its caption texts (and whether they were shortened), the id of the record used, and
        0 or 1 + the reason (in `REASONS`) for which the record that was due is not used.
        """
        used, why, why_not = record_id, 0, ""
        for attempt in range(MAX_BAD_IN_A_ROW):
            began = time.perf_counter()
            try:
                record = self._read(used)
                read = time.perf_counter()
                secs[0] += read - began
                texts = fill(record)
                secs[1] += time.perf_counter() - read
                return texts, used, why
            except (_Bad, image_ops.BadImage, text_ops.BadCaption) as e:
                if self.data.bad_records == "error":
                    raise self._refusal(used, e) from e
                why, why_not = why or 1 + REASONS.index(e.reason), f"{e!s:.120}"
                low, count = self._siblings(record_id)
                used = order.substitute(position, attempt, low, count, seed)
        raise check.error(
            f"record {record_id} and {MAX_BAD_IN_A_ROW} substitutes",
            "only bad ones",
            "images with captions",
            f"see why each is bad with config.data.bad_records = 'error' (last: {why_not})",
        )

    def _siblings(self, record_id: int) -> tuple[int, int]:
        """The records that may stand in for one: first id and number (those of its source)."""
        if not isinstance(self.source, Concatenated):
            return 0, self.num_records
        ends = np.cumsum(self.source.sizes)
        k = int(np.searchsorted(ends, record_id, side="right"))
        return int(ends[k]) - self.source.sizes[k], self.source.sizes[k]


class _Bad(Exception):
    """A record that cannot be read; `reason` is one of `REASONS`."""

    def __init__(self, reason: str, detail: str):
        super().__init__(f"{reason}: {detail}")
        self.reason = reason


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


def _train_sample(
    seed: int,
    tokenizer: tokenizers.Tokenizer,
    record: dict,
    data: Data,
    place: tuple[int, int],
    out: np.ndarray,
) -> list[tuple[str, bool]]:
    """Fills `out` with the training image at a place (stream position, epoch); returns the captions,
    each with whether it was shortened.

    The image's draws depend on the position, the caption's on the epoch and the key: forms of a
    caption follow each other whatever the order.
    """
    position, epoch = place
    drawn = data.captions in ("uniform", "weighted")
    rng = order.sample_rng(seed, f"caption:{record.get('key')}", epoch) if drawn else None
    texts = _texts(record, data, data.captions, rng, tokenizer)
    augmented(record["image"], data, order.sample_rng(seed, "image", position), out)
    if data.shorten == "truncate":  # which the tokenizer does
        return [(t, False) for t in texts]
    rng = order.sample_rng(seed, "shorten", position)
    num_words = data.text_len - 2  # beside bos and eos
    short = [text_ops.shorten(t, num_words, data.shorten, rng) for t in texts]
    is_blank = _is_blank(tokenizer)
    short = [old if is_blank(new) else new for old, new in zip(texts, short)]
    return [(new, new is not old) for old, new in zip(texts, short)]


def augmented(
    image: np.ndarray | image_ops.Picture,
    data: Data,
    rng: np.random.Generator,
    out: np.ndarray | None = None,
) -> np.ndarray:
    """Returns the training image that `data` asks for, drawn from `rng`."""
    return image_ops.train_image(
        image,
        data.image_px,
        rng,
        min_area_frac=data.min_area_frac,
        max_area_frac=data.max_area_frac,
        max_aspect=data.max_aspect,
        translate_frac=data.translate_frac,
        flip=data.flip,
        jitter=data.jitter,
        randaugment=data.randaugment,
        magnitude=data.randaugment_magnitude,
        resize=data.resize,
        out=out,
    )


def _eval_sample(
    tokenizer: tokenizers.Tokenizer,
    record: dict,
    data: Data,
    place: tuple[int, int],
    out: np.ndarray,
) -> list[tuple[str, bool]]:
    """Fills `out` with a record's image as evaluations see it; returns the captions."""
    del place  # nothing is drawn
    texts = _texts(record, data, "all" if data.captions == "all" else "first", None, tokenizer)
    image_ops.eval_image(record["image"], data.image_px, resize=data.resize, out=out)
    return [(t, False) for t in texts]


def _eval_image(
    tokenizer: tokenizers.Tokenizer,
    record: dict,
    data: Data,
    place: tuple[int, int],
    out: np.ndarray,
) -> list[tuple[str, bool]]:
    """Fills `out` like `_eval_sample`; returns empty captions."""
    del place, tokenizer
    image_ops.eval_image(record["image"], data.image_px, resize=data.resize, out=out)
    return [("", False)] * (data.num_captions if data.captions == "all" else 1)


def _is_blank(tokenizer: Any) -> Callable[[str], bool]:
    """Whether a text is nothing to a tokenizer; a user's own may not say."""
    return getattr(tokenizer, "is_blank", text_ops.is_invisible)


def _texts(
    record: dict,
    data: Data,
    policy: str,
    rng: np.random.Generator | None,
    tokenizer: tokenizers.Tokenizer,
) -> list[str]:
    return text_ops.choose(
        record.get("captions"),
        policy=policy,
        langs=data.langs,
        sources={c.name: c.weight for c in data.caption_sources},
        num=data.num_captions,
        rng=rng,
        is_blank=_is_blank(tokenizer),
        where=f"record {record.get('key')!r}",
    )


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
    out = {k: np.concatenate([p[k] for p in parts]) for k in parts[0] if k != _TOLD}
    if _TOLD in parts[0]:
        told = np.sum([p[_TOLD] for p in parts], axis=0)
        told[:WHO] = parts[-1][_TOLD][:WHO]
        out[_TOLD] = told
    return out


def _iterate(make: Callable[[int], dict], num_batches: int, data: Data) -> Iterator[dict]:
    """Yields make(0), make(1) … in order, made ahead by Grain's threads and processes."""
    if num_batches <= 0:
        return iter(())
    import grain  # here, because it takes seconds and `vlp data` does not need it
    from absl import flags

    if (
        not flags.FLAGS.is_parsed()
    ):  # Grain's workers refuse to start otherwise (notebooks, scripts)
        flags.FLAGS.mark_as_parsed()
    options = grain.ReadOptions(
        num_threads=data.read_threads,
        prefetch_buffer_size=data.prefetch if data.read_threads else 0,
    )
    batches = lambda first: (
        grain.MapDataset.range(first, num_batches).map(make).to_iter_dataset(options)
    )
    if not data.workers:
        return iter(batches(0))

    def made_by_workers(first: int) -> Iterator[dict]:
        num = min(data.workers, num_batches - first)
        workers = grain.MultiprocessingOptions(
            num_workers=num, per_worker_buffer_size=data.prefetch
        )
        start = batches(first).mp_prefetch(workers, worker_init_fn=processes.end_with_parent)
        return _copies(start)

    return _restarted(made_by_workers)


def _restarted(start: Callable[[int], Iterator[dict]]) -> Iterator[dict]:
    """Yields what start(0) does; if a worker process is killed, start(n) goes on behind the n batches that were made.

    Raises: `check.Failed` if none was made since the last time.
    """
    done, died_at = 0, -1
    while True:
        try:
            for batch in start(done):
                yield batch
                done += 1
            return
        except RuntimeError as e:
            found = re.search(r"process was terminated unexpectedly with exit code (-?\d+)", str(e))
            if found is None:
                raise
            why = {"-9": "killed, as for want of memory", "-7": "no room in /dev/shm"}
            code = f"exit code {found[1]}" + (f": {why[found[1]]}" if found[1] in why else "")
            if done == died_at:
                do = "give it more memory, or lower config.data.workers, prefetch or cache_mb"
                text = (
                    f"data: got a worker process that died twice ({code}), expected batches; {do}"
                )
                raise check.Failed(text) from e
            log.warning("data: a worker process died (%s); all are started again", code)
            died_at = done


def _copies(batches: Iterable[dict]) -> Iterator[dict]:
    """Grain hands out views of shared memory that must not outlive it: copies are safe to keep."""
    copy = lambda batch: {k: np.array(v) for k, v in batch.items()}
    with processes.without_main():  # Grain pickles by value what a script defines
        iterator: Any = iter(batches)
        first = copy(next(iterator))
    atexit.register(iterator.close)  # a script may end in the midst of it
    try:
        yield first
        yield from map(copy, iterator)
    finally:
        atexit.unregister(iterator.close)
        iterator.close()
