"""benchmarks/flops.py: its count against the compiled program and by hand, and FLIP's ratios."""

import importlib.util

import pytest

from helpers import runs
from vlp.core import config as configs
from vlp.train import stages

spec = importlib.util.spec_from_file_location("flops", runs.ROOT / "benchmarks" / "flops.py")
flops = importlib.util.module_from_spec(spec)
spec.loader.exec_module(flops)

TOWER = dict(width=256, depth=2, heads=4, mlp=1024, dtype="float32")
SMALL = dict(
    model=dict(image_tower=TOWER, text_tower=TOWER | dict(vocab=512), embed=64),
    data=dict(image_px=64, text_len=16),
)


def small(keep_ratio):
    config = configs.overlay(flops.load(f"flip:keep_ratio={keep_ratio},tune=False"), SMALL)
    return stages.parse(config)[1][0]


def test_lowered_equals_compiled():
    """XLA's optimisation changes the count of elementwise work a little, and that of products not at all."""
    program = flops.lower(small(0.5), 8)
    compiled = program.compile().cost_analysis()["flops"]
    assert program.cost_analysis()["flops"] == pytest.approx(compiled, rel=0.03)


def test_counted_flops_equal_a_count_by_hand():
    """Forward and backward of every product: 3 · 2 · (weights used per token + keys · width, twice) · tokens."""
    width, batch = 256, 64
    products = lambda tokens: 2 * tokens * (12 * width**2 + 2 * tokens * width)  # 2 layers
    image = products(8 + 1) + 8 * (16 * 16 * 3) * width + width * 64  # half of 16 patches, and CLS
    text = products(16) + width * 64
    want = 6 * (image + text) - 2 * 8 * (16 * 16 * 3) * width  # pixels need no gradient
    assert flops.of_stage(small(0.5), batch) == pytest.approx(want, rel=0.05)


def test_masking_saves_the_flops_that_flip_reports():
    """Table 1: 0.52 and 0.28 of the unmasked step."""
    for row in flops.flip():
        assert row["ratio"] == pytest.approx(row["paper"], abs=0.03), row["what"]
