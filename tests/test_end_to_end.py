"""The commands in the order in which users run them, compiled anew, with nothing replaced."""

import pytest

from helpers import runs
from vlp.train import loop

CONFIG = runs.changed(
    runs.CLIP,
    **{
        "evals": {"retrieval": {"batch": 8, "every_steps": 2}},
        "objective.keep_ratio": 0.5, "model.image_tower.dropout": 0.1,
    },
)  # fmt: skip


def test_train_then_resume_then_eval_then_report(tmp_path, capsys, monkeypatch):
    """A run that dies after its first save ends as one that does not, to the bit; `vlp eval` repeats its numbers."""
    prepare, calls = loop.prepare, []
    monkeypatch.setattr(loop, "prepare", lambda *args: calls.append(args) or prepare(*args))
    whole, run = tmp_path / "whole", tmp_path / "run"
    assert runs.train(CONFIG, whole, compile_anew=True) == 0
    save = loop.save

    def die(*args):
        save(*args)
        raise runs.Killed

    with monkeypatch.context() as patch, pytest.raises(runs.Killed):
        patch.setattr(loop, "save", die)
        runs.train(CONFIG, run, compile_anew=True)
    assert int(runs.saved(run)[""]) == 2
    assert runs.train(CONFIG, run, compile_anew=True) == 0
    assert len(calls) == 3  # each command prepared its own stage
    runs.assert_same_run(run, whole)
    recorded = [row for row in runs.rows(run) if row["kind"] == "eval"][-1]
    capsys.readouterr()
    assert runs.vlp("eval", "--workdir", run, compile_anew=True) == 0
    told = capsys.readouterr().out
    values = [v for k, v in recorded.items() if "/R@" in k]
    assert values and all(f" {v:.4f}\n" in told for v in values), told
    assert runs.vlp("report", run, compile_anew=True) == 0
    page = (run / "report.html").read_text()
    assert "retrieval" in page and CONFIG["name"] in page
