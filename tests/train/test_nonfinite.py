"""A loss, gradient or parameter that is not finite ends the run, is located, and keeps the last good checkpoint."""

import json

import numpy as np
import pytest

from helpers import runs
from vlp.core.config import build
from vlp.data import order
from vlp.data.config import Data
from vlp.data.dataset import open_dataset


def test_a_loss_that_is_not_finite_ends_with_code_1_and_names_its_records(tmp_path):
    """The message names the step, its records and their keys."""
    run = tmp_path / "run"
    config = runs.changed(runs.TOY, save_every_steps=1, objective={"name": "toy", "nan_step": 2})
    process = runs.command(*runs.arguments(config, run))
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 1, errors
    message = errors.strip().splitlines()[-1]
    assert message.startswith("FloatingPointError: step 3: got loss nan, ")
    told = json.loads((run / "nonfinite_step3.json").read_text())
    ids = order.record_ids(2 * 8, 8, runs.DATA["num_records"], seed=0)
    assert told["records"] == ids.tolist() and len(told["keys"]) == 8
    assert told["metrics"]["loss"] == "nan"
    for key in told["keys"][:4]:
        assert key in message
    last = runs.rows(run)[-1]
    assert (last["step"], last["loss"]) == (3, "nan")
    assert int(runs.saved(run)[""]) == 2
    assert all(np.isfinite(value).all() for value in runs.saved(run).values())


def test_parameters_that_overflow_stop_the_run_before_it_saves(toy, tmp_path):
    """Loss and gradient are finite, and the update overflows."""
    config = runs.changed(runs.TOY, save_every_steps=1, schedule={"lr": 1e38, "warmup_steps": 3})
    with pytest.raises(
        FloatingPointError, match="step 1: got loss [0-9.]+, grad_norm [0-9.]+, param_norm inf"
    ):
        runs.train(config, tmp_path / "run")
    assert not list((tmp_path / "run" / "checkpoints").glob("step_*"))


def test_without_shuffling_records_are_named_in_stored_order(toy, tmp_path):
    """Without shuffling the records are named in their stored order."""
    config = runs.changed(
        runs.TOY, objective={"name": "toy", "nan_step": 1}, **{"data.shuffle": False}
    )
    with pytest.raises(FloatingPointError, match="step 2"):
        runs.train(config, tmp_path / "run")
    told = json.loads((tmp_path / "run" / "nonfinite_step2.json").read_text())
    assert told["records"] == list(range(8, 16))
    data = open_dataset(build(Data, config["data"], "data"))
    assert told["keys"] == data.keys(range(8, 16))
