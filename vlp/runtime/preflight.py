"""Checks before the first step that a run will be able to save: every process writes and reads, and there is room.

What cannot be known before (a quota, a disk that fills up later) ends the run at the failed save, in one line that
names the checkpoints that are kept.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import resource
import secrets
from collections.abc import Iterable
from typing import Any

import jax

from vlp.core import agree, check, paths
from vlp.runtime import hosts
from vlp.runtime.workdir import SHARED

log = logging.getLogger(__name__)
_FILES = 65_536  # open files that suffice
_LEAST_FILES = 128  # Python, JAX and a save; readers of data take a quarter of the limit at most


def check_workdir(workdir: os.PathLike, states: Iterable[Any], keep: int) -> None:
    """Raises UserError on all processes if one of them could not save in the workdir.

    Args:
        workdir: exists.
        states: what the checkpoints of each stage will hold: trees of jax.ShapeDtypeStruct with shardings; empty if
            nothing will be saved.
        keep: number of checkpoints that are kept.
    """
    folder = paths.of(workdir)
    if not paths.is_remote(workdir) and os.path.isdir(folder / "checkpoints"):
        folder = folder / "checkpoints"  # may be a link to another disk  # pyright: ignore
    token = agree.share("workdir", secrets.token_hex(8))
    shared = folder / f".{token}{SHARED}"
    try:
        with hosts.raise_together("--workdir"):
            check_files()
            _write_and_read(folder / f".{token}_{jax.process_index()}{SHARED}")
            if jax.process_index() == 0:
                paths.write(shared, token.encode())
            if not paths.is_remote(workdir):
                _check_room(folder, list(states), keep)
        with hosts.raise_together("--workdir"):
            _check_shared(shared, token)
    finally:
        if jax.process_index() == 0:
            with contextlib.suppress(OSError, check.UserError):
                paths.remove(shared)


def check_files() -> None:
    """Raises the limit of open files as far as the system allows; raises UserError if it is too low to work."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < _FILES and soft != hard:
        soft = _FILES if hard == resource.RLIM_INFINITY else min(_FILES, hard)
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    if soft < _LEAST_FILES:
        do = "raise the limit with `ulimit -n`"
        raise check.error("open files", f"a limit of {soft}", f"{_LEAST_FILES} or more", do)


def _write_and_read(path: Any) -> None:
    data = secrets.token_bytes(1 << 16)
    try:
        paths.write(path, data)
        found = paths.read(path)
        paths.remove(path)
    except OSError as e:
        do = check.advice(e, "choose another --workdir")
        raise check.error(f"--workdir {path.parent}", e.strerror, "room to write to", do) from e
    if found != data:
        got, expected = f"other bytes in {path.name} than were written", "the same"
        raise check.error(f"--workdir {path.parent}", got, expected, "check the disk or its mount")


def _check_shared(path: Any, token: str) -> None:
    """Raises UserError if this process does not see the file of process 0."""

    def good() -> bool:
        with contextlib.suppress(OSError, check.UserError):
            return paths.read(path) == token.encode()
        return False

    if not hosts.appears(path, good):
        got = "a folder without the file that process 0 wrote into its own"
        do = "give a --workdir that all hosts share (NFS, a bucket)"
        raise check.error(f"--workdir {path.parent}", got, "one folder for all", do)


def _check_room(folder: Any, states: list[Any], keep: int) -> None:
    """Raises UserError if a checkpoint cannot fit: free space, inodes, the limit of a file's size."""
    where = f"--workdir {folder}"
    num_bytes = max(map(_num_bytes, states), default=0)
    disk = os.statvfs(folder)
    free = disk.f_bavail * disk.f_frsize
    if disk.f_blocks and free < num_bytes:
        do = "free space or choose another --workdir"
        expected = f"{_size(num_bytes)} for a checkpoint"
        raise check.error(where, f"{_size(free)} free", expected, do)
    if disk.f_files and disk.f_favail < 100:
        got = f"room for {disk.f_favail} files (inodes)"
        raise check.error(where, got, "100 or more", "remove files or choose another --workdir")
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)[0]
    largest = max(
        (max(map(_shard_bytes, jax.tree.leaves(s)), default=0) for s in states), default=0
    )
    if limit != resource.RLIM_INFINITY and limit < largest:
        expected = f"{_size(largest)} for the largest array"
        got = f"a limit of {_size(limit)} for a file"
        raise check.error(where, got, expected, "raise the limit with `ulimit -f`")
    if disk.f_blocks and free < (keep + 1) * num_bytes and jax.process_index() == 0:
        log.warning(
            "%s has %s free; %d checkpoints (config.keep_checkpoints) and one being written take up to %s",
            folder, _size(free), keep, _size((keep + 1) * num_bytes),
        )  # fmt: skip


def _num_bytes(state: Any) -> int:
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(state))


def _shard_bytes(x: Any) -> int:
    """Bytes of one device's part of an array, which are written as one piece."""
    sharding = getattr(x, "sharding", None)
    shape = x.shape if sharding is None else sharding.shard_shape(x.shape)
    return math.prod(shape) * x.dtype.itemsize


def _size(num: int | float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if num < 1000:
            return f"{num:.3g} {unit}"
        num /= 1000
    return f"{num:.3g} TB"
