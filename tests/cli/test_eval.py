"""`vlp eval`: the numbers of the run's own last evaluation, as text and as JSON."""

import json
import shutil

import pytest
import runs


@pytest.fixture(scope="module")
def last(coca_run):
    """What the run's last evaluations gave, by label."""
    rows = [row for row in runs.rows(coca_run) if row["kind"] == "eval"]
    return {row["eval"]: row for row in rows}


def results(file):
    return {(row["eval"], row["metric"]): row["value"] for row in json.loads(file.read_text())}


def test_same_numbers_as_the_run(coca_run, last, tmp_path, capsys):
    """Of the averaged parameters, since the run evaluates those."""
    run = shutil.copytree(coca_run, tmp_path / "run")
    before = runs.contents(run)
    assert runs.vlp("eval", "--workdir", run, "--json", tmp_path / "out.json") == 0
    found = results(tmp_path / "out.json")
    assert {label for label, _ in found} == set(last) == {"retrieval", "captions"}
    assert found == {(label, metric): last[label][metric] for label, metric in found}
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(found) == 12
    assert lines[0].split() == [
        "retrieval",
        "test",
        "i2t/R@1",
        f"{found['retrieval', 'i2t/R@1']:.4f}",
    ]
    for row in json.loads((tmp_path / "out.json").read_text()):
        assert (row["step"], row["split"], row["num"]) == (9, "test", 21) and row["fingerprint"]
    changed = {name for name, data in runs.contents(run).items() if before.get(name) != data}
    assert all("/evals/" in name for name in changed)


def test_eight_devices(coca_run, last, tmp_path):
    """On a mesh of another size, the same up to rounding; with one label and another split, only that."""
    run = shutil.copytree(coca_run, tmp_path / "run")
    argv = ["eval", "--workdir", run, "--json", tmp_path / "out.json", "--evals"]
    assert runs.vlp(*argv, "captions", devices=8) == 0
    found = results(tmp_path / "out.json")
    for (label, metric), value in found.items():
        assert value == pytest.approx(last[label][metric], rel=1e-5)
    assert runs.vlp(*argv, "captions", "--split", "val") == 0
    other = results(tmp_path / "out.json")
    assert other.keys() == found.keys() and other != found
    assert json.loads((run / "evals" / "captions_val.json").read_text())["split"] == "val"


def test_an_older_step(coca_run, tmp_path):
    run = shutil.copytree(coca_run, tmp_path / "run")
    argv = ["eval", "--workdir", run, "--evals", "retrieval", "--json", tmp_path / "out.json"]
    assert runs.vlp(*argv, "--step", 8) == 0
    assert {row["step"] for row in json.loads((tmp_path / "out.json").read_text())} == {8}


def test_refused(coca_run, tmp_path, capsys):
    argv = ["eval", "--workdir", coca_run]
    before = runs.contents(coca_run)
    for extra, message in (
        (["--split", "tset"], "did you mean 'test'"),
        (["--json", tmp_path / "none" / "out.json"], "--json: got "),
        (["--evals", "retrieval,captoins"], "did you mean 'captions'"),
    ):
        assert runs.vlp(*argv, *extra) == 2
        captured = capsys.readouterr()
        assert message in captured.err and not captured.out
    with pytest.raises(SystemExit):  # overrides are for configs; here they would do nothing
        runs.vlp(*argv, "--config.evals.retrieval.batch=4")
    assert runs.contents(coca_run) == before
