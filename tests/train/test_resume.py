"""A run that dies anywhere and is started again ends as an uninterrupted one, to the bit."""

from unittest import mock

import numpy as np
import pytest

from helpers import runs
from vlp.core import mesh as meshes
from vlp.data import order
from vlp.train import evaluation, loop


def before(number):
    """Dies instead of the function's call `number` (from 1)."""

    def wrap(function, calls):
        if next(calls) == number:
            raise runs.Killed
        return function()

    return wrap


def after(number):
    """Dies right after the function's call `number`."""

    def wrap(function, calls):
        out = function()
        if next(calls) == number:
            raise runs.Killed
        return out

    return wrap


def kill(config, directory, owner, name, when, devices=1):
    function, calls = getattr(owner, name), iter(range(1, 1000))
    patch = lambda *args, **kwargs: when(lambda: function(*args, **kwargs), calls)
    with mock.patch.object(owner, name, patch), pytest.raises(runs.Killed):
        runs.train(config, directory, devices)


# Each start goes on from where the death before left it. A save is due at steps 2, 4, 5, 6, 8 and 9, an evaluation at
# 3, 5, 6 and 9; stage 2 begins after step 5. Last: the kind and step of the last row that is on record then.
DEATHS = [
    ("before anything is saved", loop, "save", before(1), ("train", 2)),
    ("right after the first save", loop, "save", after(1), ("train", 2)),
    ("in the evaluation after step 3", meshes, "to_host", before(2), ("train", 3)),
    ("while step 4 is saved", loop, "save", after(1), ("train", 4)),
    ("before the save at the boundary", loop, "save", before(2), ("eval", 5)),
    ("after the save at the boundary", loop, "save", after(1), ("eval", 5)),
    ("before entering stage 2", loop, "start_stage", before(2), ("eval", 5)),
    ("after entering stage 2", loop, "start_stage", after(2), ("eval", 5)),
    ("after the first step of stage 2", evaluation, "evaluate", before(1), ("train", 6)),
    ("before the last save", loop, "save", before(3), ("eval", 9)),
]


def test_a_run_killed_anywhere_resumes_to_the_same_numbers(coca_run, tmp_path):
    for what, owner, name, when, last in DEATHS:
        kill(runs.COCA, tmp_path / "run", owner, name, when)
        reached = runs.rows(tmp_path / "run")
        assert (reached[-1]["kind"], reached[-1]["step"]) == last, what
        assert reached == runs.rows(coca_run)[: len(reached)], what
        if what == "while step 4 is saved":
            lose_last_save(tmp_path / "run")
    assert runs.train(runs.COCA, tmp_path / "run") == 0
    runs.assert_same_run(tmp_path / "run", coca_run)


def lose_last_save(directory):
    """Leaves what a process that dies in a save leaves: a temporary folder, and half a line of metrics."""
    newest = sorted((directory / "checkpoints").glob("step_*"))[-1]
    (newest / "rest" / "_METADATA").unlink()
    newest.rename(newest.with_name(newest.name + ".orbax-checkpoint-tmp"))
    with (directory / "metrics.jsonl").open("a") as f:
        f.write('{"kind": "train", "ste')


def test_a_finished_run_is_left_as_it_is(coca_run):
    files = runs.contents(coca_run / "checkpoints")
    with mock.patch.object(
        meshes, "to_global", side_effect=AssertionError("nothing is left to do")
    ):
        assert runs.train(runs.COCA, coca_run) == 0
    assert runs.contents(coca_run / "checkpoints") == files


AVERAGED = {
    "loss", "contrastive", "contrastive/minus_log_batch", "contrastive/retrieval@1", "grad_norm",
    "logit_scale", "update_norm",
}  # fmt: skip


def test_a_checkpoint_keeps_the_steps_of_the_next_row(clip_run, tmp_path):
    """A checkpoint between two rows keeps the steps that the next row averages over."""
    config = runs.changed(runs.CLIP, log_every_steps=4, save_every_steps=3)
    assert runs.train(config, tmp_path / "whole") == 0
    kill(config, tmp_path / "run", loop, "save", after(1))
    assert [row["step"] for row in runs.rows(tmp_path / "run")] == [
        1
    ]  # the first step always has one
    assert runs.train(config, tmp_path / "run") == 0
    runs.assert_same_run(tmp_path / "run", tmp_path / "whole")
    (first, row), steps = runs.rows(tmp_path / "run"), runs.rows(clip_run)
    assert first == steps[0]
    for key in AVERAGED:
        assert row[key] == pytest.approx(np.mean([r[key] for r in steps[1:]]), rel=1e-5), key
    assert {k: v for k, v in row.items() if k not in AVERAGED} == {
        k: v for k, v in steps[-1].items() if k not in AVERAGED
    }


def test_settings_called_free_may_change_at_a_restart(clip_run, tmp_path):
    """The numbers do not change."""
    kill(runs.CLIP, tmp_path / "run", loop, "save", after(1))
    free = {
        "data.workers": 1, "data.read_threads": 0, "data.prefetch": 2, "data.cache_decoded": True,
        "log_every_steps": 2, "save_every_steps": 1, "keep_checkpoints": 1, "platform": "cpu",
        "hang_secs": 600.0, "mesh": {"data": 1, "fsdp": 1, "tensor": 1},
    }  # fmt: skip
    assert runs.train(runs.changed(runs.CLIP, **free), tmp_path / "run") == 0
    first, second, third, last = runs.rows(clip_run)
    assert runs.rows(tmp_path / "run")[:2] == [first, second]
    (both,) = runs.rows(tmp_path / "run")[2:]  # a row a step, then a row for two steps
    assert both == {k: v if isinstance(v, str) else pytest.approx(
        (third[k] + v) / 2 if k in AVERAGED else v, rel=1e-6) for k, v in last.items()
    }  # fmt: skip
    np.testing.assert_equal(runs.saved(tmp_path / "run"), runs.saved(clip_run))


@pytest.mark.parametrize("first, second", [((8, 1, 1), (2, 2, 2))])
def test_a_restart_on_another_mesh_sees_the_same_samples(
    clip_run, tmp_path, monkeypatch, first, second
):
    """The same samples, and losses that differ by rounding alone."""
    seen = []
    to_global = meshes.to_global
    watch = lambda batch, mesh: seen.append(batch["record"]) or to_global(batch, mesh)
    monkeypatch.setattr(meshes, "to_global", watch)
    shape = lambda sizes: dict(zip(meshes.AXES, sizes))
    config = runs.changed(runs.CLIP, mesh=shape(first))
    kill(config, tmp_path / "run", loop, "save", after(1), devices=8)
    config = runs.changed(runs.CLIP, mesh=shape(second))
    assert runs.train(config, tmp_path / "run", devices=8) == 0
    ids = order.record_ids(0, 4 * 8, runs.DATA["num_records"], seed=0)
    np.testing.assert_array_equal(order.join_words(np.concatenate(seen)), ids)
    for row, wanted in zip(runs.rows(tmp_path / "run"), runs.rows(clip_run), strict=True):
        assert row["step"] == wanted["step"]
        assert row["loss"] == pytest.approx(wanted["loss"], rel=1e-4)
        assert row["grad_norm"] == pytest.approx(wanted["grad_norm"], rel=1e-4)
