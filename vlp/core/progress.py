"""Progress lines: one soon after a phase begins, and more until it ends.

    with progress.phase("compiling the step"):
        ...

Printed only if the root logger shows INFO: in commands, on process 0, and not when vlp is used as a library. They go to
standard error, or to standard output if the log goes there (`in_log`).
"""

import contextlib
import logging
import sys
import threading
import time
from collections.abc import Callable, Iterator

FIRST_SECS = 4.0  # shorter phases print nothing
EVERY_SECS = 15.0
_phases: list[object] = []  # outermost first; the innermost prints
in_log = False
_write: Callable[[str], object] | None = None  # used instead of print while a bar is shown
_last = 0.0  # when anything was last printed (time.monotonic)


@contextlib.contextmanager
def phase(
    text: str | Callable[[], str], since: Callable[[], float] | None = None
) -> Iterator[None]:
    """Inside, prints "text … 19 s" if nothing else was printed for a while.

    Args:
        text: a string, or a function if the text changes during the phase.
        since: returns when the work that the text names began (time.monotonic); default: the begin of the phase.
    """
    began, done = time.monotonic(), threading.Event()
    _phases.append(done)

    def speak() -> None:
        global _last
        while True:
            due = began + FIRST_SECS if _last < began else _last + EVERY_SECS
            if done.wait(max(due - time.monotonic(), 0.05)):
                return
            now = time.monotonic()
            due = began + FIRST_SECS if _last < began else _last + EVERY_SECS
            if now >= due and _phases[-1:] == [done]:
                _last = now
                if logging.getLogger().isEnabledFor(logging.INFO):
                    what = text if isinstance(text, str) else text()
                    line = f"{what} … {now - (since() if since else began):.0f} s"
                    if _write:
                        _write(line)
                    else:
                        print(line, file=sys.stdout if in_log else sys.stderr, flush=True)

    threading.Thread(target=speak, daemon=True, name="progress").start()
    try:
        yield
    finally:
        done.set()
        _phases.remove(done)


@contextlib.contextmanager
def lines_by(write: Callable[[str], object]) -> Iterator[None]:
    """Inside, lines are printed by `write`, which may clear a bar first."""
    global _write
    before, _write = _write, write
    try:
        yield
    finally:
        _write = before


def said() -> None:
    """Records that something else was printed just now (a progress bar moved)."""
    global _last
    _last = time.monotonic()


class Said(logging.Handler):
    """A log handler that calls `said` for every line."""

    def emit(self, record: logging.LogRecord) -> None:
        said()
