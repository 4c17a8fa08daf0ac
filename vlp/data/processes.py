"""Worker processes that do not import the starting script and end with it."""

import contextlib
import multiprocessing
import os
import signal
import sys
import threading
import types
from collections.abc import Iterator

from vlp.core import interrupt, pipes


@contextlib.contextmanager
def without_main() -> Iterator[None]:
    """Processes that start in here do not run the user's script again, as spawned ones would.

    So a script needs no `if __name__ == "__main__":` guard, and one on standard input works. Under the command line
    they do not get Ctrl-C either.
    """
    main = sys.modules["__main__"]
    sys.modules["__main__"] = types.ModuleType("__main__")
    try:
        with interrupt.workers_start():
            yield
    finally:
        sys.modules["__main__"] = main


def serve_run(*_: object) -> None:
    """In a worker of a run: ends with its parent, and only so. Slurm sends SIGTERM to all processes of a job, and a
    run needs its batches until it has saved."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    end_with_parent()


def end_with_parent(*_: object) -> None:
    """In a worker: ends this process when its parent has ended for any reason.

    A closed pipe at its output does not end it.
    """
    parent = multiprocessing.parent_process()
    if parent is None:
        return
    pipes.guard(ends=False)

    def wait() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()
