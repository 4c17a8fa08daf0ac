"""Ctrl-C ends a command at once: one line, exit code 130, whatever the main thread is doing.

Python runs signal handlers in the main thread, between two of its instructions: never while XLA compiles, and as an
exception that any `__del__` may swallow. So `watch` has a thread that the signal wakes. A handler that is set later
(training's, `vlp.runtime.watchdog.Stop`) takes the first Ctrl-C, as ever; a second one ends the process all the same.

Only the command line calls `watch`, before it imports anything that takes time; the library leaves signals alone.
"""

import contextlib
import os
import shutil
import signal
import sys
import threading
from collections.abc import Iterator
from types import FrameType

INTERRUPTED = 130  # exit code
watched = False  # whether Ctrl-C is this module's
_folders: list[str] = []


def watch() -> None:
    """From now on Ctrl-C ends this process. Does nothing in workers, or where whoever started it ignores Ctrl-C."""
    global watched
    processes = sys.modules.get("multiprocessing")
    if processes is not None and processes.parent_process() is not None:
        return
    if watched or signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        return
    # the process that clears up after killed workers would tell, in lines of its own, that it does
    quiet, given = "ignore:resource_tracker:UserWarning", os.environ.get("PYTHONWARNINGS", "")
    os.environ["PYTHONWARNINGS"] = f"{given},{quiet}" if given else quiet
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    signal.signal(signal.SIGINT, _woken)
    os.register_at_fork(after_in_child=_forked)
    threading.Thread(target=_wait, args=(reader,), daemon=True, name="interrupt").start()
    watched = True


def _woken(number: int, frame: FrameType | None) -> None:
    """Nothing: the thread acts."""


def _forked() -> None:
    """A child wakes nobody, and ends with its parent."""
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _wait(reader: int) -> None:
    asked = None  # the handler that took a Ctrl-C before
    while numbers := os.read(reader, 64):
        for _ in range(numbers.count(signal.SIGINT)):
            handler = signal.getsignal(signal.SIGINT)
            if handler is _woken or handler is asked:
                leave()
            asked = handler


def leave() -> None:
    """Kills the workers, removes what `removing` names, says so in a line, and ends this process."""
    if (processes := sys.modules.get("multiprocessing")) is not None:
        for child in processes.active_children():
            child.kill()
    for folder in _folders:
        for _ in range(5):  # the main thread may still be writing there
            shutil.rmtree(folder, ignore_errors=True)
    flush = threading.Thread(target=_flush, daemon=True)  # another thread may hold the stream
    flush.start()
    flush.join(1.0)
    line = "\n" if sys.stderr is not None and sys.stderr.isatty() else ""  # a bar, or ^C
    with contextlib.suppress(OSError):
        os.write(2, f"{line}vlp: interrupted\n".encode())
    os._exit(INTERRUPTED)


def _flush() -> None:
    with contextlib.suppress(Exception):
        sys.stdout.flush()


@contextlib.contextmanager
def removing(folder: str) -> Iterator[None]:
    """Removes a temporary folder at the end, Ctrl-C included."""
    _folders.append(folder)
    try:
        yield
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        _folders.remove(folder)


@contextlib.contextmanager
def workers_start() -> Iterator[None]:
    """Processes that start in here do not get Ctrl-C, which a terminal sends to all of them: `leave` ends them."""
    if not watched:
        yield
        return
    from multiprocessing import resource_tracker

    resource_tracker.ensure_running()  # whose start would unblock the signal
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
