"""Workdirs: any name, no lost files, and nothing written elsewhere."""

import json
import os
import shutil

import pytest

from helpers import runs
from vlp.ckpt.manager import Checkpoints, check_path
from vlp.core import check
from vlp.core.appended import open_text
from vlp.runtime import workdir

NAMES = [
    "lr[1e-3]",
    "a b",
    "a*b?",
    "x**",
    "50%20",
    "zürich–é",
    "-dash",
    "new\nline",
    "~",
    "a@2",
    "{x}",
]


def test_a_workdir_may_have_any_name(toy, tmp_path, capsys):
    """Characters of patterns and addresses in a name are literal: each run saves, and resumes."""
    for name in NAMES:
        directory = tmp_path / name
        checkpoints = Checkpoints(directory / "checkpoints")
        checkpoints.save(1, {"w": runs.np.ones(3)}, {"step": runs.np.ones(1)}, {})
        checkpoints.close()
        assert Checkpoints(directory / "checkpoints", create=False).params(1)["w"].shape == (3,)
    run = tmp_path / "runs" / "lr[1e-3] *"
    run.parent.mkdir()
    assert runs.train(runs.changed(runs.TOY, steps=2), run) == 0
    assert runs.vlp("eval", "--workdir", run) == 0
    out = tmp_path / "avg [1]"
    assert runs.vlp("average", run, run, "--out", out) == 0
    assert Checkpoints(out / "checkpoints", create=False).newest() == 2
    assert runs.vlp("report", run) == 0 and (run / "report.html").stat().st_size > 1000


@pytest.mark.parametrize("name", ["back\\slash", "bad\udcff", "gs:/bucket/run", "s3:/bucket"])
def test_names_that_libraries_misread_are_refused(toy, tmp_path, capsys, name):
    """Names that Orbax or TensorStore would read as something else are refused before anything is written."""
    argv = runs.arguments(runs.TOY, tmp_path / "run")
    before = runs.contents(tmp_path)
    assert runs.vlp(*argv[:-1], tmp_path / name) == 2
    assert "--workdir: got " in capsys.readouterr().err
    assert runs.contents(tmp_path) == before
    with pytest.raises(check.UserError):
        check_path("here", tmp_path / name)


def test_a_save_that_does_not_open_is_none(tmp_path, monkeypatch):
    """A checkpoint that cannot be read back never gets its name; the save fails."""
    from orbax.checkpoint._src.serialization import ocdbt_utils

    async def nothing(*args, **kwargs):
        pass

    monkeypatch.setattr(ocdbt_utils, "merge_ocdbt_per_process_files", nothing)
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    checkpoints.save(1, {"w": runs.np.ones(3)}, {"step": runs.np.ones(1)}, {})
    with pytest.raises(check.Failed, match="in saving step 1, expected a whole checkpoint"):
        checkpoints.wait()
    assert Checkpoints(tmp_path / "checkpoints", create=False).newest() is None


@pytest.mark.parametrize("what", ["checkpoints", "steps"])
def test_checkpoints_that_are_gone(toy, tmp_path, capsys, what):
    """A run that saved checkpoints does not begin again when they are gone."""
    run = tmp_path / "run"
    assert runs.train(runs.TOY, run) == 0
    if what == "checkpoints":
        shutil.rmtree(run / "checkpoints")
    else:
        for folder in (run / "checkpoints").iterdir():
            shutil.rmtree(folder)
    before = runs.contents(run)
    assert runs.train(runs.TOY, run) == 2
    line = capsys.readouterr().err.strip()
    assert "\n" not in line and "no checkpoint of a run that saved some" in line
    assert runs.contents(run) == before


def test_a_record_without_checkpoint_is_set_aside(toy, tmp_path, caplog):
    """The rows of a start that was killed before its first save are kept in another file."""
    run = tmp_path / "run"
    assert runs.train(runs.TOY, run) == 0
    record = (run / "metrics.jsonl").read_bytes()
    shutil.rmtree(run / "checkpoints")
    (run / "saved.json").unlink()
    for number in (1, 2):
        assert runs.train(runs.TOY, run) == 0
        assert f"kept as metrics_aside_{number}.jsonl" in caplog.text
        shutil.rmtree(run / "checkpoints")
        (run / "saved.json").unlink()
    assert (run / "metrics_aside_1.jsonl").read_bytes() == record
    assert len(runs.rows(run)) == 4


@pytest.mark.parametrize("name", ["../../out", "/out", "a/b", "..", ".lock", "x\0y", "a" * 300])
def test_artefacts_stay_inside_the_workdir(tmp_path, name):
    """Names of artefacts contain labels and splits, which come from data or from others' checkpoints."""
    run = tmp_path / "inner" / "run"
    run.mkdir(parents=True)
    workdir.write_artefact(run, name, {"x": 1})
    workdir.write_artefact(run, "a_b", {"x": 2})
    written = [p for p in tmp_path.rglob("*") if p.is_file()]
    assert len(written) == 2 and {p.parent for p in written} == {run / "evals"}


LINKS = [
    ".lock", "config.json", "metrics.jsonl", "metrics.partial", ".config.json.partial", "evals", "heartbeats",
    "tokenizer.model", "saved.json", "evals/retrieval_test.json", "quarantine_0.jsonl", "tensorboard",
]  # fmt: skip


def test_links_are_not_followed(toy, tmp_path, capsys):
    """Symbolic links in a workdir make no command write elsewhere."""
    run = tmp_path / "run"
    assert runs.train(runs.changed(runs.TOY, steps=2), run) == 0
    evals = {"retrieval": {"batch": 8}}
    config = json.loads((run / "config.json").read_text())
    for name in LINKS:
        copy = shutil.copytree(run, tmp_path / "copy", symlinks=True)
        (copy / "evals").mkdir(exist_ok=True)
        target = tmp_path / "target"
        if name in ("evals", "heartbeats", "tensorboard"):
            target.mkdir()
        else:
            target.write_text("mine")
        place = copy / name
        if place.is_dir():
            place.rmdir()
        place.unlink(missing_ok=True)
        place.symlink_to(target)
        before = runs.contents(target) if target.is_dir() else target.read_text()
        assert runs.train(config, copy) == 2, name
        assert "a symbolic link" in capsys.readouterr().err, name
        assert runs.vlp("eval", "--workdir", copy, "--write") == 2, name
        capsys.readouterr()
        assert before == (runs.contents(target) if target.is_dir() else target.read_text())
        shutil.rmtree(copy)
        shutil.rmtree(target) if target.is_dir() else target.unlink()
    del evals


def test_opening_follows_no_link(tmp_path):
    (tmp_path / "mine").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "mine")
    with pytest.raises(OSError) as e:
        open_text(tmp_path / "link", "w")
    assert "link" in (check.answer(e.value) or [""])[0]
    assert (tmp_path / "mine").read_text() == "mine"
    os.symlink(tmp_path, tmp_path / "evals")
    with pytest.raises(check.UserError, match="a symbolic link"):
        workdir.write_artefact(tmp_path, "x", {})


def test_infinities_of_a_config(toy, tmp_path):
    """A config with infinities, which JSON lacks, is equal to itself at the next start."""
    config = runs.changed(runs.TOY, steps=1, hang_secs=float("inf"), **{"optim.clip_norm": 1e999})
    (tmp_path / "run").mkdir()
    workdir.write_json(tmp_path / "run" / "config.json", config)
    workdir.write_json(tmp_path / "run" / "metrics.jsonl", {"step": 1})
    workdir.check_config(tmp_path / "run", config)


def test_rows_of_metrics_keep_any_text(tmp_path):
    """Names with line separators are kept; lines that are no rows are skipped."""
    path = tmp_path / "metrics.jsonl"
    rows = [{"kind": "train", "step": 1, "stage": "a\u2028b\x85c"}, {"kind": "eval", "step": 2}]
    text = [workdir.dump(row) for row in rows] + [
        "[1]",
        "null",
        '{"step": "3"}',
        "[" * 10**5,
        '{"st',
    ]
    path.write_text("\n".join(text))
    assert workdir.read(path) == rows
