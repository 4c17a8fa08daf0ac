"""The first log row of a run, and the name of its device."""

import json
import logging

from helpers import runs
from vlp.core import chips


def test_no_time_left_is_told_before_a_step_was_measured_without_compiling(toy, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    assert runs.train(runs.changed(runs.TOY, steps=3, log_every_steps=1), tmp_path / "run") == 0
    first, *later = (m for m in caplog.messages if "data wait" in m and "loss" in m)
    assert "compiled" in first and "left" not in first
    assert len(later) == 2 and all("examples/s" in m and "s left" in m for m in later)


def test_a_cpu_is_named_by_its_processor(toy, tmp_path, monkeypatch):
    assert runs.train(runs.changed(runs.TOY, steps=1), tmp_path / "run") == 0
    (found,) = (json.loads(p.read_text()) for p in (tmp_path / "run").glob("versions*.json"))
    found = found if "device" in found else found[-1]
    assert found["device"] == f"CPU ({chips.processor()[0]})" and chips.processor()[0]
