"""What a run leaves on disk, and a run whose newest checkpoint broke."""

import json
import shutil
from unittest import mock

import numpy as np
import pytest
import runs

from vlp.ckpt.manager import Checkpoints
from vlp.core.config import build
from vlp.data.loader import Data
from vlp.data.tokenizer import Tokenizer
from vlp.train import loop, session


def test_contents(coca_run):
    """All that is needed to use the model, in the checkpoint and beside it."""
    names = {p.name for p in coca_run.iterdir()}
    expected = "checkpoints config.json evals metrics.jsonl preprocessing.json tokenizer.model versions.json"
    assert names == set(expected.split())
    meta = Checkpoints(coca_run / "checkpoints", create=False).meta(9)
    beside = {
        name: json.loads((coca_run / f"{name}.json").read_text())
        for name in ("config", "versions", "preprocessing")
    }
    assert {name: meta[name] for name in beside} == beside
    assert beside["config"] == runs.COCA
    assert {"vlp", "jax", "orbax-checkpoint", "git", "device"} < beside["versions"].keys()
    data = build(Data, meta["preprocessing"], "preprocessing")
    assert (data.image_px, data.text_len) == (24, 10)  # of the last stage
    tokenizer = Tokenizer((coca_run / "tokenizer.model").read_bytes())
    assert meta["tokenizer"] == session.files.encode_bytes(tokenizer.to_bytes())
    assert meta["tokenizer_sha256"] == tokenizer.sha256
    assert meta["position"] == {"step": 9, "stage": 1, "stage_step": 4, "samples": 104}


def test_keeps_as_many_as_asked(coca_run):
    assert [p.name for p in sorted((coca_run / "checkpoints").iterdir())] == [
        "step_000000008",
        "step_000000009",
    ]


def dying_after_step_4(config, directory):
    """A run of which the checkpoints of steps 2 and 4 are there."""
    number = iter(range(100))

    def save(*args):
        if next(number) == 2:
            raise runs.Killed
        session.save(*args)

    with mock.patch.object(loop, "save", save), pytest.raises(runs.Killed):
        runs.train(config, directory)


def test_a_broken_checkpoint(toy, tmp_path, capsys):
    """The run goes on from the one before, and ends as it would have."""
    config = runs.changed(runs.TOY, steps=6)
    assert runs.train(config, tmp_path / "whole") == 0
    dying_after_step_4(config, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step_000000004" / "rest")
    assert runs.train(config, tmp_path / "run") == 0
    runs.assert_same_run(tmp_path / "run", tmp_path / "whole")
    names = sorted(p.name for p in (tmp_path / "run" / "checkpoints").iterdir())
    assert names[0].startswith("broken_") and names[1:] == ["step_000000004", "step_000000006"]


OTHER_DATA = {
    "records": {"data.num_records": 20},
    "tokenizer": {},
}


@pytest.mark.parametrize("what", ["records", "tokenizer"])
def test_other_data_than_the_checkpoints(toy, tmp_path, capsys, monkeypatch, what):
    """A restart with other records or another tokenizer is refused, and overwrites nothing."""
    dying_after_step_4(runs.TOY | {"steps": 6}, tmp_path / "run")
    before = runs.contents(tmp_path / "run")
    meta = session.last_meta(tmp_path / "run")
    key = {"records": "fingerprints", "tokenizer": "tokenizer_sha256"}[what]
    monkeypatch.setattr(loop, "last_meta", lambda directory: meta | {key: "another"})
    assert runs.train(runs.TOY | {"steps": 6}, tmp_path / "run") == 2
    assert f"config.data: got other {key}, expected the checkpoint's" in capsys.readouterr().err
    assert runs.contents(tmp_path / "run") == before


def test_a_failed_save_fails_the_run(toy, tmp_path, monkeypatch):
    """At the latest when the run ends: it must not say that it is done."""
    from vlp.ckpt import digest

    def full(folder):
        raise OSError("no space left on device")

    config = runs.changed(runs.TOY, save_every_steps=100)
    monkeypatch.setattr(digest, "write", full)
    with pytest.raises(OSError, match="no space left"):
        runs.train(config, tmp_path / "run")
    monkeypatch.undo()
    runs.register_toy()
    assert Checkpoints(tmp_path / "run" / "checkpoints").newest() is None
