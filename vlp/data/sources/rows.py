"""What sources of rows share: arrays kept in the cache, rows of one image as a group, safe files.

An index is built once a machine: NumPy arrays that all processes map, beside a small JSON file.
"""

import functools
import hashlib
import json
import logging
import os
import pathlib
import shutil
import stat
from collections.abc import Callable, Iterable, Mapping

import numpy as np

from vlp.data import image_ops, reads

CACHED_BYTES = 2**20  # a smaller file is indexed anew faster than the cache fills with its like
Index = tuple[dict, dict[str, np.ndarray]]
log = logging.getLogger(__name__)


def cached(kind: str, what: str, num_bytes: int, build: Callable[[], Index]) -> Index:
    """Returns build() = (JSON-able facts, arrays), from the cache if it was made before.

    what: all that decides the result, stamps of the files included; num_bytes: their size.
    """
    if num_bytes < CACHED_BYTES:
        return build()
    name = hashlib.sha256(f"1:{what}".encode("utf-8", "surrogatepass")).hexdigest()[:32]
    directory = os.path.join(reads.cache_dir(kind), name)
    try:
        return _load(directory)
    except (OSError, ValueError, KeyError, TypeError):  # none yet, or damaged
        facts, arrays = build()
    part = f"{directory}.{os.getpid()}.part"
    try:
        os.makedirs(part, exist_ok=True)
        for key, array in arrays.items():
            np.save(os.path.join(part, f"{key}.npy"), array)
        with open(os.path.join(part, "facts.json"), "w", encoding="utf-8") as f:
            json.dump({"arrays": sorted(arrays), "facts": facts}, f)
        if os.path.isdir(directory):  # a damaged one, or another process was faster
            shutil.rmtree(directory, ignore_errors=True)
        os.replace(part, directory)
        return _load(directory)
    except (OSError, ValueError) as e:
        log.warning("%s: the index is not kept (%s)", directory, e)
        shutil.rmtree(part, ignore_errors=True)
        return facts, arrays


def _load(directory: str) -> Index:
    with open(os.path.join(directory, "facts.json"), encoding="utf-8") as f:
        held = json.load(f)
    load = lambda name: np.load(os.path.join(directory, f"{name}.npy"), mmap_mode="r")
    return held["facts"], {name: load(name) for name in held["arrays"]}


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
    """Returns the arrays of `Groups` for one digest of 16 bytes a row; {} if none comes twice."""
    held = bytearray()  # 16 bytes a row, and no Python object for it
    for one in digests:
        held += one
    found = np.frombuffer(held, np.uint64).reshape(-1, 2)
    order = np.lexsort((found[:, 1], found[:, 0]))  # stable: rows of a group ascend
    new = np.ones(len(order), bool)
    new[1:] = (found[order[1:]] != found[order[:-1]]).any(axis=1)
    if new.all():
        return {}
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
    found = os.path.join(_real(directory), name)
    if name in ("", ".", "..") or os.path.islink(found):
        found = os.path.realpath(found)
    return found == root or found.startswith(root.rstrip(os.sep) + os.sep)


@functools.lru_cache(maxsize=4096)
def _real(directory: str) -> str:
    return os.path.realpath(directory or ".")


def read_file(path: str, root: str, *, where: str, key: str | None, allow_outside: bool) -> bytes:
    """Returns the bytes of an image or text that a row names.

    Raises: `BadImage` "outside" if it lies outside of `root` and that is not allowed, "missing" if
    it is no regular file (a FIFO or a device is never opened).
    """
    try:
        if not allow_outside and not is_inside(path, root):
            detail = f"{where} leads out of {root} (--allow-outside follows it, in training "
            raise image_ops.BadImage("outside", f"{detail}config.data.allow_outside)", key)
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise image_ops.BadImage("missing", f"{where} ({path}: no regular file)", key)
        with open(path, "rb") as f:
            data = f.read()
    except OSError as e:
        raise image_ops.BadImage("missing", f"{where} ({path}: {type(e).__name__})", key) from None
    reads.note(len(data))
    return data
