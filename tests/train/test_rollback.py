"""At a spike of the loss the run goes back to a checkpoint and leaves out the data since; a restart repeats it."""

import json

import numpy as np
import pytest

from helpers import runs
from vlp.core import mesh as meshes
from vlp.data import order
from vlp.data.dataset import Dataset
from vlp.train import loop
from vlp.train.rollback import Rollback, extended, stretches

# The samples at positions 56 … 63, those of step 8, have a loss 100 times as large. Step 6 has a checkpoint.
SPIKE = {"factor": 5.0, "window_steps": 3, "margin_steps": 1}
CONFIG = runs.changed(
    runs.TOY, steps=10, save_every_steps=3, keep_checkpoints=9, spike=SPIKE,
    teachers={"ema": {"decay": 0.9}}, objective={"name": "toy", "fault": "spike", "bad": [56, 64]},
)  # fmt: skip


@pytest.fixture
def seen(monkeypatch):
    """The stream positions of the batches that are read."""
    found = []
    to_global = meshes.to_global
    watch = lambda batch, mesh: found.append(batch["index"]) or to_global(batch, mesh)
    monkeypatch.setattr(meshes, "to_global", watch)
    return lambda: [order.join_words(index)[0] // 8 for index in found]


@pytest.fixture
def whole(toy, tmp_path):
    """A run that never had the batches 7 and 8 (from 1): its seventh step reads the ninth."""
    read = Dataset.train_iter

    def without(self, *, start, num_batches, batch, **more):
        yield from read(self, start=start, num_batches=6, batch=batch, **more)
        yield from read(self, start=8 * batch, num_batches=num_batches - 6, batch=batch, **more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Dataset, "train_iter", without)
        assert runs.train(CONFIG, tmp_path / "whole") == 0
    assert not (tmp_path / "whole" / "rollbacks.json").exists()
    return tmp_path / "whole"


def without_rollbacks(directory):
    return [row for row in runs.rows(directory) if row["kind"] != "rollback"]


def assert_same(run, whole):
    assert without_rollbacks(run) == runs.rows(whole)
    np.testing.assert_equal(runs.saved(run), runs.saved(whole))


def test_a_run_goes_back_and_leaves_the_data_out(whole, seen, tmp_path, caplog):
    run = tmp_path / "run"
    assert runs.train(CONFIG, run) == 0
    assert_same(run, whole)
    positions = seen()
    assert positions[:8] == [*range(8)] and positions[-4:] == [8, 9, 10, 11]
    (row,) = (row for row in runs.rows(run) if row["kind"] == "rollback")
    expected = {"number": 1, "step": 6, "found": 8, "left_out": 2, "why": "spike", "samples": 48}
    assert row | expected == row
    (told,) = json.loads((run / "rollbacks.json").read_text())
    assert told == {k: v for k, v in row.items() if k not in ("kind", "samples")}
    assert "back to step 6, without the 2 batches read since" in caplog.text
    assert runs.train(CONFIG, run) == 0  # nothing is left to do
    assert_same(run, whole)


@pytest.mark.parametrize("death", range(1, 6))
def test_a_restart_repeats_the_decision(whole, tmp_path, monkeypatch, death):
    """It dies in a save: before any, after the decision, and after later checkpoints; also if rollbacks.json is lost,
    and if the run falls back to a checkpoint from before the decision. Another number of devices goes on."""
    run, calls = tmp_path / "run", iter(range(1, 100))
    save = loop.save

    def die(session, plan, state, stage_step, interval):
        if next(calls) == death:  # saves are of steps 3, 6, 9, 10
            raise runs.Killed
        save(session, plan, state, stage_step, interval)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "save", die)
        if death < 5:
            with pytest.raises(runs.Killed):
                runs.train(CONFIG, run)
        else:
            assert runs.train(CONFIG, run) == 0
    if death == 4:  # the last checkpoint is of step 9, after the decision
        (run / "rollbacks.json").unlink()
    if death == 5:  # back before the decision
        for step in (6, 9, 10):
            (run / "checkpoints" / f"step_{step:09d}" / "digests.json").write_text("{")
    again = CONFIG if death < 5 else runs.changed(CONFIG, spike={"factor": 0.0})
    assert runs.train(again, run) == 0
    assert_same(run, whole)
    assert [row["step"] for row in runs.rows(run) if row["kind"] == "rollback"] == [6]


def test_a_decision_holds_on_another_mesh(whole, tmp_path, monkeypatch):
    run, calls = tmp_path / "run", iter(range(1, 100))
    save = loop.save

    def die(*args):
        if next(calls) == 3:
            raise runs.Killed
        save(*args)

    with monkeypatch.context() as patch, pytest.raises(runs.Killed):
        patch.setattr(loop, "save", die)
        runs.train(CONFIG, run)
    assert runs.train(runs.changed(CONFIG, mesh={"data": 4, "fsdp": 2}), run, devices=8) == 0
    for row, other in zip(without_rollbacks(run), runs.rows(whole), strict=True):
        assert row["loss"] == pytest.approx(other["loss"], rel=1e-5), row["step"]


def test_later_stages_and_streams_go_on_after_the_data_left_out(toy, tmp_path, seen):
    config = runs.changed(CONFIG, steps=0)
    config["stages"] = [{"name": "a", "steps": 9}, {"name": "b", "steps": 2}]
    assert runs.train(config, tmp_path / "run") == 0
    assert seen()[-5:] == [8, 9, 10, 11, 12]


def test_without_an_old_enough_checkpoint_it_goes_on(toy, tmp_path, caplog):
    config = runs.changed(CONFIG, save_every_steps=100)
    assert runs.train(config, tmp_path / "run") == 0
    assert "no checkpoint of this stage is 1 steps older; going on" in caplog.text


def test_too_many_rollbacks_end_the_run(toy, tmp_path, capsys):
    """Every sample from position 56 on is bad; the second spike is 3 steps after the first."""
    bad = {"name": "toy", "fault": "spike", "bad": [56, 9999]}
    config = runs.changed(CONFIG, objective=bad, **{"spike.max_rollbacks": 1})
    assert runs.train(config, tmp_path / "run") == 1
    message = capsys.readouterr().err
    assert message.startswith("vlp: step 7: got a loss of ") and "after 1 rollbacks" in message


def test_losses_that_stay_infinite_go_back_too(toy, tmp_path):
    bad = {"name": "toy", "fault": "loss", "bad": [56, 72]}
    config = runs.changed(CONFIG, objective=bad, max_nonfinite_steps=2)
    assert runs.train(config, tmp_path / "run") == 0
    (row,) = (row for row in runs.rows(tmp_path / "run") if row["kind"] == "rollback")
    assert (row["why"], row["step"], row["found"], row["left_out"]) == ("nonfinite", 6, 9, 3)


def test_a_later_decision_takes_in_those_that_it_goes_back_over():
    def made(number, step, left):
        return Rollback(number, step, 0, step, left, step + 2, "spike", 9.0, 1.0)

    first, second = made(1, 6, 2), made(2, 9, 2)
    assert extended((first,), second) == (first, second)
    assert extended((first, second), made(3, 6, 8)) == (made(3, 6, 8),)
    assert stretches((first, second), 0, 12) == [(0, 6), (6, 3), (9, 3)]
    assert stretches((first, second), 6, 12) == [(6, 3), (9, 3)]
