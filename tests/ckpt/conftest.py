"""Directories of checkpoints."""

import pathlib
import shutil

import pytest

from helpers.checkpoints import save
from vlp.ckpt.manager import Checkpoints


@pytest.fixture(scope="module")
def three(tmp_path_factory):
    """A directory with the checkpoints of steps 2, 4 and 6. Read only."""
    directory = tmp_path_factory.mktemp("three") / "checkpoints"
    checkpoints = Checkpoints(directory, keep=3)
    save(checkpoints, 2, 4, 6)
    checkpoints.close()
    return directory


@pytest.fixture
def copied(three, tmp_path):
    return pathlib.Path(shutil.copytree(three, tmp_path / "checkpoints"))
