"""`python -m vlp` is `vlp`."""

import sys

from vlp.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
