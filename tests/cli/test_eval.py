"""`vlp eval`: the numbers of the run's own last evaluation, as text and as JSON."""

import io
import json
import pathlib
import shutil

import pytest

from helpers import runs


@pytest.fixture(scope="module")
def last(coca_run):
    """What the run's last evaluations gave, by label."""
    rows = [row for row in runs.rows(coca_run) if row["kind"] == "eval"]
    return {row["eval"]: row for row in rows}


def results(file):
    return {(row["eval"], row["metric"]): row["value"] for row in json.loads(file.read_text())}


def test_same_numbers_as_the_run(coca_run, last, tmp_path, capsys):
    """The averaged parameters are evaluated, as in the run."""
    run = shutil.copytree(coca_run, tmp_path / "run")
    before = runs.contents(run)
    assert runs.vlp("eval", "--workdir", run, "--json", tmp_path / "out.json") == 0
    assert runs.contents(run) == before
    found = results(tmp_path / "out.json")
    assert {label for label, _ in found} == set(last) == {"retrieval", "captions"}
    assert found == {(label, metric): last[label][metric] for label, metric in found}
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(found) == 23
    assert lines[0].split() == [
        "retrieval",
        "test",
        "i2t/R@1",
        f"{found['retrieval', 'i2t/R@1']:.4f}",
    ]
    for row in json.loads((tmp_path / "out.json").read_text()):
        assert (row["step"], row["split"], row["num"]) == (9, "test", 21) and row["fingerprint"]
    assert runs.vlp("eval", "--workdir", run, "--evals", "captions", "--write") == 0
    changed = {name for name, data in runs.contents(run).items() if before.get(name) != data}
    assert all("/evals/" in name for name in changed)


def test_evaluation_gives_the_same_numbers_on_another_mesh(coca_run, last, tmp_path):
    """Equal up to rounding. With a label and a split, only that evaluation runs."""
    run = shutil.copytree(coca_run, tmp_path / "run")
    argv = ["eval", "--workdir", run, "--json", tmp_path / "out.json", "--evals"]
    assert runs.vlp(*argv, "captions", devices=8) == 0
    found = results(tmp_path / "out.json")
    for (label, metric), value in found.items():
        assert value == pytest.approx(last[label][metric], rel=1e-5)
    assert runs.vlp(*argv, "captions", "--split", "val", "--write") == 0
    other = results(tmp_path / "out.json")
    assert other.keys() == found.keys() and other != found
    assert json.loads((run / "evals" / "captions_val.json").read_text())["split"] == "val"


def test_an_older_checkpoint_can_be_evaluated(coca_run, tmp_path):
    run = shutil.copytree(coca_run, tmp_path / "run")
    argv = ["eval", "--workdir", run, "--evals", "retrieval", "--json", tmp_path / "out.json"]
    assert runs.vlp(*argv, "--step", 8) == 0
    assert {row["step"] for row in json.loads((tmp_path / "out.json").read_text())} == {8}


def test_mistakes_of_vlp_eval_are_one_line(coca_run, tmp_path, capsys):
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
    for change, message in (
        ("objective.keep_ratio=1.0", "give it to `vlp train`"),
        ("data.text_len=4", "give it to `vlp train`"),
        ("model={}", "give it to `vlp train`"),
        ("data.resize=bilinaer", "did you mean 'bilinear'"),
        ("evals.retrieval.batchh=4", "did you mean 'batch'"),
        ("evals.retrival.batch=4", "did you mean 'retrieval'"),
        ("eval_params=emma", "config.eval_params: got 'emma'"),
        ("evals=3", "a section of evaluators"),
    ):
        assert runs.vlp(*argv, f"--config.{change}") == 2
        captured = capsys.readouterr()
        assert message in captured.err and len(captured.err.splitlines()) == 1, change
    assert runs.contents(coca_run) == before


def test_overrides_change_what_is_evaluated(coca_run, tmp_path):
    """Another batch gives the same numbers; another label, split or average is evaluated as asked."""
    argv = ["eval", "--workdir", coca_run, "--json", tmp_path / "out.json", "--evals"]
    before = runs.contents(coca_run)
    assert runs.vlp(*argv, "retrieval") == 0
    first = results(tmp_path / "out.json")
    assert runs.vlp(*argv, "retrieval", "--config.evals.retrieval.batch=24") == 0
    assert results(tmp_path / "out.json") == pytest.approx(first, rel=1e-5)
    assert runs.vlp(*argv, "retrieval", "--config.data.num_records=13") == 0
    assert {row["num"] for row in json.loads((tmp_path / "out.json").read_text())} == {13}
    shapes = (
        """{"label": "shape", "classes": ("circle", "square"), "templates": ("{}",), "batch": 8}"""
    )
    assert runs.vlp(*argv, "zeroshot", f"--config.evals.zeroshot={shapes}") == 0
    assert runs.vlp(*argv, "captions", "--config.eval_params=student") == 0
    assert runs.contents(coca_run) == before


def test_a_run_can_be_evaluated_from_any_directory(toy, tmp_path, monkeypatch):
    """Relative paths mean what they meant in training; a workdir that cannot be written to, and an objective that is
    not known here, are no hindrance; `--data` names other data."""
    import numpy as np
    from PIL import Image

    from vlp.data import records, tokenizer
    from vlp.infer import load
    from vlp.objectives import OBJECTIVES

    def rows(num):
        for i in range(num):
            image = io.BytesIO()
            Image.fromarray(np.full((20, 20, 3), 9 * i, np.uint8)).save(image, "PNG")
            caption = {"text": f"number {i}", "source": "alt", "lang": "en"}
            yield {"key": str(i), "image": image.getvalue(), "captions": [caption]}

    words = tokenizer.train([f"number {i}" for i in range(30)], vocab_size=64)
    for name, num in (("mine", 9), ("other", 10)):
        splits = {"train": rows(8), "val": rows(num)}
        files = {"tokenizer.model": words.to_bytes()}
        records.write(str(tmp_path / name), splits, name=name, info={}, files=files)
    monkeypatch.chdir(tmp_path)
    data = {"path": "mine", "image_px": 16, "text_len": 8}
    evals = {"retrieval": {"split": "val", "batch": 8}}
    assert runs.train(runs.TOY | {"steps": 2, "data": data, "evals": evals}, tmp_path / "run") == 0
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    monkeypatch.delitem(OBJECTIVES, "toy")
    load._load.cache_clear()
    paths = [tmp_path / "run", *(tmp_path / "run").rglob("*")]
    for path in paths:
        path.chmod(0o555 if path.is_dir() else 0o444)
    argv = ["eval", "--workdir", tmp_path / "run", "--json", "out.json"]
    for extra, num in (
        ([], 9),
        (["--data", "../other"], 10),
        ([f"--config.data.path={tmp_path / 'other'}"], 10),
    ):
        assert runs.vlp(*argv, *extra) == 0
        assert {row["num"] for row in json.loads(pathlib.Path("out.json").read_text())} == {num}
    for path in paths:
        path.chmod(0o755)


def labelled(num, *tones):
    """num records of one colour, whose field `tone` goes round."""
    from PIL import Image

    for i in range(num):
        image = io.BytesIO()
        Image.new("RGB", (20, 20), (9 * i % 250, 40, 90)).save(image, "PNG")
        caption = {"text": f"number {i}", "source": "alt", "lang": "en"}
        tone = tones[i % len(tones)]
        yield {
            "key": f"{tone}{i}",
            "image": image.getvalue(),
            "captions": [caption],
            "tone": tone,
        }


@pytest.fixture(scope="module")
def toned(tmp_path_factory):
    """A run whose zero-shot evaluation reads two splits, of data whose val has one class alone."""
    from vlp.data import records, tokenizer

    runs.register_toy()
    root = tmp_path_factory.mktemp("toned")
    words = tokenizer.train([f"number {i}" for i in range(30)], vocab_size=64)
    splits = {"train": labelled(8, "dark"), "val": labelled(9, "dark")}
    splits |= {"test": labelled(10, "light", "dark"), "test_variants": labelled(6, "light", "dark")}
    files = {"tokenizer.model": words.to_bytes()}
    records.write(str(root / "data"), splits, name="toned", info={}, files=files)
    data = {"path": str(root / "data"), "image_px": 16, "text_len": 8}
    tone = {"name": "zeroshot", "label": "tone", "classes": ["light", "dark"], "batch": 8}
    tone |= {"split": "test_variants", "extra_splits": ["test"], "templates": ["{}"]}
    evals = {"retrieval": {"split": "test", "batch": 8}, "tone": tone}
    assert runs.train(runs.TOY | {"steps": 2, "data": data, "evals": evals}, root / "run") == 0
    return root / "run"


def test_a_split_that_one_evaluator_cannot_read(toned, toy, tmp_path, capsys):
    """It is skipped in one line that says why; asked for by name, or with no other, it is an error."""
    out = tmp_path / "out.json"
    argv = ["eval", "--workdir", toned, "--json", out]
    capsys.readouterr()
    assert runs.vlp(*argv, "--split", "val") == 0
    (skipped,) = (
        row
        for row in capsys.readouterr().out.splitlines()
        if row.startswith("tone") and "skip" in row
    )
    assert "'val'" in skipped and "no record of ['light']" in skipped
    rows = json.loads(out.read_text())
    assert {(row["eval"], row["split"], row["num"]) for row in rows} == {("retrieval", "val", 9)}
    for named in (
        ["--evals", "tone"],
        ["--config.evals.tone.batch=4"],
        ["--evals", "retrieval,tone"],
    ):
        assert runs.vlp(*argv, "--split", "val", *named) == 2
        captured = capsys.readouterr()
        assert "no record of ['light'] in ['val']" in captured.err and not captured.out
    assert runs.vlp(*argv, "--split", "vla") == 2  # none can be done: a mistake, and no skipping
    captured = capsys.readouterr()
    assert "did you mean 'val'" in captured.err and not captured.out


def test_a_split_is_all_that_is_read(toned, toy, tmp_path):
    """--split names the records that count: further splits of an evaluator are not added to it."""
    out = tmp_path / "out.json"
    argv = ["eval", "--workdir", toned, "--json", out, "--evals", "tone"]
    for extra, split, num in (
        ([], "test_variants+test", 16),
        (["--split", "test"], "test", 10),
        (["--split", "test_variants"], "test_variants", 6),
    ):
        assert runs.vlp(*argv, *extra) == 0
        assert {(r["split"], r["num"]) for r in json.loads(out.read_text())} == {(split, num)}


def test_one_config_evaluates_a_checkpoint_on_other_datasets(
    toned, toy, tmp_path, capsys, monkeypatch
):
    """`--evals FILE.py:ARG`: an evaluator has data of its own; preprocessing is the checkpoint's; a line a result."""
    import hashlib

    from vlp.data import records

    monkeypatch.chdir(tmp_path)
    for name, num in (("one", 11), ("two", 13)):
        splits = {"test": labelled(num, "light", "dark")}
        records.write(str(tmp_path / name), splits, name=name, info={})
    pathlib.Path("suite.py").write_text(
        "def get_config(arg):\n"
        "    data = lambda name: dict(path=f'{arg}/{name}')\n"
        "    tone = dict(name='zeroshot', label='tone', classes=['light', 'dark'], batch=8)\n"
        "    return {'one': dict(name='retrieval', batch=8, data=data('one')),\n"
        "            'two': dict(tone, data=data('two'))}\n"
    )
    before = runs.contents(toned)
    argv = ["eval", "--workdir", toned, "--evals", "suite.py:."]
    assert runs.vlp(*argv, "--json", "out.jsonl") == 0
    rows = [json.loads(line) for line in pathlib.Path("out.jsonl").read_text().splitlines()]
    assert {(r["eval"], r["num"]) for r in rows} == {("one", 11), ("two", 13)}
    for row in rows:
        assert (
            row["preprocessing"] == "exact crop, bicubic, 16 px, 8 tokens"
            and row["dtype"] == "float32"
        )
        assert len(row["checkpoint"]) == 16 and row["fingerprint"]
    (templates,) = {r["templates"] for r in rows if r["eval"] == "two"}
    assert templates == hashlib.sha256(b"a photo of a {}.\n").hexdigest()[:16]
    assert runs.contents(toned) == before
    assert runs.vlp(*argv, "--json", "all.json", "--config.evals.two.batch=4") == 0
    assert [dict(r) for r in json.loads(pathlib.Path("all.json").read_text())] == rows
    capsys.readouterr()
    for evals, message in (
        ("suite.py:nowhere", "nowhere/one"),
        ("siute.py:.", "did you mean 'suite.py'?"),
    ):
        assert runs.vlp("eval", "--workdir", toned, "--evals", evals) == 2
        captured = capsys.readouterr()
        assert message in captured.err and len(captured.err.splitlines()) == 1


def test_a_run_evaluates_on_data_of_an_evaluators_own(toy, tmp_path, monkeypatch):
    """The same numbers in training and afterwards, from another directory: relative paths mean what they meant."""
    from vlp.data import records, tokenizer

    words = tokenizer.train([f"number {i}" for i in range(30)], vocab_size=64)
    files = {"tokenizer.model": words.to_bytes()}
    splits = {"train": labelled(8, "dark")}
    records.write(str(tmp_path / "mine"), splits, name="m", info={}, files=files)
    records.write(str(tmp_path / "other"), {"val": labelled(9, "dark")}, name="o", info={})
    monkeypatch.chdir(tmp_path)
    data = {"path": "mine", "image_px": 16, "text_len": 8}
    evals = {"far": {"name": "retrieval", "split": "val", "batch": 8, "data": {"path": "other"}}}
    assert runs.train(runs.TOY | {"steps": 2, "data": data, "evals": evals}, tmp_path / "run") == 0
    (last,) = (row for row in runs.rows(tmp_path / "run") if row["kind"] == "eval")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert runs.vlp("eval", "--workdir", tmp_path / "run", "--json", "out.json") == 0
    found = results(pathlib.Path("out.json"))
    assert found == {(label, metric): last[metric] for label, metric in found}
    assert last["num"] == 9
