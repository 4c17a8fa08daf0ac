"""Bytes by path, from a disk or any store that fsspec knows: ranged, retried, cached, counted.

A path with "://" is remote. A remote read that fails, stalls or comes back short is repeated with
growing pauses and counted; a missing file fails at once. Not here: what the bytes mean.
"""

import collections
import functools
import hashlib
import io
import os
import stat as stat_lib
import tempfile
import threading
from collections.abc import Callable
from typing import Any

from vlp.core import check, stores
from vlp.core.stores import is_remote

COUNTS = ("reads", "bytes", "cached", "errors", "stalls", "short")  # bytes: from disk or the store
_counts: collections.Counter = collections.Counter()
_told: collections.Counter = collections.Counter()
_blocks: collections.OrderedDict[tuple[str, int], bytes] = collections.OrderedDict()
_lock = threading.Lock()


def counts() -> dict[str, int]:
    """What this process has read so far, by `COUNTS`; errors, stalls and short reads were repeated."""
    with _lock:
        return {k: _counts[k] for k in COUNTS}


def news() -> dict[str, int]:
    """What came to `counts` since this was called last."""
    with _lock:
        new = {k: _counts[k] - _told[k] for k in COUNTS}
        _told.update(new)
    return new


def note(num_bytes: int) -> None:
    """Counts a read that another library did."""
    with _lock:
        _counts["reads"] += 1
        _counts["bytes"] += num_bytes


def reset() -> None:
    """Forgets counts, blocks and sizes (tests; a store whose files were replaced)."""
    with _lock:
        _counts.clear()
        _told.clear()
        _blocks.clear()
    _remote_size.cache_clear()


def listing(path: str) -> list[str]:
    """Returns the sorted paths of the entries in a directory; [] if it is no directory."""
    if not is_remote(path):
        return (
            sorted(os.path.join(path, f) for f in os.listdir(path)) if os.path.isdir(path) else []
        )
    fs, inner = stores.open_fs(path)
    if not _retried(path, lambda: fs.isdir(inner)):
        return []
    names = _retried(path, lambda: fs.ls(inner, detail=False))
    return sorted(f"{path.rstrip('/')}/{n.rstrip('/').rsplit('/', 1)[-1]}" for n in names)


def exists(path: str) -> bool:
    """True for a file."""
    if not is_remote(path):
        return os.path.isfile(path)
    fs, inner = stores.open_fs(path)
    return _retried(path, lambda: fs.isfile(inner))


def size(path: str) -> int:
    """Returns the bytes of a file; of a remote one, as they were when first asked for."""
    return _remote_size(path) if is_remote(path) else os.path.getsize(path)


@functools.lru_cache(maxsize=65536)
def _remote_size(path: str) -> int:
    fs, inner = stores.open_fs(path)
    return int(_retried(path, lambda: fs.size(inner)))


def stamp(path: str) -> str:
    """Changes when the file changes: its size with its modification time or the store's checksum."""
    if not is_remote(path):
        found = os.stat(path)
        return f"{found.st_size}:{found.st_mtime_ns}"
    fs, inner = stores.open_fs(path)
    info = _retried(path, lambda: fs.info(inner))
    tags = [str(info.get(k, "")) for k in ("size", "etag", "ETag", "md5Hash", "mtime", "created")]
    return ":".join(tags)


def read(path: str, offset: int, num_bytes: int) -> bytes:
    """Returns exactly that range. Raises: `UserError` if the file ends before it or stays away."""
    if not is_remote(path):
        try:
            descriptor = os.open(path, os.O_RDONLY)
            try:
                data = os.pread(descriptor, num_bytes, offset)
            finally:
                os.close(descriptor)
        except (OSError, MemoryError) as e:
            raise check.machine(path, e) or e from None
        note(len(data))
    else:
        step, stop = stores.POLICY.block_bytes, min(offset + num_bytes, size(path))
        blocks = range(offset // step, -(-stop // step))
        joined = b"".join(_block(path, i) for i in blocks)
        begin = offset - offset // step * step
        data = joined[begin : begin + max(stop - offset, 0)]
    if len(data) != num_bytes:
        raise check.error(
            path,
            f"{len(data)} bytes at {offset}",
            f"{num_bytes}",
            "the file was cut; copy it again",
        )
    return data


def whole(path: str) -> bytes:
    """Returns all bytes of a (small) file."""
    return read(path, 0, size(path))


def _block(path: str, number: int) -> bytes:
    key = (path, number)
    with _lock:
        if key in _blocks:
            _blocks.move_to_end(key)
            _counts["cached"] += 1
            return _blocks[key]
    begin = number * stores.POLICY.block_bytes
    data = fetch(path, begin, min(begin + stores.POLICY.block_bytes, size(path)))
    with _lock:
        _blocks[key] = data
        while len(_blocks) > stores.POLICY.cache_blocks:
            _blocks.popitem(last=False)
    return data


def fetch(path: str, begin: int, stop: int) -> bytes:
    """Returns bytes begin … stop - 1 of a remote file, past the cache."""
    fs, inner = stores.open_fs(path)

    def once() -> bytes:
        data = fs.cat_file(inner, start=begin, end=stop)
        if len(data) != stop - begin:
            raise stores.ShortRead(f"{len(data)} of {stop - begin} bytes")
        return data

    data = _retried(path, once)
    note(len(data))
    return data


def _retried(path: str, ask: Callable[[], Any]) -> Any:
    def failed(e: Exception) -> None:
        kind = {TimeoutError: "stalls", stores.ShortRead: "short"}.get(type(e), "errors")
        with _lock:
            _counts[kind] += 1

    try:
        return stores.retried(path, ask, failed)
    except (FileNotFoundError, IsADirectoryError, PermissionError) as e:
        raise check.error(
            path, f"{type(e).__name__} ({e!s:.80})", "a readable file", "check the path"
        ) from None


class File(io.RawIOBase):
    """A file of `read` with a position, for parsers that want one (tarfile, pyarrow)."""

    def __init__(self, path: str):
        self.path, self._at, self._size = path, 0, size(path)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = 0) -> int:
        self._at = offset + (0, self._at, self._size)[whence]
        return self._at

    def read(self, num_bytes: int | None = -1) -> bytes:
        left = max(self._size - self._at, 0)
        num_bytes = left if num_bytes is None or num_bytes < 0 else min(num_bytes, left)
        data = read(self.path, self._at, num_bytes) if num_bytes else b""
        self._at += num_bytes
        return data

    def readinto(self, buffer: Any) -> int:
        data = self.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)


def shard_limit() -> int:
    """Bytes of shard copies on this machine's disk: $VLP_CACHE_GB, by default 50 GB."""
    text = os.environ.get("VLP_CACHE_GB", "50")
    try:
        return int(float(text) * 1e9)
    except ValueError:
        raise check.error("VLP_CACHE_GB", repr(text), "a number of GB", "correct it") from None


def bounds() -> str:
    """What reading from a store may take: memory of a process, disk of the machine."""
    blocks = stores.POLICY.cache_blocks * stores.POLICY.block_bytes / 1e6
    return f"{blocks:.0f} MB of blocks, {shard_limit() / 1e9:.1f} GB of shards in {cache_dir('shards')}"


def local_copy(
    path: str, *, sha256: str = "", directory: str = "", limit_bytes: int | None = None
) -> str:
    """Returns a local file with the bytes of `path`, fetched whole if it is remote.

    Copies live in `directory` (default `cache_dir("shards")`), named by path and size; those used
    longest ago make room beyond `limit_bytes` (default `shard_limit()`). Several processes may
    share the directory. Raises: `UserError` if what is fetched has another digest than `sha256`.
    """
    if not is_remote(path):
        return path
    limit_bytes = shard_limit() if limit_bytes is None else limit_bytes
    directory = directory or cache_dir("shards")
    os.makedirs(directory, exist_ok=True)
    name = hashlib.sha256(f"{path}:{stamp(path)}".encode()).hexdigest()[:32]
    target = os.path.join(directory, name)
    if not os.path.isfile(target):
        _make_room(directory, limit_bytes - size(path))
        part = f"{target}.{os.getpid()}.{threading.get_ident()}.part"
        step, digest = 16 * stores.POLICY.block_bytes, hashlib.sha256()
        try:
            with open(part, "wb") as f:
                for begin in range(0, size(path), step):
                    data = fetch(path, begin, min(begin + step, size(path)))
                    digest.update(data)
                    f.write(data)
            if sha256 and digest.hexdigest() != sha256:
                got, do = f"sha256 {digest.hexdigest()[:12]}… (changed bytes)", "copy it again"
                raise check.error(path, got, f"{sha256[:12]}…", do)
            os.replace(part, target)
        finally:
            if os.path.exists(part):
                os.remove(part)
    os.utime(target)
    return target


def _make_room(directory: str, limit_bytes: int) -> None:
    files = [e for e in os.scandir(directory) if e.is_file() and not e.name.endswith(".part")]
    stats = sorted((e.stat().st_mtime, e.stat().st_size, e.path) for e in files)
    total = sum(s for _, s, _ in stats)
    for _, num_bytes, file in stats:
        if total <= limit_bytes:
            return
        os.remove(file)  # a reader that holds it open keeps its bytes
        total -= num_bytes


def cache_dir(name: str) -> str:
    """Returns the directory for such files: $VLP_CACHE, else ~/.cache/vlp, else a temporary one."""
    root = os.environ.get("VLP_CACHE") or os.path.expanduser("~/.cache/vlp")
    try:
        os.makedirs(os.path.join(root, name), exist_ok=True)
        return os.path.join(root, name)
    except OSError:
        root = os.path.join(tempfile.gettempdir(), f"vlp-{os.getuid()}")
    os.makedirs(root, mode=0o700, exist_ok=True)
    found = os.lstat(root)
    if found.st_uid != os.getuid() or not stat_lib.S_ISDIR(found.st_mode):
        got, do = "something that is not this user's", "set VLP_CACHE to a directory of your own"
        raise check.error(root, got, "a directory of this user", do)
    os.makedirs(os.path.join(root, name), mode=0o700, exist_ok=True)
    return os.path.join(root, name)
