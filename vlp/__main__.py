"""`python -m vlp` is `vlp`."""

import sys
from typing import Any

from vlp.core import interrupt

interrupt.watch(sigterm="train" in sys.argv[1:2])  # before the imports, which take seconds

from vlp.cli import main as cli  # noqa: E402
from vlp.core import pipes  # noqa: E402


def main() -> int:
    """Runs the command line as a program; returns its exit code.

    A run of `train` goes on when the reader of its output leaves; every other command ends.
    """
    sys.unraisablehook = _unraisable
    pipes.guard(ends="train" not in sys.argv[1:2])
    try:
        return cli.main()
    finally:
        sys.stdout.flush()


def _unraisable(found: Any) -> None:
    """Prints an error that no code can catch.

    TensorStore's threads call back into asyncio's loop of a save, which is closed if the save has failed: not printed.
    """
    if not (found.exc_type is RuntimeError and str(found.exc_value) == "Event loop is closed"):
        sys.__unraisablehook__(found)


if __name__ == "__main__":
    sys.exit(main())
