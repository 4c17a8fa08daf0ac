"""benchmarks/methods.py at tiny size: every method's config, rows of one and of several seeds, and resuming."""

import importlib.util
import json
import sys

import pytest

from helpers import runs
from vlp.core import config as configs
from vlp.train import stages

spec = importlib.util.spec_from_file_location("methods", runs.ROOT / "benchmarks" / "methods.py")
methods = sys.modules["methods"] = importlib.util.module_from_spec(spec)  # for its dataclass
spec.loader.exec_module(methods)


@pytest.mark.parametrize("name", methods.METHODS)
def test_every_method_sees_as_many_samples(name):
    _, built = stages.parse(methods.build(methods.METHODS[name], "data/emoji", 1, 600))
    assert built[-1].end_samples == 600 * 128
    assert {s.model.image_tower.width for s in built} == {128}


def test_the_demos_row_is_its_config():
    """The row is configs/coca_emoji.py with other evaluations."""
    demo = configs.load(f"{runs.ROOT}/configs/coca_emoji.py:path=data/emoji")
    _, theirs = stages.parse(demo)
    _, ours = stages.parse(methods.build(methods.METHODS[methods.DEMO], "data/emoji", 0, 600))
    for one, other in zip(ours, theirs, strict=True):
        for part in ("objective", "model", "data", "optim", "schedule", "num_steps"):
            assert getattr(one, part) == getattr(other, part), part


def test_rows(tmp_path, monkeypatch, capsys):
    out = tmp_path / "rows.json"
    argv = ["--smoke", "--steps", "15", "--only", "SigLIP", "--seeds", "2"]
    argv += ["--workdir", str(tmp_path / "runs"), "--json", str(out)]
    monkeypatch.setattr(methods, "start_jax", lambda: None)  # the tests have theirs
    assert methods.main(argv) == 0
    (row,) = json.loads(out.read_text())
    assert row["seeds"] == 2 and row["samples"] == 15 * 8 and row["flops"] > 0
    assert 0 <= row["t2i/R@10"] <= 1 and 0 <= row["skin_tone/accuracy"] <= 1
    assert row["i2t/R@1 spread"] >= 0 and row["minutes"] > 0
    assert methods.main(argv) == 0  # what is finished is not trained again
    assert json.loads(out.read_text()) == [row]
    assert methods.main(["--only", "Clip"]) == 2
    assert "--only: got 'Clip'" in capsys.readouterr().err
