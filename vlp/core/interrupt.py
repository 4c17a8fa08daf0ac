"""Ctrl-C ends a command at once, with one line and exit code 130, even while XLA compiles; so does SIGTERM, with 75,
before a run has begun.

Python runs signal handlers in the main thread, between two bytecode instructions. So a handler does not run while XLA
compiles, and a KeyboardInterrupt that is raised inside a `__del__` is lost. `watch` starts a thread that the signal
wakes. If another handler is set later (in training, `vlp.runtime.watchdog.Stop`), the first Ctrl-C goes to that handler
and a second Ctrl-C ends the process.

Only the command line calls `watch`, before its slow imports. Importing the library changes no signal.

Long work that a request to stop should end (an evaluation) calls `poll` between its batches.
"""

import contextlib
import os
import shutil
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from types import FrameType

INTERRUPTED = 130  # exit code
PREEMPTED = 75  # exit code: start the run again
watched = False  # whether `watch` handles Ctrl-C in this process
_folders: list[str] = []  # temporary folders that `leave` removes
_on_sigterm: Callable[[], None] | None = None
_polls: list[Callable[[], None]] = []


class Stopped(BaseException):  # no evaluator's `except Exception` may catch it
    """Raised by `poll`: the run is to save and stop."""


def poll() -> None:
    """Raises `Stopped` if the run that this work is part of is to stop. On all processes at the same call.

    No-op outside of a run. Called between batches, equally often on all processes.
    """
    for function in _polls:
        function()


@contextlib.contextmanager
def polled(function: Callable[[], None]) -> Iterator[None]:
    """Inside, `poll` calls this function, which may raise `Stopped`."""
    _polls.append(function)
    try:
        yield
    finally:
        _polls.remove(function)


def at_sigterm(function: Callable[[], None] | None) -> None:
    """Makes SIGTERM call this function in a thread (under `watch`), even while the main thread compiles."""
    global _on_sigterm
    _on_sigterm = function


def watch(sigterm: bool = False) -> None:
    """Makes Ctrl-C end this process. No-op in worker processes, and if Ctrl-C is ignored (a job in the background).

    sigterm: SIGTERM ends it, too, with code 75 (`vlp train`, which an orchestrator starts again).
    """
    global watched
    processes = sys.modules.get("multiprocessing")
    if processes is not None and processes.parent_process() is not None:
        return
    ignored = signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    if watched or (ignored and not sigterm):
        return
    # silences multiprocessing's resource tracker, which warns about what killed workers leave
    quiet, given = "ignore:resource_tracker:UserWarning", os.environ.get("PYTHONWARNINGS", "")
    os.environ["PYTHONWARNINGS"] = f"{given},{quiet}" if given else quiet
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    if not ignored:
        signal.signal(signal.SIGINT, _woken)
    if sigterm:
        signal.signal(signal.SIGTERM, _woken)
    os.register_at_fork(after_in_child=_forked)
    threading.Thread(target=_wait, args=(reader,), daemon=True, name="interrupt").start()
    watched = True


def _woken(number: int, frame: FrameType | None) -> None:
    """Does nothing: Python needs a handler to write to the wake-up pipe, and the thread acts."""


def _forked() -> None:
    """Makes a forked child ignore Ctrl-C; its parent ends it."""
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _wait(reader: int) -> None:
    notified = None  # the handler that got the previous Ctrl-C
    while numbers := os.read(reader, 64):
        if signal.SIGTERM in numbers:
            if _on_sigterm is not None:
                _on_sigterm()
            elif signal.getsignal(signal.SIGTERM) is _woken:
                leave("stopped before the first step; the same command continues", PREEMPTED)
        for _ in range(numbers.count(signal.SIGINT)):
            handler = signal.getsignal(signal.SIGINT)
            if handler is _woken or handler is notified:
                leave()
            notified = handler


def end_workers() -> None:
    """Kills the processes that `multiprocessing` started."""
    if (processes := sys.modules.get("multiprocessing")) is not None:
        for child in processes.active_children():
            child.kill()


def leave(text: str = "interrupted", code: int = INTERRUPTED) -> None:
    """Kills the workers, removes the folders of `removing`, prints "vlp: " and the text, and ends this process."""
    end_workers()
    for folder in _folders:
        for _ in range(5):  # the main thread may still be writing there
            shutil.rmtree(folder, ignore_errors=True)
    flush = threading.Thread(
        target=_flush, daemon=True
    )  # another thread may hold the stream's lock
    flush.start()
    flush.join(1.0)
    line = (
        "\n" if sys.stderr is not None and sys.stderr.isatty() else ""
    )  # ends the line of a bar or of ^C
    with contextlib.suppress(OSError):
        os.write(2, f"{line}vlp: {text}\n".encode())
    os._exit(code)


def _flush() -> None:
    with contextlib.suppress(Exception):
        sys.stdout.flush()


@contextlib.contextmanager
def removing(folder: str) -> Iterator[None]:
    """Removes a temporary folder on exit, also after Ctrl-C."""
    _folders.append(folder)
    try:
        yield
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        _folders.remove(folder)


@contextlib.contextmanager
def workers_start() -> Iterator[None]:
    """Blocks Ctrl-C in processes started inside: a terminal sends it to all processes, but `leave` ends these."""
    if not watched:
        yield
        return
    from multiprocessing import resource_tracker

    resource_tracker.ensure_running()  # before the block, since its start unblocks the signal
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
