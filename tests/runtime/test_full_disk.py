"""A failed save ends the run with one line that says what is kept; the same command resumes from there."""

import resource
import shutil
import subprocess
import sys
import threading
import time

import pytest

from helpers import runs
from vlp.train import loop

CONFIG = runs.changed(runs.TOY, steps=6, log_every_steps=50, **{"model.embed": 1024})


def limited(config, directory, kilobytes):
    """The run as a process that may write files of so many kB; its exit code, its errors and its seconds."""
    argv = [sys.executable, runs.__file__, *runs.arguments(config, directory)]
    env = runs.os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(runs.ROOT), "VLP_CACHE": ""}
    began = time.monotonic()
    line = f'ulimit -f {kilobytes}; exec "$@"'
    done = subprocess.run(
        ["bash", "-c", line, "bash", *map(str, argv)], env=env, capture_output=True, text=True,
        cwd=runs.ROOT, timeout=120,
    )  # fmt: skip
    return done.returncode, done.stderr.splitlines(), time.monotonic() - began


def test_a_file_size_limit_is_answered_as_a_full_disk(toy, tmp_path):
    """The system's error code, for `ulimit -f` as for a full disk, is found in TensorStore's message.

    The limit comes after the pre-flight, which would refuse it.
    """
    run = tmp_path / "run"
    process = runs.command(*runs.arguments(CONFIG, run))
    for line in process.stdout:
        if "effect" in line:  # the table of rules: next comes the compiler
            break
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (400_000, 400_000))
    errors = process.communicate(timeout=120)[1].splitlines()
    assert process.returncode == 1
    assert len(errors) == 1, errors
    assert "got File too large in saving step 2, expected a whole checkpoint" in errors[0]
    assert "there is no other checkpoint; remove the cause and repeat the command" in errors[0]
    code, errors, _ = limited(CONFIG, run, 400)
    expected = "got a limit of 410 kB for a file, expected 524 kB for the largest array; raise the"
    assert code == 2 and len(errors) == 1 and expected in errors[0], errors
    assert runs.train(CONFIG, run) == 0
    assert int(runs.saved(run)[""]) == 6


CALLBACK = """
import asyncio
import sys
import tensorstore
from vlp import __main__ as program
from vlp.cli import main as cli

class Other:
    def __del__(self):
        raise ValueError("another error")

def run():
    promise, future = tensorstore.Promise.new()
    async def wait():
        next(future.__await__())
    loop = asyncio.new_event_loop()
    loop.run_until_complete(wait())
    loop.close()
    promise.set_result(1)
    Other()
    return 0

cli.main = run
sys.exit(program.main())
"""


def test_a_callback_into_the_closed_loop_of_a_failed_save_prints_nothing():
    """As TensorStore's threads make it; other errors that no code can catch are printed."""
    process = runs.command(program=("-c", CALLBACK))
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 0
    assert "another error" in errors and "Event loop" not in errors, errors


def test_the_record_may_not_grow(tmp_path):
    config = runs.changed(runs.TOY, steps=900, save_every_steps=900)
    code, errors, _ = limited(config, tmp_path / "run", 260)
    assert code == 1 and len(errors) == 1, errors
    assert (
        errors[0].startswith("vlp: ")
        and "metrics.jsonl: got File too large, expected to " in errors[0]
    )


@pytest.mark.parametrize("how", ["a file", "no directory"])
def test_checkpoints_is_no_directory(toy, tmp_path, monkeypatch, capsys, how):
    """checkpoints/ becomes a file at step 3: the save of step 4 fails, and nothing hangs."""
    run = tmp_path / "run"
    function = loop.save

    def save(session, parts, state, step, interval):
        function(session, parts, state, step, interval)
        if step == 2:
            session.checkpoints.wait()
            shutil.move(run / "checkpoints", run / "moved")
            if how == "a file":
                (run / "checkpoints").write_text("")
            else:
                (run / "checkpoints").symlink_to("/proc/self/nothing")

    monkeypatch.setattr(loop, "save", save)
    assert runs.train(runs.TOY, run) == 1
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1, lines
    assert "in saving step 4" in lines[0] and "there is no other checkpoint" in lines[0]
    names = {t.name for t in threading.enumerate() if not t.name.startswith("asyncio_")}
    assert not {n for n in names if "save" in n or "async" in n or "handler" in n}, names


def test_a_failed_save_is_seen_at_the_next_step(toy, tmp_path, monkeypatch, capsys):
    """Not at the next save, which may be hours away."""
    from vlp.ckpt import digest

    def full(folder):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(digest, "write", full)
    config = runs.changed(runs.TOY, steps=800, save_every_steps=400, log_every_steps=10)
    assert runs.train(config, tmp_path / "run") == 1
    assert "got No space left on device in saving step 400" in capsys.readouterr().err
    assert runs.rows(tmp_path / "run")[-1]["step"] < 800
