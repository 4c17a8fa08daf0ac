"""What may change between two starts: evaluators; with `--extend` the length of the last stage."""

import json

import pytest

from helpers import runs
from helpers.runs import TOY, changed

EVALS = {"retrieval": {"batch": 8, "gallery": 0}}
STAGES = TOY | {"steps": 0, "stages": [{"name": "a", "steps": 2}, {"name": "b", "steps": 2}]}


@pytest.fixture
def extend(toy, tmp_path, capsys):
    def extend(config):
        code = runs.vlp(*runs.arguments(config, tmp_path / "run"), "--extend")
        return code, capsys.readouterr().err

    return extend


def test_extending_a_run_trains_the_further_steps(extend, tmp_path, caplog):
    caplog.set_level("INFO")
    constant = changed(TOY, **{"schedule.shape": "constant"})
    assert runs.train(constant, tmp_path / "run") == 0
    assert runs.train(changed(constant, steps=6), tmp_path / "whole") == 0
    assert extend(changed(constant, steps=6)) == (0, "")
    (line,) = [r.getMessage() for r in caplog.records if "--extend" in r.getMessage()]
    assert line == "--extend: stage 'stage0' has 6 steps, not 4"
    runs.assert_same_run(tmp_path / "run", tmp_path / "whole")
    assert (
        runs.train(changed(constant, steps=6), tmp_path / "run") == 0
    )  # it is the run's config now


def test_the_schedule_is_told(extend, tmp_path, caplog):
    caplog.set_level("INFO")
    assert runs.train(TOY, tmp_path / "run") == 0
    assert extend(changed(TOY, steps=0, samples=64))[0] == 0
    assert (
        "its schedule depends on the length: the rate at its step 4 goes from 0 to" in caplog.text
    )
    assert [row["step"] for row in runs.rows(tmp_path / "run")] == list(range(1, 9))


def test_a_finished_run_takes_new_and_changed_evaluators(toy, tmp_path, caplog):
    """Without a flag, once each; training goes on from nowhere, and its files stay as they are."""
    caplog.set_level("INFO")
    assert runs.train(TOY, tmp_path / "run") == 0
    saved = runs.contents(tmp_path / "run" / "checkpoints")
    config = TOY | {"evals": EVALS}
    smaller = changed(config, **{"evals.retrieval.split": "train"})
    for now, num in ((config, 1), (config, 1), (smaller, 2), (smaller, 2)):
        assert runs.train(now, tmp_path / "run") == 0
        found = [row for row in runs.rows(tmp_path / "run") if row["kind"] == "eval"]
        assert [(row["step"], row["num"]) for row in found] == [(4, 21)] * num
    assert [row["split"] for row in found] == ["test", "train"]
    told = "since the last start: stage 'stage0': evaluators added or changed: retrieval"
    assert caplog.text.count(told) == 2
    assert runs.train(TOY, tmp_path / "run") == 0
    assert "evaluators removed: retrieval" in caplog.text
    assert runs.contents(tmp_path / "run" / "checkpoints") == saved


def test_evaluators_may_change_in_the_midst_of_a_run(toy, tmp_path):
    kept = changed(TOY, teachers={"ema": {"decay": 0.9}}, evals=EVALS)
    assert runs.train(kept, tmp_path / "whole") == 0
    assert runs.train(changed(kept, steps=2), tmp_path / "run") == 0
    every = changed(kept, eval_params="ema", **{"evals.retrieval.every_steps": 1})
    assert runs.vlp(*runs.arguments(every, tmp_path / "run"), "--extend") == 0
    rows = runs.rows(tmp_path / "run")
    assert [r["step"] for r in rows if r["kind"] == "eval"] == [2, 2, 3, 4]


def test_what_may_not_change_is_shown(toy, tmp_path, capsys):
    """All differences, up to four; what may change is not among them."""
    assert runs.train(TOY, tmp_path / "run") == 0
    other = changed(TOY, batch=16, seed=1, evals=EVALS, log_every_steps=3, **{"schedule.lr": 0.5})
    line = runs.refused(capsys, *runs.arguments(other, tmp_path / "run"))
    assert "(batch: 8 -> 16, schedule.lr: 0.01 -> 0.5, seed: null -> 1), expected the same" in line
    assert "evals:" not in line and "log_every_steps:" not in line


def test_only_the_last_stage_is_extended(extend, tmp_path):
    assert runs.train(STAGES, tmp_path / "run") == 0
    code, line = extend(changed(STAGES, **{"stages.0.steps": 3}))
    assert code == 2 and "stages.0.steps: 2 -> 3" in line
    assert extend(changed(STAGES, **{"stages.1.steps": 3}))[0] == 0
    assert runs.rows(tmp_path / "run")[-1]["step"] == 5


def test_extensions_that_cannot_be_are_one_line(extend, tmp_path, capsys):
    assert runs.train(TOY, tmp_path / "run") == 0
    before = runs.contents(tmp_path / "run")
    assert runs.train(changed(TOY, steps=6), tmp_path / "run") == 2
    assert "--extend continues with this one" in capsys.readouterr().err
    code, line = extend(changed(TOY, steps=6, **{"schedule.lr": 0.5}))
    assert code == 2 and "schedule.lr: 0.01 -> 0.5" in line and "steps" not in line.split(";")[0]
    code, line = extend(changed(TOY, steps=3))
    assert code == 2 and "got 3 steps, expected the 4 that it has, or more" in line
    assert runs.contents(tmp_path / "run") == before
    assert json.loads((tmp_path / "run" / "config.json").read_text())["steps"] == 4
