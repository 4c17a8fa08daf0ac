"""Which checkpoints a run keeps, and `vlp ckpt`: list, check, remove, tag, copy."""

import json
import re
import shutil

import pytest

from helpers import runs
from helpers.checkpoints import save, trees
from vlp.ckpt import steps
from vlp.ckpt.keep import Keep
from vlp.ckpt.manager import Checkpoints
from vlp.core import check
from vlp.train import stages


def save_scored(directory, values, keep=1, more=Keep()):
    """Saves steps 1, 2, … with these scores; returns the steps that are left."""
    checkpoints = Checkpoints(directory, keep, more=more)
    for step, value in enumerate(values, 1):
        params, rest = trees(step)
        scores = {} if value is None else {"r/R@1": value}
        checkpoints.save(step, params, rest, {"scores": scores})
    checkpoints.close()
    return Checkpoints(directory, create=False).steps()


def test_the_newest_every_and_the_best_are_kept(tmp_path):
    rules = Keep(every_steps=4, best=1, metric="r/R@1")
    values = [0.1, 0.9, 0.3, None, float("nan"), 0.2]
    assert save_scored(tmp_path / "max", values, more=rules) == [2, 4, 6]
    lowest = Keep(best=2, metric="r/R@1", mode="min")
    assert save_scored(tmp_path / "min", values[:4], more=lowest) == [1, 3, 4]


def test_tagged_steps_and_what_others_wrote_are_never_deleted(tmp_path):
    directory = tmp_path / "c"
    checkpoints = Checkpoints(directory, 1)
    save(checkpoints, 1)
    steps.tag(checkpoints.path, "paper", 1)
    save(checkpoints, 2)
    checkpoints.close()
    (directory / "step_000000002" / "notes.txt").write_text("mine")
    shutil.copytree(directory / "step_000000001", directory / "step_000000000")
    (directory / "step_000000000" / "digests.json").unlink()
    (directory / "mine").mkdir()
    checkpoints = Checkpoints(directory, 1)
    save(checkpoints, 3, 4)
    checkpoints.close()
    assert checkpoints.steps() == [0, 1, 2, 4] and (directory / "mine").is_dir()
    steps.tag(checkpoints.path, "paper", None)
    again = Checkpoints(directory, 1)
    save(again, 5)
    again.close()
    assert again.steps() == [0, 2, 5]


def test_a_deletion_that_is_killed_leaves_no_step_that_looks_whole(copied, monkeypatch):
    """The commit marker goes first, the manifest last, so that the next save deletes the rest."""
    folder, calls = copied / "step_000000002", iter(range(100))
    remove = steps.paths.remove

    def dying(path):
        if next(calls) == 5:
            raise OSError(5, "killed")
        remove(path)

    monkeypatch.setattr(steps.paths, "remove", dying)
    with pytest.raises(OSError):
        steps.remove(folder)
    monkeypatch.undo()
    assert "commit_success.txt is missing" in Checkpoints(copied, create=False).problem(2)
    assert 2 in steps.not_kept(copied, 1, Keep())
    steps.remove(folder)
    assert not folder.exists()


def test_the_rules_are_checked(toy):
    for wrong, told in (
        ({"best": 1}, "config.keep.metric: got , expected EVALUATION/METRIC"),
        ({"metric": "r/R@1"}, "config.keep.metric"),
        ({"best": 1, "metric": "x/y", "mode": "most"}, "config.keep.mode: got most"),
        ({"best": 1, "metric": "absent/R@1"}, "config.keep.metric: got 'absent/R@1'"),
        ({"every_steps": -1}, "config.keep.every_steps"),
    ):
        with pytest.raises(check.UserError, match=re.escape(told)):
            stages.parse(runs.TOY | {"keep": wrong})


def test_a_run_keeps_its_best_checkpoint(toy, tmp_path, capsys):
    """Scores are those of the run's own evaluations; a metric that the evaluation lacks is one line."""
    config = runs.changed(
        runs.TOY, steps=6, keep_checkpoints=1,
        evals={"retrieval": {"every_steps": 2, "batch": 8}},
        keep={"best": 1, "metric": "retrieval/i2t/median_rank", "mode": "min"},
    )  # fmt: skip
    wrong = runs.changed(config, **{"keep.metric": "retrieval/R@7"})
    assert runs.train(wrong, tmp_path / "wrong") == 2
    told = capsys.readouterr().err.strip()
    assert "config.keep.metric: got 'retrieval/R@7', expected one of" in told
    metric = re.search(r"'(retrieval/[^']*median_rank)'", told).group(1)
    config["keep"]["metric"] = metric
    assert runs.train(config, tmp_path / "run") == 0
    found = {r["step"]: r[metric.partition("/")[2]] for r in runs.rows(tmp_path / "run")
             if r["kind"] == "eval"}  # fmt: skip
    best = min(found.values())
    folder = tmp_path / "run" / "checkpoints"
    left = steps.listed(folder)
    assert 6 in left and any(found[s] == best for s in left) and len(left) <= 2
    assert all(steps.scores(folder, s)[metric] == found[s] for s in left)


# ---- vlp ckpt


@pytest.fixture
def run(copied):
    return copied.parent


def test_ls(run, capsys):
    steps.tag(run / "checkpoints", "paper", 2)
    (run / "checkpoints" / "step_000000008.orbax-checkpoint-tmp").mkdir()
    (run / "checkpoints" / "step_000000004" / "commit_success.txt").unlink()
    assert runs.vlp("ckpt", "ls", run) == 0
    head, two, four, six, left = capsys.readouterr().out.strip().splitlines()
    assert head.split()[:4] == ["step", "MB", "saved", "tags"]
    assert "paper" in two and "complete" in two and "complete" in six
    assert "commit_success.txt is missing" in four
    assert left == "step_000000008.orbax-checkpoint-tmp: an unfinished save"


def test_verify(run, capsys):
    assert runs.vlp("ckpt", "verify", run) == 0
    assert capsys.readouterr().out == "step 2: whole\nstep 4: whole\nstep 6: whole\n"
    (run / "checkpoints" / "step_000000004" / "meta" / "metadata").write_text("{}")
    assert runs.vlp("ckpt", "verify", run, 2, 4) == 1
    assert capsys.readouterr().out == "step 2: whole\nstep 4: meta/metadata was changed\n"


def test_rm(run, capsys):
    folder = run / "checkpoints"
    assert runs.vlp("ckpt", "tag", run, 2, "paper") == 0
    before = runs.contents(run)
    assert runs.vlp("ckpt", "rm", run, 4, "--dry-run") == 0
    assert capsys.readouterr().out.splitlines()[-1] == "would remove step 4"
    for argv, told in (
        ((2,), "a step with the tag 'paper'"),
        ((4, 6), "the newest whole checkpoint"),
        ((5,), "got step 5, expected one of steps [2, 4, 6]"),
        ((), "got no step"),
        (("four",), "invalid int value"),
    ):
        assert told in runs.refused(capsys, "ckpt", "rm", run, *argv)
    assert runs.contents(run) == before
    (folder / "step_000000004" / "notes.txt").write_text("mine")
    assert "did not write (notes.txt)" in runs.refused(capsys, "ckpt", "rm", run, 4)
    (folder / "step_000000004" / "notes.txt").unlink()
    (folder / "step_000000008.orbax-checkpoint-tmp").mkdir()
    assert runs.vlp("ckpt", "rm", run, 4, "--unfinished") == 0
    assert sorted(p.name for p in folder.iterdir()) == ["step_000000002", "step_000000006", "tags"]


def test_tag(run, capsys):
    for argv, told in (
        ((2, "a/b"), "got 'a/b', expected letters"),
        ((2,), "got no step and name"),
        ((3, "x"), "got step 3"),
        (("--delete", "x"), "got 'x'"),
    ):
        assert told in runs.refused(capsys, "ckpt", "tag", run, *argv)
    assert runs.vlp("ckpt", "tag", run, 2, "x") == 0 and runs.vlp("ckpt", "tag", run, 4, "x") == 0
    assert steps.tags(run / "checkpoints") == {"x": 4}
    assert runs.vlp("ckpt", "tag", run, "--delete", "x") == 0
    assert steps.tags(run / "checkpoints") == {}


def test_cp(run, tmp_path, capsys, monkeypatch):
    """The copy is checked before it counts; a damaged source is refused."""
    other = tmp_path / "other"
    assert runs.vlp("ckpt", "cp", run, other, "--step", 4) == 0
    source, copy = (d / "checkpoints" / "step_000000004" for d in (run, other))
    strip = lambda folder: {
        k.removeprefix(str(folder)): v for k, v in runs.contents(folder).items()
    }
    assert strip(source) == strip(copy)
    assert Checkpoints(other / "checkpoints", create=False).newest() == 4
    assert "got a checkpoint" in runs.refused(capsys, "ckpt", "cp", run, other, "--step", 4)

    copied, done = steps.paths.copy, []

    def careless(path, target):
        copied(path, target)
        if path.name == "metadata" and not done:
            done.append(target.write_text(json.dumps({"position": {"step": 7}})))

    monkeypatch.setattr(steps.paths, "copy", careless)
    assert runs.vlp("ckpt", "cp", run, other) == 1
    assert "meta/metadata was changed" in capsys.readouterr().err
    monkeypatch.undo()
    assert Checkpoints(other / "checkpoints", create=False).newest() == 4
    (run / "checkpoints" / "step_000000002" / "meta" / "metadata").unlink()
    assert "got meta/metadata is missing" in runs.refused(
        capsys, "ckpt", "cp", run, tmp_path / "third", "--step", 2
    )


def test_a_folder_that_is_no_run_is_one_line(tmp_path, capsys):
    for action in ("ls", "verify", "rm", "tag", "cp"):
        more = {"tag": (1, "x"), "cp": (tmp_path / "y",), "rm": (1,)}.get(action, ())
        assert "no checkpoints in" in runs.refused(capsys, "ckpt", action, tmp_path / "x", *more)
    assert "gs" in runs.refused(capsys, "ckpt", "ls", "gcs://bucket/run")
