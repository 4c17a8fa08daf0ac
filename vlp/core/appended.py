"""Files that grow by lines, on a disk or in a store.

A store cannot append. There the lines are kept in memory and written as an object, again and again, until it has
`PART_BYTES`; then the next part begins: metrics.jsonl, metrics.jsonl.1, metrics.jsonl.2, … Each object is whole at any
time. Readers take the parts one after the other, wherever they lie.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import threading
import time
from collections.abc import Iterator
from typing import IO

from vlp.core import check, paths

log = logging.getLogger(__name__)
PART_BYTES = 4 << 20  # what is written again at each flush is at most this
_EVERY_SECS = 30.0  # lines reach a store after so long at the latest, also without a flush


class Appended:
    """One writer's file. Lines are safe after `flush`."""

    def __init__(self, path: paths.Path, keep: bytes | None = None):
        """Opens the file.

        Args:
            path: of its first part.
            keep: what the file holds from now on: a beginning of what it holds, or other lines. None: all of it.
        """
        self._path, self._remote = path, paths.is_remote(path)
        self._number = (
            -1
        )  # of the part that grows; -1: not opened yet, and not made if no line comes
        self._file: IO[str] | None = None
        if keep is not None:
            _replace(path, keep)
            self._open()

    def _open(self) -> None:
        path = self._path
        sizes = list(map(len, _parts(path))) if self._remote or _exists(path, 1) else [0]
        self._number = max(len(sizes) - 1, 0)
        if not self._remote:
            path.parent.mkdir(parents=True, exist_ok=True)  # type: ignore[union-attr]
            self._file = open_text(_part(path, self._number), "a", buffering=1)
            return
        self._data = bytearray(paths.read(_part(path, self._number)) if sizes else b"")
        self._stored, self._at = len(self._data), time.monotonic()
        self._lock = threading.Lock()  # of the fields
        self._storing = threading.Lock()  # one upload at a time
        self._thread: threading.Thread | None = None

    @property
    def path(self) -> paths.Path:
        return self._path

    def write(self, line: str) -> None:
        """Adds a line; it should end with a line break."""
        if self._number < 0:
            self._open()
        if self._file is not None:
            with paths.named(self._path):
                self._file.write(line)
            return
        data = line.encode()
        if self._data and len(self._data) + len(data) > PART_BYTES:
            self.flush()
            with self._lock:
                self._number, self._data, self._stored = self._number + 1, bytearray(), 0
        with self._lock:
            self._data += data
        idle = self._thread is None or not self._thread.is_alive()
        if idle and time.monotonic() - self._at > _EVERY_SECS:
            self._at = time.monotonic()
            self._thread = threading.Thread(target=self._try, daemon=True, name="append")
            self._thread.start()

    def flush(self) -> None:
        """Returns once all lines are on the disk or in the store. Raises OSError, Failed."""
        if self._number < 0:
            return
        if self._file is not None:
            with paths.named(self._path):
                self._file.flush()
                os.fsync(self._file.fileno())
            return
        with self._storing:
            with self._lock:
                number, data = self._number, bytes(self._data)
            if len(data) != self._stored:
                paths.write(_part(self._path, number), data)
                self._stored = len(data)
        self._at = time.monotonic()

    def close(self) -> None:
        self.flush()
        if self._file is not None:
            self._file.close()

    def _try(self) -> None:
        try:
            self.flush()
        except (OSError, check.UserError) as e:  # the next flush raises it, if it lasts
            log.warning("%s: not written for now (%s)", self._path, check.line(e))


def read(path: paths.Path) -> bytes:
    """Returns what the file holds; b"" if there is none."""
    return b"".join(_parts(path))


def parts(path: paths.Path) -> Iterator[paths.Path]:
    """Yields the paths of the file's parts. Raises FileNotFoundError if there is none."""
    if not paths.exists(path):
        raise FileNotFoundError(2, os.strerror(2), str(path))
    yield path
    for number in itertools.count(1):
        if not _exists(path, number):
            return
        yield _part(path, number)


def rename(path: paths.Path, target: paths.Path) -> None:
    """Renames the file with all its parts."""
    last = len(list(parts(path))) - 1
    for number in range(last + 1):
        if paths.is_remote(path):
            paths.copy(_part(path, number), _part(target, number))
        else:
            os.replace(_part(path, number), _part(target, number))
    for number in range(last, -1, -1):
        paths.remove(_part(path, number))


def open_text(path: os.PathLike, mode: str, buffering: int = -1) -> IO[str]:
    """Opens a local file for writing; fails if it is a symbolic link."""
    opener = lambda name, flags: os.open(name, flags | os.O_NOFOLLOW, 0o666)
    return open(path, mode, buffering, encoding="utf-8", opener=opener)


def _replace(path: paths.Path, data: bytes) -> None:
    """Makes the file hold `data`. Parts that stay as they are, all but the last in a restart, are not touched."""
    found = list(_parts(path))
    number, rest = 0, data
    for part in found:
        if not part or not rest.startswith(part):
            break
        number, rest = number + 1, rest[len(part) :]
    for stale in range(len(found) - 1, number - bool(not rest and number), -1):
        paths.remove(_part(path, stale))  # from the end: what is left is a beginning
    if rest or not number:
        pieces = list(_pieces(rest)) if paths.is_remote(path) else [rest]
        for k, piece in enumerate(pieces or [b""], number):
            paths.write(_part(path, k), piece)


def _pieces(data: bytes) -> Iterator[bytes]:
    """Splits after line breaks, into parts of `PART_BYTES` at most (more for a longer line)."""
    while len(data) > PART_BYTES:
        cut = data.rfind(b"\n", 0, PART_BYTES) + 1 or data.find(b"\n") + 1 or len(data)
        yield data[:cut]
        data = data[cut:]
    if data:
        yield data


def _parts(path: paths.Path) -> Iterator[bytes]:
    with contextlib.suppress(FileNotFoundError):
        for number in itertools.count():
            yield paths.read(_part(path, number))


def _exists(path: paths.Path, number: int) -> bool:
    return paths.is_file(_part(path, number))


def _part(path: paths.Path, number: int) -> paths.Path:
    return path.with_name(f"{path.name}.{number}") if number else path
