"""Workers of a loader and of a conversion: they need no guard, and they die with what started them."""

import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

SCRIPT = """
import numpy as np
from vlp.data import tokenizer
from vlp.data.config import Data
from vlp.data.dataset import open_dataset
class Words:  # of the script itself
    vocab_size, pad_id, lower = 300, 0, True
    def encode_into(self, text, out):
        out[:] = len(text)
        return False
data = Data(source="shapes", num_records=21, image_px=16, text_len=8, workers=2, read_threads=1)
dataset = open_dataset(data, Words())
batches = dataset.train_iter(start=0, batch=4, num_batches=6, seed=0)
print("here", sum(int(b["text"][0, 0]) > 0 for b in batches))
"""


def env():
    return os.environ | {"PYTHONPATH": ":".join(p for p in sys.path if p), "JAX_PLATFORMS": "cpu"}


@pytest.mark.parametrize("how", ["file", "stdin"])
def test_a_script_without_a_guard(tmp_path, how):
    (tmp_path / "plain.py").write_text(SCRIPT)
    argv, text = ([str(tmp_path / "plain.py")], None) if how == "file" else (["-"], SCRIPT)
    done = subprocess.run(
        [sys.executable, *argv], input=text, capture_output=True, text=True, env=env(), timeout=120
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout == "here 6\n" and "Traceback" not in done.stderr


DOOMED = """
import os, sys, time
from vlp.data.tools import convert
from vlp.data.config import Data
from vlp.data.dataset import open_dataset
if sys.argv[1] == "loader":
    data = Data(source="shapes", num_records=21, image_px=16, text_len=8, workers=2)
    batches = open_dataset(data).train_iter(start=0, batch=4, num_batches=10**6, seed=0)
    next(batches)
    print("ready", flush=True)
    time.sleep(100)
else:
    print("ready", flush=True)
    convert.run(convert.Job(sys.argv[2], sys.argv[3], rows_per_shard=1), workers=2)
    time.sleep(100)
"""


def children(pid: int) -> set[int]:
    found = set()
    for task in pathlib.Path(f"/proc/{pid}/task").glob("*/children"):
        found |= set(map(int, task.read_text().split()))
    return found


@pytest.mark.skipif(not pathlib.Path("/proc/self/task").is_dir(), reason="needs /proc")
@pytest.mark.parametrize("what", ["loader", "convert"])
def test_workers_die_with_their_parent(tmp_path, what):
    from helpers import formats

    formats.tar(tmp_path / "a.tar", formats.rows(40))
    argv = [sys.executable, "-c", DOOMED, what, str(tmp_path / "a.tar"), str(tmp_path / "out")]
    parent = subprocess.Popen(argv, env=env(), stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None and parent.stdout.readline() == "ready\n"
    workers: set[int] = set()
    until = time.monotonic() + 60
    while len(workers) < 3 and time.monotonic() < until:  # two, and what tracks their resources
        workers = children(parent.pid)
        time.sleep(0.05)
    assert len(workers) >= 3
    time.sleep(2)  # they get ready
    os.kill(parent.pid, signal.SIGKILL)
    parent.wait()
    until = time.monotonic() + 30
    alive = workers
    while alive and time.monotonic() < until:
        alive = {w for w in workers if pathlib.Path(f"/proc/{w}").exists()}
        alive = {w for w in alive if " Z " not in pathlib.Path(f"/proc/{w}/stat").read_text()}
        time.sleep(0.1)
    assert not alive
