"""What training shows in a terminal: a bar where one fits, whole lines above it, and log lines where none does."""

import fcntl
import os
import pty
import re
import select
import struct
import subprocess
import sys
import termios
import time

import pytest

from helpers import runs
from vlp.core import progress
from vlp.train import bar


def in_terminal(argv, rows, columns, secs=120):
    """What a process shows in a terminal of this size."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
    env = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(runs.ROOT)}
    streams = {"stdin": theirs, "stdout": theirs, "stderr": theirs}
    process = subprocess.Popen(argv, env=env, cwd=runs.ROOT, start_new_session=True, **streams)
    os.close(theirs)
    shown, end = b"", time.monotonic() + secs
    while time.monotonic() < end:
        if select.select([ours], [], [], 0.1)[0]:
            try:
                if not (data := os.read(ours, 65536)):
                    break
            except OSError:  # Linux's end of file
                break
            shown += data
    os.close(ours)
    assert process.wait(timeout=10) == 0, shown.decode()
    return shown.decode()


BAR = """
import logging, sys
from vlp.train import bar
logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
with bar.shown("stage0", 0, 3) as b:
    logging.info("a line of the log")
    for k in range(3):
        b.update()
        if b.disable:
            logging.info("step %d", k + 1)
logging.info("after")
"""


@pytest.mark.parametrize(("rows", "columns"), [(0, 0), (24, 10), (24, 80)])
def test_a_bar_where_one_fits(rows, columns):
    shown = in_terminal([sys.executable, "-c", BAR], rows, columns)
    lines = re.split(r"[\r\n]+", shown.replace("\x1b[A", ""))
    assert "a line of the log" in [line.strip() for line in lines]  # whole, beside no bar
    assert "after" in [line.strip() for line in lines]
    assert ("3/3" in shown) == (columns == 80)
    assert ("step 3" in shown) == (columns != 80)


def test_no_terminal(monkeypatch, capfd):
    """Files, pipes and what has no stream at all get lines."""
    assert not bar.fits()
    monkeypatch.setattr(sys, "stderr", None)
    assert not bar.fits()
    with bar.shown("stage0", 0, 3) as shown:
        assert shown.disable


def test_seconds_count_from_what_is_named(capsys, monkeypatch):
    """An evaluation late in a stage is not said to take as long as the stage."""
    monkeypatch.setattr(progress, "FIRST_SECS", 0.05)
    monkeypatch.setattr(progress, "_last", 0.0)
    monkeypatch.setattr(progress, "in_log", False)
    monkeypatch.setattr(progress.logging.Logger, "isEnabledFor", lambda *_: True)
    with progress.phase("training: eval", since=lambda: time.monotonic() - 60):
        time.sleep(0.5)
    assert capsys.readouterr().err == "training: eval … 60 s\n"
