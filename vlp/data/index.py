"""Compact indices: named arrays in one file of the cache, which all processes map.

A file is a line of JSON (type, length and place of each array; the builder's facts) followed by the arrays. It is
written in streams, so memory does not grow with its size. Opening it reads only this line and maps the rest. Files hold
no code (no pickles), and are read only from a directory that no other user can write. Not here: the arrays' meaning
(sources/).
"""

import contextlib
import hashlib
import itertools
import json
import logging
import mmap
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from vlp.core import check
from vlp.data import storage

MAGIC = "vlp-index-1"
_ALIGN = 64  # bytes
_HEADER_BYTES = 2**24  # no header is longer
_LOOKS = (
    2**13
)  # look-ups after which mapped pages are released: they count as this process's memory
log = logging.getLogger(__name__)


class Index:
    """The memory-mapped arrays of a file, by name; `meta` is from its writer. Pickled as its path.

    Raises: FileNotFoundError, or ValueError for a file that is damaged.
    """

    def __init__(self, path: str):
        self.path = path
        with open(path, "rb") as f:
            line = f.readline(_HEADER_BYTES)
        try:
            digest, text = line[:64].decode(), line[65:]
            if hashlib.sha256(text).hexdigest() != digest:
                raise ValueError("a changed header")
            header = json.loads(text)
            if header["magic"] != MAGIC or header["bytes"] != os.path.getsize(path):
                raise ValueError(f"{os.path.getsize(path)} bytes")
        except (ValueError, KeyError) as e:
            raise ValueError(f"{path}: damaged ({e})") from None
        self.meta: dict[str, Any] = header["meta"]
        with open(path, "rb") as f:
            self._map = mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ)
        self._arrays = {
            name: np.frombuffer(self._map, kind, num, at)
            for name, (kind, num, at) in header["arrays"].items()
        }
        self._looks = itertools.count(1)

    def __reduce__(self):
        return Index, (self.path,)

    def __getitem__(self, name: str) -> np.ndarray:
        return self._arrays[name]

    def arrays(self) -> dict[str, np.ndarray]:
        """Returns all arrays by name."""
        return dict(self._arrays)

    def part(self, name: str, i: int) -> slice:
        """Returns the slice of item i of a list; `name`: the array of the ends of all items."""
        if next(self._looks) % _LOOKS == 0 and hasattr(mmap, "MADV_DONTNEED"):
            self._map.madvise(mmap.MADV_DONTNEED)  # they stay in the system's own cache
        ends = self[name]
        return slice(int(ends[i - 1]) if i else 0, int(ends[i]))

    def text(self, name: str, i: int) -> str:
        """Returns text i of the list `name`; bytes that are not UTF-8 as \\xff."""
        here = self.part(f"{name}_ends", i)
        return self[name][here].tobytes().decode("utf-8", "backslashreplace")

    def texts(self, name: str) -> Iterator[str]:
        """Yields the texts of the list `name`."""
        return (self.text(name, i) for i in range(len(self[f"{name}_ends"])))


class Writer:
    """Writes the file of an `Index`. Each array may be written in any number of pieces."""

    def __init__(self, path: str, kinds: Mapping[str, str], *, lists: Sequence[str] = ()):
        """kinds: dtype by array name; lists: names of lists of texts."""
        self._path = path
        kinds = {**kinds}
        for name in lists:
            kinds |= {name: "u1", f"{name}_ends": "<i8"}
        self._kinds = {k: np.dtype(v).newbyteorder("<") for k, v in kinds.items()}
        self._sizes = dict.fromkeys(kinds, 0)  # in items
        directory = os.path.dirname(path)
        self._files = {k: tempfile.TemporaryFile(dir=directory) for k in kinds}

    def __enter__(self) -> "Writer":
        return self

    def __exit__(self, *_) -> None:
        for file in self._files.values():
            file.close()

    def size(self, name: str) -> int:
        """Returns how many items the array has so far."""
        return self._sizes[name]

    def add(self, name: str, values: Any) -> None:
        """Appends to an array."""
        values = np.ascontiguousarray(values, self._kinds[name])
        self._files[name].write(values.data)
        self._sizes[name] += values.size

    def add_texts(self, name: str, texts: Sequence[bytes]) -> None:
        """Appends to a list of texts."""
        begin = self._sizes[name]
        ends = begin + np.cumsum([len(t) for t in texts], dtype=np.int64)
        self.add(name, np.frombuffer(b"".join(texts), np.uint8))
        self.add(f"{name}_ends", ends)

    def add_list(self, name: str, other: Index) -> None:
        """Appends a list of texts of another index."""
        begin = self._sizes[name]
        self.add(name, other[name])
        self.add(f"{name}_ends", other[f"{name}_ends"] + begin)

    def finish(self, meta: Mapping[str, Any]) -> None:
        """Writes the arrays into one file, syncs it to the disk, and gives it its final name."""
        header: dict[str, Any] = {"magic": MAGIC, "meta": dict(meta), "arrays": {}, "bytes": 0}
        text = json.dumps(header).encode()
        room = len(text) + 200 + sum(len(k) + 80 for k in self._kinds)  # for the numbers below
        at = room = -(-room // _ALIGN) * _ALIGN
        for name, kind in self._kinds.items():
            header["arrays"][name] = [kind.str, self._sizes[name], at]
            at += -(-self._sizes[name] * kind.itemsize // _ALIGN) * _ALIGN
        header["bytes"] = at
        text = json.dumps(header).encode()
        text += b" " * (room - 66 - len(text)) + b"\n"
        part = f"{self._path}.{os.getpid()}.part"
        try:
            with open(part, "wb") as f:
                f.write(hashlib.sha256(text).hexdigest().encode() + b" " + text)
                for name, (_, _, begin) in header["arrays"].items():
                    f.seek(begin)
                    self._files[name].seek(0)
                    while data := self._files[name].read(2**20):
                        f.write(data)
                f.truncate(at)
                f.flush()
                os.fsync(f.fileno())
            os.replace(part, self._path)
        finally:
            with contextlib.suppress(FileNotFoundError):
                os.remove(part)


def cached(kind: str, stamp: str, build: Callable[[str], None]) -> Index:
    """Returns the index that `build(path)` writes, from the cache if it has one with this `stamp`.

    Processes that start together may each build it. Each writes the same bytes to its own file and renames it; a
    process that has the file open keeps its copy.
    """
    file = place(kind, stamp)
    directory = os.path.dirname(file)
    try:
        return Index(file)
    except FileNotFoundError:
        pass
    except ValueError as e:
        log.warning("%s; built again", e)
    try:
        build(file)
        return Index(file)
    except OSError as e:
        if e.filename and not str(e.filename).startswith(directory):
            raise
        if fault := check.machine(directory, e):
            raise fault from None
        got, do = f"{e.strerror} ({type(e).__name__})", "set VLP_CACHE to a directory of your own"
        raise check.error(directory, got, "room for an index", do) from None


def place(kind: str, stamp: str) -> str:
    """Returns where `cached` keeps an index."""
    name = hashlib.sha256(stamp.encode("utf-8", "surrogatepass")).hexdigest()[:32]
    return os.path.join(own_dir(kind), name)


def own_dir(kind: str) -> str:
    """Returns the cache directory of that kind, which only this user can read and write.

    Raises: `UserError` if it belongs to another user: its content cannot be trusted.
    """
    path = storage.cache_dir(kind)
    os.makedirs(path, mode=0o700, exist_ok=True)
    found = os.stat(path)
    if found.st_uid != os.getuid():
        got, do = f"a directory of user {found.st_uid}", "set VLP_CACHE to a directory of your own"
        raise check.error(path, got, f"one of user {os.getuid()}", do)
    if found.st_mode & 0o077:
        os.chmod(path, 0o700)
    return path


def batched(values: Iterable, num: int = 2**14) -> Iterator[list]:
    """Yields lists of up to `num` values."""
    out = []
    for value in values:
        out.append(value)
        if len(out) == num:
            yield out
            out = []
    if out:
        yield out
