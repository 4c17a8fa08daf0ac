"""A data worker that is killed is started again where it was; one that dies at once ends the run."""

import multiprocessing
import os
import signal

import numpy as np
import pytest

from vlp.core import check
from vlp.data.config import Data
from vlp.data.dataset import open_dataset
from vlp.data.pipeline import _restarted

DATA = dict(source="shapes", num_records=64, image_px=16, text_len=8, prefetch=1, read_threads=1)
HOW = dict(start=8, batch=8, num_batches=30, seed=0)


def kill(number=signal.SIGKILL):
    for process in multiprocessing.active_children():
        assert process.pid is not None
        os.kill(process.pid, number)


def test_batches_are_the_same(caplog):
    whole = list(open_dataset(Data(**DATA)).train_iter(**HOW))
    found = []
    for batch in open_dataset(Data(**DATA, workers=1)).train_iter(**HOW):
        found.append(batch)
        if len(found) == 2:
            kill(
                signal.SIGTERM
            )  # Slurm sends it to all processes; a run needs batches until it has saved
        if len(found) == 20:
            assert "worker process died" not in caplog.text
            kill()
    assert len(found) == len(whole) == 30
    for a, b in zip(found, whole):
        np.testing.assert_array_equal(a["record"], b["record"])
        np.testing.assert_array_equal(a["image"], b["image"])
    assert "a worker process died (exit code -9: killed, probably out of memory)" in caplog.text


def test_one_that_dies_at_once():
    def dying(first):
        raise RuntimeError("Worker process was terminated unexpectedly with exit code -9. Search")
        yield

    with pytest.raises(check.Failed, match="a worker process that died twice .exit code -9"):
        list(_restarted(dying))


def test_other_errors_pass():
    def broken(first):
        yield {}
        raise RuntimeError("another")

    with pytest.raises(RuntimeError, match="another"):
        list(_restarted(broken))
