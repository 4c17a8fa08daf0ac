"""Test modules of tests/data are imported by name here."""

import pathlib
import sys

sys.path.append(str(pathlib.Path(__file__).parents[1] / "data"))
