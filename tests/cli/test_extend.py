"""`vlp train --extend`: a run goes on with another length of its last stage, or with other evaluators."""

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


def test_new_evaluators_of_a_finished_run(extend, tmp_path, caplog):
    caplog.set_level("INFO")
    assert runs.train(TOY, tmp_path / "run") == 0
    assert extend(TOY | {"evals": EVALS}) == (0, "")
    last = runs.rows(tmp_path / "run")[-1]
    assert (last["kind"], last["step"], last["num"]) == ("eval", 4, 21)
    assert "stage 'stage0' evaluates anew retrieval" in caplog.text
    assert runs.vlp("eval", "--workdir", tmp_path / "run", "--evals", "retrieval") == 0


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
    assert "--extend goes on with this one" in capsys.readouterr().err
    code, line = extend(changed(TOY, steps=6, **{"schedule.lr": 0.5}))
    assert code == 2 and "schedule.lr: 0.01 -> 0.5" in line and "steps" not in line.split(";")[0]
    code, line = extend(changed(TOY, steps=3))
    assert code == 2 and "got 3 steps, expected the 4 that it has, or more" in line
    assert runs.contents(tmp_path / "run") == before
    assert json.loads((tmp_path / "run" / "config.json").read_text())["steps"] == 4
