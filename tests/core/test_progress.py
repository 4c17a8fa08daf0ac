"""Long work prints progress; short work prints nothing."""

import argparse
import logging
import time

import pytest

from helpers import runs
from vlp.cli import main, report
from vlp.core import progress
from vlp.train import loop


@pytest.fixture
def hurried(monkeypatch):
    """Progress lines come fifty times as often."""
    monkeypatch.setattr(progress, "FIRST_SECS", 0.08)
    monkeypatch.setattr(progress, "EVERY_SECS", 0.3)
    monkeypatch.setattr(progress, "_last", 0.0)
    monkeypatch.setattr(progress, "in_log", False)
    level = logging.getLogger().level
    logging.getLogger().setLevel(logging.INFO)
    yield
    logging.getLogger().setLevel(level)


def test_quick_work_says_nothing(hurried, capsys):
    with progress.phase("quick"):
        pass
    time.sleep(0.2)
    assert capsys.readouterr().err == ""


def test_a_line_appears_every_few_seconds(hurried, capsys):
    with progress.phase("outer"), progress.phase(lambda: "inner"):
        time.sleep(0.85)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) in (2, 3) and all(line.startswith("inner … ") for line in lines)
    assert not progress._phases


def test_what_is_said_by_others_counts(hurried, capsys):
    log = logging.getLogger("vlp.somewhere")
    handler = progress.Said()
    log.addHandler(handler)
    with progress.phase("work"):
        for _ in range(12):
            time.sleep(0.05)
            log.info("a line")
    log.removeHandler(handler)
    assert capsys.readouterr().err == ""


def test_a_library_is_silent(hurried, capsys):
    logging.getLogger().setLevel(logging.WARNING)
    with progress.phase("work"):
        time.sleep(0.3)
    assert capsys.readouterr().err == ""


def test_every_command_shows_progress(hurried, capsys, monkeypatch, tmp_path):
    def slow(args: argparse.Namespace) -> int:
        time.sleep(0.3)
        return 0

    monkeypatch.setattr(report, "run", slow)
    assert main.main(["report", str(tmp_path)]) == 0
    assert capsys.readouterr().err.startswith("vlp report … ")


def test_a_run_names_its_phases_in_order(toy, hurried, capsys, monkeypatch, tmp_path):
    """Its phases are named, in order."""
    for name in ("prepare", "start_stage", "train_stage"):
        function = getattr(loop, name)

        def slow(*args, function=function):
            time.sleep(0.5)
            return function(*args)

        monkeypatch.setattr(loop, name, slow)
    prepare = loop.prepare
    monkeypatch.setattr(runs, "_prepare", prepare)
    assert runs.train(runs.changed(runs.TOY, steps=2), tmp_path / "run") == 0
    said, errors = capsys.readouterr()
    assert errors == ""
    places = [
        said.index(text)
        for text in ("opening the data of stage 'stage0'", "entering stage 'stage0'", "training: ")
    ]
    assert places == sorted(places)
