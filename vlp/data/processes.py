"""Worker processes that need nothing of the script that starts them and do not outlive it."""

import contextlib
import multiprocessing
import os
import sys
import threading
import types
from collections.abc import Iterator

from vlp.core import interrupt


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


def end_with_parent(*_: object) -> None:
    """In a worker: ends this process when the one that started it has died, by whatever death."""
    parent = multiprocessing.parent_process()
    if parent is None:
        return

    def wait() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()
