"""The files of a run, and a run whose newest checkpoint is broken."""

import io
import json
import shutil
from unittest import mock

import pytest
from PIL import Image

from helpers import runs
from vlp.ckpt import digest
from vlp.ckpt.manager import Checkpoints
from vlp.core.config import build
from vlp.data import records, tokenizer
from vlp.data.config import Data
from vlp.data.tokenizer import Tokenizer
from vlp.train import loop, session


def test_a_checkpoint_holds_all_that_its_use_needs(coca_run):
    """What the use of a model needs is in the checkpoint and in the workdir."""
    names = {p.name for p in coca_run.iterdir()} - {".lock"}
    expected = "checkpoints config.json evals metrics.jsonl preprocessing.json saved.json tokenizer.model versions.json"
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
    words = Tokenizer((coca_run / "tokenizer.model").read_bytes())
    assert meta["tokenizer"] == session.files.encode_bytes(words.to_bytes())
    assert meta["tokenizer_sha256"] == words.sha256
    assert meta["position"] == {"step": 9, "stage": 1, "stage_step": 4, "samples": 104}


def test_keeps_as_many_as_asked(coca_run):
    assert [p.name for p in sorted((coca_run / "checkpoints").iterdir())] == [
        "step_000000008",
        "step_000000009",
    ]


def dying_after_step_4(config, directory):
    """A run that has the checkpoints of steps 2 and 4."""
    number = iter(range(100))

    def save(*args):
        if next(number) == 2:
            raise runs.Killed
        session.save(*args)

    with mock.patch.object(loop, "save", save), pytest.raises(runs.Killed):
        runs.train(config, directory)


def test_a_run_goes_on_from_before_a_broken_checkpoint(toy, tmp_path, capsys):
    """It resumes from the checkpoint before, and its end is the same to the bit."""
    config = runs.changed(runs.TOY, steps=6)
    assert runs.train(config, tmp_path / "whole") == 0
    dying_after_step_4(config, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step_000000004" / "rest")
    assert runs.train(config, tmp_path / "run") == 0
    runs.assert_same_run(tmp_path / "run", tmp_path / "whole")
    names = sorted(p.name for p in (tmp_path / "run" / "checkpoints").iterdir())
    assert names[0].startswith("broken_") and names[1:] == ["step_000000004", "step_000000006"]


def write_data(path, prefix, vocab):
    """Twelve records whose keys begin with `prefix`, and a tokenizer of up to `vocab` pieces."""
    shutil.rmtree(path, ignore_errors=True)
    png = io.BytesIO()
    Image.new("RGB", (20, 20), "red").save(png, "PNG")
    captions = [{"text": "a red square on nothing at all", "source": "x", "lang": "en"}]
    rows = [
        {"key": f"{prefix}{i}", "image": png.getvalue(), "captions": captions} for i in range(12)
    ]
    words = tokenizer.train([captions[0]["text"]], vocab, model_type="bpe")
    records.write(
        path, {"train": rows}, name="x", info={}, files={records.TOKENIZER: words.to_bytes()}
    )


def test_other_data_than_the_checkpoints(toy, tmp_path, capsys):
    """A restart with other records or another tokenizer is refused, and overwrites nothing."""
    data = {"path": str(tmp_path / "data"), "image_px": 16, "text_len": 8}
    config = runs.TOY | {"steps": 6, "data": data}
    write_data(tmp_path / "data", "a", 24)
    dying_after_step_4(config, tmp_path / "run")
    before = runs.contents(tmp_path / "run")
    for prefix, vocab, told in (("b", 24, "fingerprints"), ("a", 28, "tokenizer_sha256")):
        write_data(tmp_path / "data", prefix, vocab)
        with mock.patch.dict(runs.MEMORY, clear=True):  # which has the old data open
            assert runs.train(config, tmp_path / "run") == 2
        told = f"config.data: got other {told}, expected the checkpoint's"
        assert told in capsys.readouterr().err
        assert runs.contents(tmp_path / "run") == before


def test_a_failed_save_fails_the_run(toy, tmp_path, monkeypatch, capsys):
    """The run prints one line and exits with code 1, at the latest at its end."""

    def full(folder):
        raise OSError("no space left on device")

    config = runs.changed(runs.TOY, save_every_steps=100)
    monkeypatch.setattr(digest, "write", full)
    assert runs.train(config, tmp_path / "run") == 1
    told = capsys.readouterr().err.splitlines()[-1]
    assert "no space left" in told and "in saving step 4" in told and "no other checkpoint" in told
    assert Checkpoints(tmp_path / "run" / "checkpoints").newest() is None
