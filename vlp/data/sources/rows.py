"""Shared by sources of rows: cached arrays, groups of rows with the same image, safe paths."""

import functools
import hashlib
import os
import pathlib
import stat
import tempfile
from collections.abc import Callable, Iterable, Mapping

import numpy as np

from vlp.core import check
from vlp.data import counts, index, pictures, storage

CACHED_BYTES = (
    2**20
)  # smaller files are not cached: indexing them again is fast and keeps the cache small
Index = tuple[dict, dict[str, np.ndarray]]


def cached(kind: str, what: str, num_bytes: int, build: Callable[[], Index]) -> Index:
    """Returns build() = (JSON-able facts, arrays), from the cache if it was made before.

    what: all that decides the result, stamps of the files included; num_bytes: their size.
    """
    if num_bytes < CACHED_BYTES:
        return build()

    def write(path: str) -> None:
        facts, arrays = build()
        with index.Writer(path, {k: a.dtype.str for k, a in arrays.items()}) as writer:
            for name, array in arrays.items():
                writer.add(name, array)
            writer.finish(facts)

    found = index.cached(kind, f"2:{what}", write)
    return found.meta, found.arrays()


class Groups:
    """Rows of one image as one record each: groups in the order of their first rows.

    order: i64[rows], the rows of the first group, of the second …; starts: i64[groups + 1].
    """

    def __init__(self, arrays: Mapping[str, np.ndarray]):
        self._order, self._starts = arrays["order"], arrays["starts"]

    def __len__(self) -> int:
        return len(self._starts) - 1

    def rows(self, i: int) -> list[int]:
        """Returns the rows of group i, ascending."""
        return self._order[self._starts[i] : self._starts[i + 1]].tolist()


def group(digests: Iterable[bytes]) -> dict[str, np.ndarray]:
    """Returns the arrays of `Groups` for one digest of 16 bytes a row; {} if no digest occurs twice."""
    with tempfile.TemporaryFile() as file:
        seen = counts.Counts()
        for one in digests:
            file.write(one)
            seen.add([one])
        if not seen.num_repeats():
            return {}
        file.seek(0)
        found = np.fromfile(file, np.uint64).reshape(-1, 2)
    order = np.lexsort((found[:, 1], found[:, 0]))  # stable: rows of a group ascend
    new = np.ones(len(order), bool)
    new[1:] = (found[order[1:]] != found[order[:-1]]).any(axis=1)
    begins = np.flatnonzero(new)
    by_first = np.argsort(order[begins])
    sizes = np.diff(np.append(begins, len(order)))[by_first]
    starts = np.append(0, np.cumsum(sizes))
    places = np.repeat(begins[by_first] - starts[:-1], sizes) + np.arange(len(order))
    return {"order": order[places].astype(np.int64), "starts": starts.astype(np.int64)}


def digest(data: bytes) -> bytes:
    """Returns 16 bytes that equal data share."""
    return hashlib.blake2b(data, digest_size=16).digest()


def same_path(directory: str, name: str) -> bytes:
    """Returns what the paths of one file share: without "." and doubled "/"; ".." may cross a link."""
    path = name if name.startswith("/") else f"{directory}/{name}"
    if "./" in path or "//" in path:
        path = str(pathlib.PurePosixPath(path))
    return path.encode("utf-8", "surrogatepass")


def is_inside(path: str, root: str) -> bool:
    """True if a path, all links followed, leads to something under `root` (itself without links)."""
    directory, name = os.path.split(path)
    found = os.path.join(_real(os.path.join(os.getcwd(), directory)), name)
    if name in ("", ".", "..") or os.path.islink(found):
        found = os.path.realpath(found)
    return found == root or found.startswith(root.rstrip(os.sep) + os.sep)


@functools.lru_cache(maxsize=4096)
def _real(directory: str) -> str:
    return os.path.realpath(directory)


def read_file(path: str, root: str, *, where: str, key: str | None, allow_outside: bool) -> bytes:
    """Returns the bytes of an image or text that a row names.

    Raises: `BadImage` "outside" if it lies outside of `root` and that is not allowed, "missing" if
    it is no regular file (a FIFO or a device is never opened).
    """
    try:
        if not allow_outside and not is_inside(path, root):
            detail = f"{where} leads out of {root} (--allow-outside follows it, in training "
            raise pictures.BadImage("outside", f"{detail}config.data.allow_outside)", key)
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise pictures.BadImage("missing", f"{where} ({path}: no regular file)", key)
        with open(path, "rb") as f:
            data = f.read()
    except OSError as e:
        if fault := check.machine(path, e):
            raise fault from None
        raise pictures.BadImage("missing", f"{where} ({path}: {type(e).__name__})", key) from None
    storage.note(len(data))
    return data
