"""What all processes of a run do at the same time with a checkpoint: meet, agree, check files in shares."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from vlp.ckpt import digest
from vlp.core import paths

_BYTES = 512  # of a message from one process


def meet(name: str) -> None:
    """Waits for all processes."""
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices(name)


def of_first(value: list[int]) -> list[int]:
    """Returns process 0's list of numbers: file systems may show others something older."""
    if jax.process_count() == 1:
        return value
    return json.loads(_gather(json.dumps(value).encode(), size=16 * len(value) + 16)[0])


def problem(folder: paths.Path, items: Sequence[str]) -> str:
    """Returns what is wrong with the files of a checkpoint, or "". Each process reads a share of the bytes."""
    num = jax.process_count()
    if num == 1:
        return digest.problem(folder, items)
    try:
        manifest, found = digest.opened(folder, items)
        if not found:
            share = digest.shares(manifest, num)[jax.process_index()]
            found = next(filter(None, digest.check_files(folder, manifest, share)), "")
    except Exception as e:  # all have to learn of it: the others wait below
        found = f"process {jax.process_index()} cannot read it ({e})"
    told = _gather(found.encode()[:_BYTES])
    return next((t.decode(errors="replace") for t in told if t), "")


def _gather(data: bytes, size: int = _BYTES) -> list[bytes]:
    """Returns the bytes of every process, which are at most `size` long."""
    from jax.experimental import multihost_utils

    size = int(np.max(multihost_utils.process_allgather(np.int32(size))))
    padded = np.zeros(size, np.uint8)
    padded[: len(data)] = np.frombuffer(data, np.uint8)
    rows: Any = np.asarray(multihost_utils.process_allgather(padded)).reshape(-1, size)
    return [row.tobytes().rstrip(b"\0") for row in rows]
