"""Reads datasets of records: `open_split` checks a split against its manifest and gives random access to it."""

import collections
import functools
import hashlib
import itertools
import os
import resource
import threading
import weakref
from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import numpy as np
from array_record.python import array_record_module as array_record  # pyright: ignore  # compiled, without stubs

from vlp.core import check
from vlp.data import storage
from vlp.data import tokenizer as tokenizers
from vlp.data.records.format import decode
from vlp.data.records.manifest import MANIFEST, TOKENIZER, check_file, read_manifest

HASHED_BYTES = 10**9  # open_split checks every byte of a split up to this size (about 1 s per GB)
OPEN_COPIES = 32  # remote shards that are open at a time: each keeps its bytes on the disk
# local shards that are open at a time, of about 0.5 MB of memory each (at most a quarter of `ulimit -n`)
MAX_OPEN = 2048
_READER = "readahead_buffer_size:0,max_parallelism:0"  # as array_record advises for random access


@runtime_checkable
class Source(Protocol):
    """Random access to records, without a position: order and resume belong to the dataset."""

    fingerprint: str  # of the keys in their order: what a checkpoint compares

    def __len__(self) -> int: ...

    def __getitem__(self, i: int) -> dict: ...

    def tokenizer(self) -> tokenizers.Tokenizer: ...


def open_split(
    path: str | os.PathLike, split: str, *, hashed: bool | None = None
) -> "RecordSource":
    """Opens one split after checking it against the manifest.

    Sizes and record counts are always checked; `hashed` also reads every byte (None: if the split
    is ≤ 1 GB). In an object store, a shard is fetched whole at its first record and checked then.
    """
    path, manifest = os.fspath(path), read_manifest(path)
    remote = storage.is_remote(path)
    path = path if remote else os.path.abspath(path)
    if split not in manifest["splits"]:
        raise check.unknown(f"split of {path}", split, manifest["splits"])
    entry = manifest["splits"][split]
    if hashed is None:
        hashed = not remote and sum(s["bytes"] for s in entry["shards"]) <= HASHED_BYTES
    for shard in entry["shards"]:
        file = os.path.join(path, shard["file"])
        check_file(file, shard, hashed=hashed)
        if remote and not hashed:
            continue
        if (count := _open_shard(storage.local_copy(file)).num_records()) != shard["records"]:
            raise check.error(
                file,
                f"{count} records",
                f"{shard['records']} records",
                "copy or build the dataset again",
            )
    digest = hashlib.sha256(f"{entry['keys_sha256']}:{split}".encode()).hexdigest()
    return RecordSource(path, split, tuple(s["records"] for s in entry["shards"]), digest)


def in_order(source: Any) -> Any:
    """Returns a source for a pass from first to last, at the least cost in memory."""
    return source.in_order() if isinstance(source, RecordSource) else source


def _open_shard(file: str) -> array_record.ArrayRecordReader:
    try:
        reader = array_record.ArrayRecordReader(file, _READER)
        if not reader.ok():
            reader.read([0])  # raises, and says why
        return reader
    except (RuntimeError, ValueError, OSError) as e:
        if fault := check.machine(file, e):
            raise fault from None
        raise check.error(
            file,
            f"an unreadable shard ({e!s:.80})",
            "an ArrayRecord file",
            "copy or build it again",
        ) from None


class _Readers:
    """The open shards of this process, by source and number: those used longest ago are closed.

    A reader that another thread still uses is closed when that is done with it.
    """

    def __init__(self, limit: Callable[[], int]):
        self._limit, self._lock = limit, threading.Lock()
        self._open: collections.OrderedDict[tuple[int, int], array_record.ArrayRecordReader] = (
            collections.OrderedDict()
        )

    def __len__(self) -> int:
        return len(self._open)

    def get(self, key: tuple[int, int], file: Callable[[], str]) -> array_record.ArrayRecordReader:
        with self._lock:
            if (reader := self._open.get(key)) is not None:
                self._open.move_to_end(key)
                return reader
        path = file()
        try:
            reader = _open_shard(path)
        except check.Failed:  # no handle left, say: with none of ours open, once more
            with self._lock:
                self._open.clear()
            reader = _open_shard(path)
        with self._lock:
            self._open[key] = reader
            while len(self._open) > self._limit():
                self._open.popitem(last=False)
        return reader

    def forget(self, source: int) -> None:
        with self._lock:
            for key in [k for k in self._open if k[0] == source]:
                del self._open[key]


def _max_open() -> int:
    return max(8, min(MAX_OPEN, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 4))


_LOCAL, _COPIES = _Readers(_max_open), _Readers(lambda: OPEN_COPIES)
_numbers = itertools.count()  # of the sources of this process


class RecordSource:
    """One split of a dataset: picklable, random access, safe to read from several threads."""

    def __init__(self, path: str, split: str, counts: tuple[int, ...], fingerprint: str):
        self.path, self.split, self.counts, self.fingerprint = path, split, counts, fingerprint
        self._ends = np.cumsum(counts)
        self._remote, self._number = storage.is_remote(path), next(_numbers)
        self._readers = _COPIES if self._remote else _LOCAL
        weakref.finalize(self, self._readers.forget, self._number)

    def __reduce__(self):
        return RecordSource, (self.path, self.split, self.counts, self.fingerprint)

    def _file(self, shard: int) -> str:
        name = f"{self.split}-{shard:05d}-of-{len(self.counts):05d}.arrayrecord"
        file = os.path.join(self.path, name)
        if not self._remote:
            return file
        entry = read_manifest(self.path)["splits"][self.split]["shards"][shard]
        return storage.local_copy(file, sha256=entry["sha256"])

    @property
    def num_bytes(self) -> int:
        """Bytes of the shards."""
        return sum(s["bytes"] for s in read_manifest(self.path)["splits"][self.split]["shards"])

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, i: int) -> dict:
        if not 0 <= i < len(self):
            raise IndexError(f"record {i} of {len(self)}")
        shard = int(np.searchsorted(self._ends, i, side="right"))
        local = int(i - self._ends[shard] + self.counts[shard])
        key = (self._number, shard)
        reader = self._readers.get(key, functools.partial(self._file, shard))
        data = reader.read(local, local + 1)[0]  # an eighth of the time of [local]
        storage.note(len(data))
        return decode(data)

    def in_order(self) -> "RecordSource":
        """Returns the same split for a pass from first to last: one shard is open at a time."""
        out = RecordSource(self.path, self.split, self.counts, self.fingerprint)
        out._readers = _Readers(lambda: 1)
        return out

    def inputs(self) -> tuple[str, ...]:
        """Returns the files whose change means that the dataset changed: the manifest, which has all digests."""
        return (os.path.join(self.path, MANIFEST),)

    @property
    def info(self) -> dict:
        """The dataset's description: origin, licence and attribution."""
        return read_manifest(self.path).get("info", {})

    def tokenizer(self) -> tokenizers.Tokenizer:
        """Returns the dataset's own tokenizer, checked against the manifest if that lists it."""
        file = os.path.join(self.path, TOKENIZER)
        entry = read_manifest(self.path).get("files", {}).get(TOKENIZER)
        if entry:
            check_file(file, entry, hashed=True)
        return tokenizers.load(file)
