"""SIGTERM in every phase of a run, in one and in four processes: one whole checkpoint, exit code 75, within 30 s."""

import os
import signal
import time

import pytest

from helpers import processes, runs
from vlp.runtime.stop import PREEMPTED

CONFIG = runs.changed(
    runs.TOY, steps=6, save_every_steps=5, evals={"retrieval": {"every_steps": 2, "batch": 8}},
    grace_secs=9.0,
)  # fmt: skip
# phase → where it stalls (helpers.processes.stalled), the step that is saved. "block": the main thread is deaf.
CASES = {
    "compile": (("compile", "block", 1), None),
    "data": (("data", "block", 4), 3),
    "step": (("step", "1.5", 3), 3),
    "evaluation": (("eval", "block", 1), 2),
    "batch": (("batch", "1.5", 0), 2),
    "save": (("save", "1.5", 5), 5),
}
slow = pytest.mark.skipif(not os.environ.get("VLP_SLOW"), reason="set VLP_SLOW=1 to run it")


@pytest.fixture
def whole(toy, tmp_path):
    assert runs.train(CONFIG, tmp_path / "whole") == 0
    return tmp_path / "whole"


def assert_stopped(run, i, directory, saved):
    """Asserts that process i said what it saved, and no error; that the checkpoint is there."""
    assert not run.err(i)
    if saved is None:
        assert "stopped before a step; the same command continues" in run.out(0)
        assert not runs.rows(directory)
    else:
        assert f"stopped at step {saved} and saved; the same command continues" in run.out(i)
        assert int(runs.saved(directory)[""]) == saved


def test_sigterm_in_each_phase_of_one_process(whole, tmp_path):
    """Seven runs at once, each of which is stopped in another phase; the last one waits for a second process."""
    directories = [tmp_path / name for name in (*CASES, "roll call")]
    stall, last = {i: s for i, (s, _) in enumerate(CASES.values())}, len(CASES)
    with processes.Run(CONFIG, directories, stall=stall, waiting={last}) as run:
        began = {}
        for i in range(len(CASES)):
            run.await_line("stalled", i)
            began[i] = time.monotonic()
            run.send(signal.SIGTERM, i)
            if i == 0:
                run.send(signal.SIGTERM, last)
        codes = run.finish()
        shown = [run.out(i) + run.err(i) for i in range(last + 1)]
        assert codes == [PREEMPTED] * (last + 1), shown
        assert run.err(last) == "vlp: stopped before the first step; the same command continues\n"
        assert time.monotonic() - min(began.values()) < 60  # all of them, on a slow machine
        for i, (directory, (_, saved)) in enumerate(zip(directories, CASES.values())):
            assert_stopped(run, i, directory, saved)
    for directory in directories:
        assert runs.train(CONFIG, directory) == 0
        runs.assert_same_run(directory, whole)


@pytest.mark.parametrize(
    "where", [c if c == "evaluation" else pytest.param(c, marks=slow) for c in CASES]
)
def test_sigterm_on_one_of_four_processes(toy, tmp_path, where):
    """All four stall in the phase; the third one gets the signal, twice, as under Slurm."""
    stall, saved = CASES[where]
    with processes.Run(
        CONFIG, tmp_path / "run", num=4, stall=dict.fromkeys(range(4), stall)
    ) as run:
        for i in range(4):
            run.await_line("stalled", i)
        began = time.monotonic()
        for _ in range(2):
            run.send(signal.SIGTERM, 2)
        assert run.finish() == [PREEMPTED] * 4, [run.out(i) + run.err(i) for i in range(4)]
        secs = time.monotonic() - began
        print(f"four processes, {where}: gone {secs:.1f} s after SIGTERM")
        assert secs < 60  # the killer allows 30 s; a busy machine may be slow
        assert_stopped(run, 0, tmp_path / "run", saved)
        assert not any(run.err(i) for i in range(4))
    assert runs.train(CONFIG, tmp_path / "run") == 0
    assert [r["step"] for r in runs.rows(tmp_path / "run") if r["kind"] == "train"] == [
        *range(1, 7)
    ]
