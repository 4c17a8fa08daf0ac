"""docs/architecture.md: every file:function that it names exists, and its table of rooms is that of the floors."""

import ast
import re

import pytest
from test_floors import FLOORS

from helpers import runs

PAGE = (runs.ROOT / "docs" / "architecture.md").read_text()
PLACES = sorted(set(re.findall(r"`(vlp/[\w/]+\.py):([\w.]+)`", PAGE)))


def defined(file):
    """Functions and classes of a file, methods as Class.method."""
    for node in ast.parse((runs.ROOT / file).read_text()).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node.name
        if isinstance(node, ast.ClassDef):
            yield from (
                f"{node.name}.{m.name}" for m in node.body if isinstance(m, ast.FunctionDef)
            )


def test_it_names_places():
    assert len(PLACES) > 15


@pytest.mark.parametrize("file, name", PLACES)
def test_a_place_exists(file, name):
    assert name in set(defined(file))


def test_rooms_are_those_of_the_floors():
    rows = dict(re.findall(r"^\| (\w+) \| (\d) \|", PAGE, re.M))
    assert {room: int(floor) for room, floor in rows.items()} == FLOORS
