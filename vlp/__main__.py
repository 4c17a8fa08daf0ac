"""`python -m vlp` is `vlp`."""

import sys

from vlp.core import interrupt

interrupt.watch()  # before the imports, which take seconds

from vlp.cli import main as cli  # noqa: E402
from vlp.core import pipes  # noqa: E402


def main() -> int:
    """Runs the command line as a program; returns its exit code.

    A run of `train` goes on when the reader of its output leaves; every other command ends.
    """
    pipes.guard(ends="train" not in sys.argv[1:2])
    try:
        return cli.main()
    finally:
        sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
