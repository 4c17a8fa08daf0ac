"""The bar of a stage's steps, where a terminal has room for one; what is logged stands above it in whole lines."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator

from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from vlp.core import progress

MIN_COLUMNS = (
    40  # a narrower bar says nothing; some terminals (of editors, of CI) say that they have 0
)


@contextlib.contextmanager
def shown(name: str, first: int, total: int) -> Iterator[tqdm]:
    """A bar of steps that begins behind step `first`; disabled where none can be drawn (`bar.disable`)."""
    bar = tqdm(total=total, initial=first, desc=name, unit="step", disable=not fits(), leave=True)
    with contextlib.ExitStack() as closing:
        closing.callback(bar.close)
        if not bar.disable:
            closing.enter_context(logging_redirect_tqdm())
            closing.enter_context(progress.lines_by(tqdm.write))
        yield bar


def fits() -> bool:
    """Whether standard error is a terminal in which a bar can be read."""
    try:
        screen = sys.stderr.fileno()
        return os.isatty(screen) and os.get_terminal_size(screen).columns >= MIN_COLUMNS
    except (OSError, ValueError, AttributeError):  # closed, or none
        return False
