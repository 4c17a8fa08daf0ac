"""Ctrl-C: one line and exit code 130, at once, in every command and at every moment."""

import os
import pathlib
import signal
import sys
import textwrap
import time

import pytest

from helpers import runs
from vlp.core import interrupt

COMMANDS = {
    "train": "train --config configs/clip.py:size=B/32,smoke --workdir run",
    "eval": "eval --workdir run",
    "caption": "caption --workdir run my.png",
    "average": "average run run --out out",
    "ckpt": "ckpt ls run",
    "plan": "plan --config configs/coca.py:size=base --devices 8",
    "report": "report run",
    "data emoji": "data emoji --out out",
    "data convert": "data convert photos.csv --out out",
    "data verify": "data verify out",
    "data inspect": "data inspect out",
    "data filter": "data filter out --out other",
    "data tokenizer": "data tokenizer out --out words.model",
    "data bench": "data bench out",
}
SECS = 5.0  # "at once", on a busy machine


@pytest.fixture(autouse=True)
def heeded():
    """A process whose parent ignores Ctrl-C, as a job in the background does, would ignore it, too."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def await_watch(process):
    """Waits for the thread that Ctrl-C wakes: the first moment at which the command has it in hand."""
    while process.poll() is None:
        try:
            if len(os.listdir(f"/proc/{process.pid}/task")) > 1:
                return
        except FileNotFoundError:
            pytest.skip("no /proc")
        time.sleep(0.002)


def interrupted(process, again=False):
    """again: press it until the process has ended, since the system makes one of two that are pending."""
    began = time.monotonic()
    process.send_signal(signal.SIGINT)
    while again and process.poll() is None and time.monotonic() - began < SECS:
        time.sleep(0.1)
        process.send_signal(signal.SIGINT)
    out, errors = process.communicate(timeout=60)
    assert (process.returncode, errors.strip()) == (interrupt.INTERRUPTED, "vlp: interrupted"), (
        errors
    )
    assert time.monotonic() - began < SECS
    return out


@pytest.mark.parametrize("command", COMMANDS.values(), ids=COMMANDS)
def test_every_command(command):
    for secs in (0.0, 0.04, 0.15):  # argparse, then imports
        process = runs.command(*command.split(), program=("-m", "vlp"))
        await_watch(process)
        time.sleep(secs)
        if process.poll() is None:
            interrupted(process)
        else:  # it has nothing to do here
            assert secs and process.returncode == 2, process.communicate()


def test_every_command_is_tried():
    import argparse

    from vlp.cli import data_options, main

    parser = argparse.ArgumentParser()
    data_options.add_actions(parser)
    actions = next(a for a in parser._actions if a.choices).choices
    names = {*main.COMMANDS, *(f"data {a}" for a in actions)} - {"data"}
    assert names == set(COMMANDS)


def program(body):
    """Python code that is `vlp`, after some code of the test's."""
    lines = "import hashlib, sys, time\nimport vlp.__main__\n"
    return "-c", f"{lines}{textwrap.dedent(body)}\nsys.exit(vlp.__main__.main())"


def test_deep_in_a_library():
    """The main thread is in a call that returns to no Python for a minute."""
    body = """
        from vlp.cli import report
        def run(args):
            print("busy", flush=True)
            hashlib.pbkdf2_hmac("sha256", b"", b"", 10**8)
        report.run = run
    """
    process = runs.command("report", "run", program=program(body))
    assert process.stdout.readline() == "busy\n"
    interrupted(process)


def test_where_python_swallows_exceptions():
    body = """
        from vlp.cli import report
        class Slow:
            def __del__(self):
                print("busy", flush=True)
                time.sleep(60)
        report.run = lambda args: Slow() and 0
    """
    process = runs.command("report", "run", program=program(body))
    assert process.stdout.readline() == "busy\n"
    interrupted(process)


def test_workers_are_silent_and_do_not_outlive_it(tmp_path):
    """A terminal sends Ctrl-C to all processes; what is done stays done."""
    from PIL import Image

    lines = ["image_path,caption"]
    for k in range(120):
        Image.new("RGB", (8, 8), (2 * k, 9, 9)).save(tmp_path / f"{k}.png")
        lines.append(f"{k}.png,number {k}")
    (tmp_path / "photos.csv").write_text("\n".join(lines))
    out = tmp_path / "out"
    argv = ["data", "convert", tmp_path / "photos.csv", "--out", out, "--rows-per-shard", 2]
    slow = """
        from vlp.data.tools import convert
        from vlp.data import processes
        started = processes.end_with_parent
    """
    process = runs.command(*argv, "--workers", 2, program=program(slow))
    children = lambda: pathlib.Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text()
    await_watch(process)
    while process.poll() is None and len(found := children().split()) < 3:
        time.sleep(0.005)
    for child in found:
        os.kill(int(child), signal.SIGINT)
    time.sleep(0.2)
    if process.poll() is None:
        interrupted(process)
    else:
        assert process.returncode == 0
    for child in found:
        gone = time.monotonic() + SECS
        while os.path.exists(f"/proc/{child}") and time.monotonic() < gone:
            time.sleep(0.02)
        assert not os.path.exists(f"/proc/{child}")
    assert runs.vlp(*argv) == 0


def test_a_temporary_folder_goes(tmp_path):
    body = f"""
        from vlp.cli import report
        from vlp.data import records
        def run(args):
            def rows():
                print("busy", flush=True)
                time.sleep(60)
                yield
            records.write({str(tmp_path / "out")!r}, {{"train": rows()}}, name="x", info={{}})
        report.run = run
    """
    process = runs.command("report", "run", program=program(body))
    assert process.stdout.readline() == "busy\n"
    assert len(list(tmp_path.iterdir())) == 1
    interrupted(process)
    assert not list(tmp_path.iterdir())


def test_training(toy, tmp_path):
    """Before the first step is done, at once; then the first one saves, and a second is not waited for."""
    config = runs.changed(runs.TOY, steps=100_000)
    argv = runs.arguments(config, tmp_path / "run")
    body = f"""
        sys.path.insert(0, {str(runs.ROOT / "tests")!r})
        from helpers import runs
        runs.register_toy()
        from vlp.train import loop, session
        make = loop.train_stage
        def train_stage(*args):
            print("busy", flush=True)
            return make(*args)
        loop.train_stage = train_stage
        from vlp.ckpt.manager import Checkpoints
        if "--profile" in sys.argv:  # a slow disk
            sys.argv[-2:] = []
            write = Checkpoints.save
            def save(*args):
                print("saving", flush=True)
                hashlib.pbkdf2_hmac("sha256", b"", b"", 10**8)
            Checkpoints.save = save
    """
    process = runs.command(*argv, program=program(body))
    await_line(process, "busy")
    interrupted(process)
    process = runs.command(*argv, "--profile", "slow", program=program(body))
    await_line(process, "saving")
    interrupted(process, again=True)


def await_line(process, word):
    for line in process.stdout:
        if word in line:
            return
    raise AssertionError(process.stderr.read())


def test_what_the_library_leaves_alone(monkeypatch):
    """Importing vlp changes no signal; a worker and a job in the background keep theirs."""
    before = signal.getsignal(signal.SIGINT)
    import multiprocessing

    monkeypatch.setattr(multiprocessing, "parent_process", lambda: True)
    interrupt.watch()
    monkeypatch.undo()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    interrupt.watch()
    assert not interrupt.watched and signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    signal.signal(signal.SIGINT, before)
    with interrupt.workers_start():
        assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, [])
    assert "vlp.__main__" not in sys.modules
