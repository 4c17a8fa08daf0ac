"""Runs without progress end with code 76 and say which process stands where, also one that cannot speak."""

import json
import os
import signal
import socket
import time

import jax
import pytest

from helpers import processes, runs
from vlp.runtime.watchdog import HANG, Watchdog

slow = pytest.mark.skipif(not os.environ.get("VLP_SLOW"), reason="set VLP_SLOW=1 to run it")
CONFIG = runs.changed(runs.TOY, steps=8, save_every_steps=3, hang_secs=10.0)


def test_a_hang_ends_with_code_76_and_all_stacks(tmp_path):
    config = runs.changed(CONFIG, hang_secs=6.0)
    with processes.Run(config, tmp_path / "run", stall={0: ("data", "600", 2)}) as run:
        assert run.finish() == [HANG] == [76], run.err(0)
        message, stacks = run.err(0).split("\n", 1)
    assert message.startswith("run: got no progress for ") and "in phase 'data'" in message
    assert "in stall" in stacks and "Thread 0x" in stacks


FROZEN = {  # which process, where
    "step": (2, ("step", "freeze", 5)),
    "data": (2, ("data", "freeze", 5)),
    "save": (2, ("save", "freeze", 6)),
    # JAX's coordinator freezes with it: JAX may abort a process that waits for an answer, after 100 s
    "step of process 0": (0, ("step", "freeze", 5)),
}


@pytest.mark.parametrize(
    "where", [w if w == "step" else pytest.param(w, marks=slow) for w in FROZEN]
)
def test_one_of_four_processes_freezes(toy, tmp_path, where):
    """The others name it, its phase and step; a restart finishes the run."""
    frozen, stall = FROZEN[where]
    with processes.Run(CONFIG, tmp_path / "run", num=4, stall={frozen: stall}) as run:
        run.await_line("stalled", frozen)
        began, others = time.monotonic(), [i for i in range(4) if i != frozen]
        codes = run.finish(others)
        secs = time.monotonic() - began
        print(f"{where}: named and gone {secs:.1f} s after it froze (hang_secs 10)")
        # one whose collective fails because another left first may end with 1, or be aborted with the coordinator
        assert HANG in codes and all(codes), [run.err(i) for i in range(4)]
        others = [i for i, code in zip(others, codes) if code == HANG]
        phase = {"data": "data", "save": "save"}.get(where, "step 5")
        for i in others:
            line = run.err(i).split("\n", 1)[0]
            name = f"process {frozen} on {socket.gethostname()} in {phase!r} at step "
            assert name in line and ", silent for " in line, line
            assert "Thread 0x" in run.err(i)
        assert secs < 120  # JAX alone takes 100 s, and names nobody: a busy machine may be slow
        run.send(signal.SIGCONT, frozen)
        assert run.finish([frozen])[0] != 0
    assert runs.train(CONFIG, tmp_path / "run") == 0
    assert [r["step"] for r in runs.rows(tmp_path / "run")] == [*range(1, 9)]


def test_an_error_on_one_process_ends_all(toy, tmp_path):
    """In the midst of training, where the others wait for it."""
    config = runs.changed(CONFIG, hang_secs=60.0)
    with processes.Run(config, tmp_path / "run", num=2, stall={1: ("data", "fail", 5)}) as run:
        assert run.finish() == [1, 1], [run.err(i) for i in range(2)]
        name = (
            f"process 1 on {socket.gethostname()}: the data: got Cannot allocate memory, expected"
        )
        assert f"vlp: {name}" in run.err(0) and "vlp: the data: got Cannot" in run.err(1)
    assert runs.train(config, tmp_path / "run") == 0


def test_a_beating_heart_is_left_alone(monkeypatch):
    ended = []
    monkeypatch.setattr(os, "_exit", ended.append)
    watchdog = Watchdog(0.4)
    for _ in range(10):
        time.sleep(0.08)
        watchdog.beat("step")
    watchdog.close()
    time.sleep(0.6)
    assert not ended


@pytest.fixture
def dogs(tmp_path, monkeypatch):
    """The watchdogs of two processes, whose threads a test plays: dogs(process) → its watchdog."""
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    made = {i: Watchdog(0.0, tmp_path / "heartbeats") for i in range(2)}
    for dog in made.values():
        dog._secs, dog._every, dog._look, dog._start = 40.0, 5.0, 1.0, "a"

    def get(process):
        monkeypatch.setattr(jax, "process_index", lambda: process)
        return made[process]

    return get


def test_those_behind_are_named(dogs):
    """Process 1 stopped one beat before process 0."""
    for number, beats in ((0, ("data", "step 1")), (1, ("data",))):
        for phase in beats:
            dogs(number).beat(phase, 1)
        dogs(number)._write(time.monotonic() + 10)
    host = socket.gethostname()
    assert dogs(0)._others([]) == (
        f" (process 0 on {host}; behind: process 1 on {host} in 'data' at step 1)"
    )
    dogs(1).beat("step 1")
    dogs(1)._write(time.monotonic() + 20)
    dogs(1)._looked = -1e9
    assert dogs(1)._others([]).endswith("; no process is behind)")


def test_silence_counts_only_if_this_process_can_write(dogs, tmp_path):
    """Heartbeats of an earlier start, and of a process that has ended, do not count."""
    now = time.monotonic()
    for number in (0, 1):
        dogs(number)._write(now)
    assert not dogs(0)._silent(now)
    dogs(0)._write(now + 20)
    (late,) = dogs(0)._silent(now + 20)
    assert late.row["process"] == 1
    dogs(0)._problem = "No space left on device"
    assert not dogs(0)._silent(now + 22)
    dogs(0)._problem = ""
    dogs(1).close()
    assert not dogs(0)._silent(now + 24) and not dogs(0)._silent(now + 80)[1:]
    row = json.loads((tmp_path / "heartbeats" / "1.json").read_text())
    assert row["phase"] == "closed" and {"host", "pid", "step", "time", "count"} <= row.keys()


def test_a_process_that_was_suspended_itself_does_not_end(monkeypatch):
    """Ctrl-Z overnight: the time does not count."""
    ended, real = [], time.monotonic
    late = [0.0]
    monkeypatch.setattr(os, "_exit", ended.append)
    monkeypatch.setattr(time, "monotonic", lambda: real() + late[0])
    watchdog = Watchdog(3.0)
    time.sleep(0.5)
    late[0] = 3600.0
    time.sleep(1.0)
    watchdog.close()
    assert not ended
