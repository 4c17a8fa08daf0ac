"""A step whose loss or gradient is not finite changes nothing but the counts; several in a row end the run."""

import json
import re

import numpy as np
import pytest

from helpers import runs
from vlp.core import mesh as meshes
from vlp.core.config import build
from vlp.data import order
from vlp.data.config import Data
from vlp.data.dataset import open_dataset
from vlp.train.guard import Guard, Spike

CONFIG = runs.changed(
    runs.TOY, steps=5, save_every_steps=1, keep_checkpoints=9, teachers={"ema": {"decay": 0.9}}
)
IDS = order.record_ids(0, 5 * 8, runs.DATA["num_records"], seed=0)


def faulty(fault, bad, **changes):
    objective = {"name": "toy", "fault": fault, "bad": bad}
    return runs.changed(CONFIG, objective=objective, **changes)


def shape(*sizes):
    return dict(zip(meshes.AXES[-3:], sizes))


@pytest.mark.parametrize(
    "fault, mesh",
    [("gradient", (8, 1, 1)), ("gradient", (1, 8, 1)), ("loss", (2, 2, 2)), ("state", (8, 1, 1))],
)
def test_one_bad_sample_of_eight_devices_changes_nothing_but_the_counts(
    toy, tmp_path, caplog, fault, mesh
):
    """Sample 3 of step 3, which is one device's of eight."""
    run = tmp_path / "run"
    config = faulty(fault, [2 * 8 + 3, 2 * 8 + 4], mesh=shape(*mesh))
    assert runs.train(config, run, devices=8) == 0
    before, after, last = (runs.saved(run, step) for step in (2, 3, 5))
    counts = {"rest/step", "rest/stage_step"}
    assert {k for k in after if k and not np.array_equal(after[k], before[k])} == counts
    assert after["rest/step"] == after["rest/stage_step"] == 3
    assert last["rest/method_state/seen"] == 4 * 8
    assert all(np.isfinite(v).all() for v in last.values())
    told = json.loads((run / "nonfinite_step3.json").read_text())
    assert told["records"] == IDS[16:24].tolist() and len(told["keys"]) == 8
    assert "[3] update skipped (1 in a row): loss " in caplog.text
    rows = runs.rows(run)
    assert [(r["kind"], r["step"]) for r in rows] == [
        ("train", 1), ("train", 2), ("nonfinite", 3), ("train", 3), ("train", 4), ("train", 5)
    ]  # fmt: skip
    bad = {"loss": ("nan", "nan"), "gradient": (rows[2]["loss"], "nan")}.get(fault)
    assert bad in (None, (rows[2]["loss"], rows[2]["grad_norm"]))
    assert rows[3]["loss"] == "nan" and rows[3]["param_norm"] == rows[1]["param_norm"]


def test_a_skipped_step_is_not_averaged(toy, tmp_path):
    every = faulty("gradient", [16, 17])
    assert runs.train(every, tmp_path / "every") == 0
    assert runs.train(every | {"log_every_steps": 5}, tmp_path / "run") == 0
    losses = [r["loss"] for r in runs.rows(tmp_path / "every") if r["kind"] == "train"]
    assert losses[2] == "nan"
    mean = np.mean([losses[1], *losses[3:]])
    assert runs.rows(tmp_path / "run")[-1]["loss"] == pytest.approx(mean, rel=1e-6)


def test_several_in_a_row_end_the_run_also_if_it_is_started_again(toy, tmp_path, capsys):
    """Steps 3, 4, 5; the message names the step, its records and their keys, and the state is that of step 2."""
    run, config = tmp_path / "run", faulty("loss", [16, 64], steps=9)
    told = []
    for _ in range(2):
        assert runs.train(config, run) == 1
        told.append(capsys.readouterr().err)
        assert int(runs.saved(run)[""]) == 4
    assert told[0] == told[1] and told[0].count("\n") == 1
    assert told[0].startswith("vlp: step 5: got loss nan, grad_norm nan, param_norm ")
    assert " (steps in a row whose updates were skipped: 3), expected finite" in told[0]
    before, after = runs.saved(run, 2), runs.saved(run, 4)
    for name in (n for n in after if n.startswith(("params", "rest/opt", "rest/teachers"))):
        np.testing.assert_array_equal(after[name], before[name])
    keys = json.loads((run / "nonfinite_step5.json").read_text())["keys"]
    assert all(key in told[0] for key in keys[:4])
    config = runs.changed(config, steps=9, max_nonfinite_steps=7)  # it may change
    assert runs.train(config, run) == 0


def test_a_limit_of_one_ends_with_code_1(tmp_path):
    """As a process."""
    run = tmp_path / "run"
    config = faulty("loss", [16, 17], max_nonfinite_steps=1)
    process = runs.command(*runs.arguments(config, run))
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 1, errors
    (message,) = (line for line in errors.splitlines() if line.startswith("vlp: "))
    assert "Traceback" not in errors and message.startswith("vlp: step 3: got loss nan, ")
    assert (runs.rows(run)[-1]["step"], runs.rows(run)[-1]["loss"]) == (3, "nan")
    assert int(runs.saved(run)[""]) == 2


def test_parameters_that_overflow_stop_the_run_before_it_saves(toy, tmp_path, capsys):
    """Loss and gradient are finite, and the update overflows."""
    config = runs.changed(runs.TOY, save_every_steps=1, schedule={"lr": 1e38, "warmup_steps": 3})
    assert runs.train(config, tmp_path / "run") == 1
    found = "vlp: step 1: got loss [0-9.]+, grad_norm [0-9.]+, param_norm inf"
    assert re.match(found, capsys.readouterr().err)
    assert not list((tmp_path / "run" / "checkpoints").glob("step_*"))


def test_without_shuffling_records_are_named_in_stored_order(toy, tmp_path):
    """Without shuffling the records are named in their stored order."""
    config = faulty("loss", [8, 9], **{"data.shuffle": False})
    assert runs.train(config, tmp_path / "run") == 0
    told = json.loads((tmp_path / "run" / "nonfinite_step2.json").read_text())
    assert told["records"] == list(range(8, 16))
    data = open_dataset(build(Data, config["data"], "data"))
    assert told["keys"] == data.keys(range(8, 16))


def test_spikes_are_told_from_the_window_alone():
    guard = Guard(Spike(factor=2.0, window_steps=3))
    seen = [guard.see(loss, True) for loss in (9.0, 1.0, 1.0, 2.1, 1.0, 1.0, 2.1, 2.1)]
    assert seen == [False, False, False, True, False, False, True, True]
    again = Guard(guard.spike, json.loads(json.dumps(guard.plain())))
    assert again.plain() == guard.plain() and again.median == 1.0
    assert not Guard(Spike()).see(1e30, True)
