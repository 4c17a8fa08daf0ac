"""Runs that are stopped or killed: exit codes, and resuming by the same command. Each phase: test_stop.py."""

import os
import random
import signal
from unittest import mock

import pytest

from helpers import runs
from vlp.core import mesh as meshes
from vlp.runtime.stop import PREEMPTED

LONG = runs.changed(runs.TOY, steps=600, save_every_steps=50)


def await_line(process, word):
    """Reads the process's output up to the line that contains `word`."""
    for line in process.stdout:
        if word in line:
            return
    raise AssertionError(process.stderr.read())


def finish(process, signal_number=0):
    """Sends the signal and returns the exit code; an error of the process is shown."""
    if signal_number:
        process.send_signal(signal_number)
    _, errors = process.communicate(timeout=300)
    assert "Traceback" not in errors, errors
    return process.returncode


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_ends_with_code_75(clip_run, tmp_path, number):
    calls, before = iter(range(1, 100)), signal.getsignal(number)
    to_global = meshes.to_global

    def ask(batch, mesh):
        if next(calls) == 3:
            os.kill(os.getpid(), number)
        return to_global(batch, mesh)

    with mock.patch.object(meshes, "to_global", ask):
        assert runs.train(runs.CLIP, tmp_path / "run") == PREEMPTED
    assert runs.rows(tmp_path / "run")[-1]["step"] == int(runs.saved(tmp_path / "run")[""]) == 3
    assert signal.getsignal(number) is before
    assert runs.train(runs.CLIP, tmp_path / "run") == 0
    runs.assert_same_run(tmp_path / "run", clip_run)


def test_signals_at_any_time_lose_no_step(toy, tmp_path):
    """SIGTERM before the first step, SIGKILL at any time, SIGTERM during training; then the run finishes."""
    run = tmp_path / "run"
    start = lambda: runs.command(*runs.arguments(LONG, run))
    process = start()
    await_line(process, "effect")  # the table of rules: next comes the compiler
    assert finish(process, signal.SIGTERM) == PREEMPTED
    assert runs.rows(run)[-1]["step"] == 1
    process = start()
    await_line(process, "restored step 1")
    for _ in range(random.randint(1, 80)):
        await_line(process, "] stage0")  # a step's line
    assert finish(process, signal.SIGKILL) == -signal.SIGKILL
    process = start()
    await_line(process, "] stage0")
    assert finish(process, signal.SIGTERM) == PREEMPTED
    assert finish(start()) == 0
    assert runs.train(LONG, tmp_path / "whole") == 0
    runs.assert_same_run(run, tmp_path / "whole")
