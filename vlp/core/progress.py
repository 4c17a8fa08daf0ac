"""Long work is never silent: a line soon after a phase begins, and more until it ends.

    with progress.phase("compiling the step"):
        ...

Only where the program talks at all (the command line; not a library's user, nor processes that leave it to others):
on standard error, or beside the log where that is the command's output (`in_log`).
"""

import contextlib
import logging
import sys
import threading
import time
from collections.abc import Callable, Iterator

FIRST_SECS = 4.0  # what takes less is not worth a line
EVERY_SECS = 15.0
_phases: list[object] = []  # from the outermost on; the innermost speaks
in_log = False
_write: Callable[[str], object] | None = None  # instead of print, where a bar is on the screen
_last = 0.0  # when something was said last, by anyone (time.monotonic)


@contextlib.contextmanager
def phase(
    text: str | Callable[[], str], since: Callable[[], float] | None = None
) -> Iterator[None]:
    """Inside, "text … 19 s" is printed if nothing else is for a while.

    Args:
        text: Or a function that says it, where it changes on the way.
        since: When that which the text names began (time.monotonic); by default, the phase.
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
    """Inside, lines are written so: by what clears a bar first, say."""
    global _write
    before, _write = _write, write
    try:
        yield
    finally:
        _write = before


def said() -> None:
    """Something else was shown just now (a bar that moved)."""
    global _last
    _last = time.monotonic()


class Said(logging.Handler):
    """A handler by which every line of the log counts as something said."""

    def emit(self, record: logging.LogRecord) -> None:
        said()
