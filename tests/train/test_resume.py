"""A run that dies anywhere and is started again ends as if nothing had happened, to the bit."""

import json
import shutil
from unittest import mock

import numpy as np
import pytest
import runs

from vlp.core import mesh as meshes
from vlp.train import loop


def die_at(number, function):
    """`function`, but its call `number` (from 1) kills the run instead."""
    calls = iter(range(1, 1000))

    def call(*args, **kwargs):
        if next(calls) == number:
            raise runs.Killed
        return function(*args, **kwargs)

    return call


def die_after(number, function):
    """`function`, but the run is killed right after its call `number`."""
    calls = iter(range(1, 1000))

    def call(*args, **kwargs):
        out = function(*args, **kwargs)
        if next(calls) == number:
            raise runs.Killed
        return out

    return call


def kill(config, directory, owner, name, how):
    with mock.patch.object(owner, name, how(getattr(owner, name))), pytest.raises(runs.Killed):
        runs.train(config, directory)


# Where the run dies, in order; with `runs.COCA` a save is due at steps 2, 4, 5, 6, 8, 9 and an evaluation at 3, 5, 6, 9.
DEATHS = [
    ("before anything is saved", loop, "save", lambda f: die_at(1, f)),
    ("right after the first save", loop, "save", lambda f: die_after(1, f)),
    ("in an evaluation", meshes, "to_host", lambda f: die_at(2, f)),
    ("before step 5", meshes, "to_global", lambda f: die_at(3 + 2, f)),
    ("before the save at the boundary", loop, "save", lambda f: die_at(2, f)),
    ("after the save at the boundary", loop, "save", lambda f: die_after(1, f)),
    ("entering stage 2", loop, "enter", lambda f: die_at(2, f)),
    ("having entered stage 2", loop, "enter", lambda f: die_after(2, f)),
    ("after the first step of stage 2", loop, "evaluate", lambda f: die_at(1, f)),
    ("before the last save", loop, "save", lambda f: die_at(3, f)),
]


def test_deaths(coca_run, tmp_path):
    for i, (what, owner, name, how) in enumerate(DEATHS):
        kill(runs.COCA, tmp_path / "run", owner, name, how)
        reached = runs.rows(tmp_path / "run")
        assert reached == runs.rows(coca_run)[: len(reached)], what
        if i == 3:
            lose_last_save(tmp_path / "run")
    assert runs.train(runs.COCA, tmp_path / "run") == 0
    runs.assert_same_run(tmp_path / "run", coca_run)


def lose_last_save(directory):
    """Leaves what a death in the middle of a save leaves: a temporary folder, and half a line of metrics."""
    newest = sorted((directory / "checkpoints").glob("step_*"))[-1]
    (newest / "rest" / "_METADATA").unlink()
    newest.rename(newest.with_name(newest.name + ".orbax-checkpoint-tmp"))
    with (directory / "metrics.jsonl").open("a") as f:
        f.write('{"kind": "train", "ste')
