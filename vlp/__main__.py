"""`python -m vlp` is `vlp`."""

import sys

from vlp.core import interrupt

interrupt.watch()  # before the imports, which take seconds

from vlp.cli.main import main  # noqa: E402

if __name__ == "__main__":
    sys.exit(main())
