"""What all processes of a run do at the same time with a checkpoint: meet, agree, check files in shares."""

from __future__ import annotations

from collections.abc import Sequence

import jax

from vlp.ckpt import digest
from vlp.core import agree, paths


def meet(name: str) -> None:
    """Waits for all processes. Raises Failed if some do not come."""
    agree.share(name, None)


def of_first(value: list[int]) -> list[int]:
    """Returns process 0's list of numbers: file systems may show others something older."""
    return agree.share("list of checkpoints", value)


def problem(folder: paths.Path, items: Sequence[str]) -> str:
    """Returns what is wrong with the files of a checkpoint, or "". Each process reads a share of the bytes."""
    num = jax.process_count()
    if num == 1:
        return digest.problem(folder, items)
    try:
        manifest, found = digest.opened(folder, items)
        if not found:
            share = digest.shares(manifest, num)[jax.process_index()]
            found = digest.check_files(folder, manifest, share)
    except Exception as e:  # all have to learn of it: the others wait below
        found = f"process {jax.process_index()} cannot read it ({e})"
    first = lambda told: next(filter(None, told), "")
    return agree.decide("files of a checkpoint", found, first)
