"""One run per workdir at a time; broken lines of metrics.jsonl are skipped."""

import pytest

from helpers import runs
from vlp.core import check
from vlp.runtime import locks, workdir


def test_a_second_run_is_refused_until_the_first_lets_go(tmp_path):
    first = locks.lock(tmp_path / "run")
    with pytest.raises(check.UserError, match="a run that is going on"):
        locks.lock(tmp_path / "run")
    first.close()
    locks.lock(tmp_path / "run").close()


def test_a_workdir_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(check.UserError, match="a directory to write to"):
        locks.lock(tmp_path / "file" / "run")


def test_broken_lines_are_left_out_and_told(tmp_path, caplog):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\ngarbage\n{"step": 3}\n{"step"')
    assert workdir.read(path) == [{"step": 1}, {"step": 3}]
    assert "line 2 is broken" in caplog.text
    metrics = workdir.Metrics(path, 3)
    metrics.write({"step": 4})
    metrics.close()
    assert [r["step"] for r in workdir.read(path)] == [1, 3, 4]


def test_a_run_that_never_took_a_step_may_be_mended(tmp_path, toy, capsys):
    """A config that failed before the first step can be replaced."""
    directory = tmp_path / "run"
    assert runs.train(runs.changed(runs.TOY, **{"data.langs": ["xx"]}), directory) == 2
    assert "langs" in capsys.readouterr().err and (directory / "config.json").exists()
    assert runs.train(runs.TOY, directory) == 0
    assert [r["step"] for r in runs.rows(directory) if r["kind"] == "train"] == [1, 2, 3, 4]
    assert runs.train(runs.changed(runs.TOY, **{"schedule.lr": 0.5}), directory) == 2
    assert "a run with another config" in capsys.readouterr().err
