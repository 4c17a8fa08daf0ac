"""What `vlp train` prints about its model: the plan, then a table of all parameters."""

import jax
import pytest

from helpers import runs
from vlp.train import session


@pytest.mark.parametrize("width", [80, 100, 120])
def test_the_columns_of_the_table_fit_their_numbers(width):
    shape = lambda *dims: jax.ShapeDtypeStruct(dims, "float32")
    long = {
        "encoder": {"a_block_with_a_very_long_name_" * 3: {"kernel": shape(24, 1024, 3, 16, 64)}}
    }
    text = session.parameters({"text": long, "scale": shape(), "w": shape(49408, 1024)}, width)
    lines = text.splitlines()
    assert len(lines) == 4 and max(map(len, lines)) <= width
    assert lines[0].split() == ["parameter", "shape", "type", "size", "mesh", "axes"]
    assert "/kernel  24 × 1024 × 3 × 16 × 64  float32  75,497,472" in text
    assert "a number" in text and "50,593,792" in text


def test_the_table_comes_after_the_plan(toy, tmp_path, caplog):
    caplog.set_level("INFO")
    assert runs.train(runs.changed(runs.TOY, steps=1), tmp_path / "run") == 0
    told = [r.getMessage() for r in caplog.records]
    plan = next(i for i, m in enumerate(told) if m.startswith("stage stage0: 8 samples"))
    table = next(i for i, m in enumerate(told) if m.startswith("parameter "))
    assert plan < table
