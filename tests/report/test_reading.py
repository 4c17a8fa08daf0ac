"""A workdir may hold damaged rows, links, pipes, huge files and hostile values: the report leaves them out."""

import json
import os
import time

import pytest

from helpers import fake_run
from helpers.fake_run import train_row
from vlp.cli import main as cli
from vlp.core import check
from vlp.report import html, load


def _run(path, *lines):
    path.mkdir(exist_ok=True)
    text = "".join((x if isinstance(x, str) else json.dumps(x)) + "\n" for x in lines)
    (path / "metrics.jsonl").write_text(text)
    return load.load(path)


@pytest.mark.parametrize(
    "damaged",
    [
        '{"step": 2}',
        '{"kind": "train", "step": 2, "samples": 16, "stage": "main"}',
        '{"kind": "train", "step": 2, "samples": 16, "stage": "main", "loss": "garbage"}',
        '{"kind": "train", "step": 2, "samples": 16, "stage": "main", "loss": [1]}',
        '{"kind": "train", "step": 2, "samples": 16, "stage": 3, "loss": 9}',
        '{"kind": "train", "step": 2, "samples": -16, "stage": "main", "loss": 9}',
        '{"kind": "train", "step": 2, "samples": "16", "stage": "main", "loss": 9}',
        '{"kind": "train", "step": 2.7, "samples": 16, "stage": "main", "loss": 9}',
        '{"kind": "train", "step": "2", "samples": 16, "stage": "main", "loss": 9}',
        '{"kind": "trai", "step": 2, "samples": 16, "stage": "main", "loss": 9}',
    ],
)
def test_a_damaged_row_does_not_hide_an_older_good_one(tmp_path, damaged):
    run = _run(
        tmp_path / "r",
        train_row(1, loss=3.0),
        train_row(2, loss=2.0),
        damaged,
        train_row(3, loss=1),
    )
    assert [(row.step, row.values["loss"]) for row in run.train] == [(1, 3.0), (2, 2.0), (3, 1.0)]
    assert len(run.notes) == 1 and "1 of 4" in run.notes[0]


def test_a_damaged_row_of_an_evaluation_does_not_hide_an_older_good_one(tmp_path):
    good = {"kind": "eval", "step": 2, "samples": 16, "eval": "x", "split": "test", "top1": 0.5}
    run = _run(tmp_path / "r", good, good | {"top1": "0,5"}, good | {"step": 3, "note": "text"})
    assert [(row.step, row.values["top1"]) for row in run.evals] == [(2, 0.5), (3, 0.5)]


def test_what_a_damaged_row_still_says_is_shown_where_there_is_no_better(tmp_path):
    run = _run(tmp_path / "r", train_row(1, loss=2.0, lr="garbage"))
    assert run.train[0].values == {"loss": 2.0} and len(run.notes) == 1


@pytest.mark.parametrize("name", ["evals/secret.json", "evals", "config.json", "versions.json"])
def test_a_link_to_outside_the_workdir_is_not_read(tmp_path, name):
    run = fake_run.write(tmp_path / "run", num_rows=4, artefacts=False)
    outside = tmp_path / "outside"
    outside.mkdir()
    secret = {"kind": "captions", "name": "SECRET", "items": [{"caption": "SECRET"}]}
    (outside / "secret.json").write_text(json.dumps(secret))
    (run / name).unlink(missing_ok=True)
    (run / "evals").mkdir(exist_ok=True) if name.startswith("evals/") else None
    (run / name).symlink_to(outside if name == "evals" else outside / "secret.json")
    text = html.write(run).read_text()
    assert "SECRET" not in text
    assert "a link to outside the workdir" in text


def test_links_within_the_workdir_and_to_it_are_followed(tmp_path):
    run = fake_run.write(tmp_path / "run", num_rows=4)
    (run / "evals" / "retrieval_test.json").rename(run / "kept.json")
    (run / "evals" / "retrieval_test.json").symlink_to("../kept.json")
    (tmp_path / "link").symlink_to(run)
    found = load.load(tmp_path / "link")
    assert "retrieval_test" in found.artefacts and not found.notes


def test_a_record_of_metrics_outside_the_workdir_is_refused(tmp_path):
    run = fake_run.write(tmp_path / "run", num_rows=4)
    (run / "metrics.jsonl").rename(tmp_path / "metrics.jsonl")
    (run / "metrics.jsonl").symlink_to(tmp_path / "metrics.jsonl")
    with pytest.raises(check.UserError, match="a link to outside the workdir"):
        load.load(run)


def test_pipes_and_folders_are_not_read(tmp_path):
    run = fake_run.write(tmp_path / "run", num_rows=4)
    os.mkfifo(run / "evals" / "pipe.json")
    (run / "config.json").unlink()
    (run / "config.json").mkdir()
    found = load.load(run)
    assert [note.split(":")[0] for note in found.notes] == ["config.json", "evals/pipe.json"]
    (run / "metrics.jsonl").unlink()
    os.mkfifo(run / "metrics.jsonl")
    with pytest.raises(check.UserError, match="not a regular file"):
        load.load(run)


def test_files_over_their_size_cost_one_line(tmp_path):
    """Sparse files: nothing of them may be read."""
    run = fake_run.write(tmp_path / "run", num_rows=4)
    for name in ("config.json", "evals/captions_test.json"):
        os.truncate(run / name, 2 << 30)
    began = time.monotonic()
    notes = load.load(run).notes
    assert [note.split(":")[0] for note in notes] == ["config.json", "evals/captions_test.json"]
    assert all("2.15G bytes" in note for note in notes)
    os.truncate(run / "metrics.jsonl", 2 << 30)
    with pytest.raises(check.UserError, match="2.15G bytes") as caught:
        load.load(run)
    assert "\n" not in str(caught.value)
    assert time.monotonic() - began < 2


def test_many_artefacts_are_cut(tmp_path):
    run = fake_run.write(tmp_path / "run", num_rows=4)
    for i in range(300):
        (run / "evals" / f"x{i:03}.json").write_text('{"kind": "captions", "items": []}')
    found = load.load(run)
    assert len(found.artefacts) <= 100
    assert len(found.notes) == 1 and "evals" in found.notes[0]


def test_a_line_without_end_and_keys_without_number_are_cut(tmp_path):
    many = {f"k{i}": i for i in range(600)}
    long = '{"kind": "train", "step": 2, "stage": "' + "x" * (2 << 20) + '"}'
    run = _run(tmp_path / "r", train_row(1, loss=2.0), long, train_row(3, loss=1.0, **many))
    assert [row.step for row in run.train] == [1, 3]
    assert run.train[1].values["loss"] == 1.0 and len(run.train[1].values) <= 500
    assert any("1 of 3" in note for note in run.notes) and len(run.notes) == 2
    assert len(html.page(run)) < 3_000_000


DEEP = "[" * 900 + "]" * 900


@pytest.mark.parametrize(
    "artefact",
    [
        {"kind": "zeroshot", "classes": ["a"], "confusion": [["x"]]},
        {"kind": "zeroshot", "classes": ["a", "b"], "confusion": [[1], [2, 3]]},
        {"kind": "zeroshot", "classes": ["a"], "confusion": [3]},
        {"kind": "zeroshot", "classes": ["a"], "confusion": [[10**400]]},
        {"kind": "zeroshot", "classes": ["a"], "confusion": [[None]]},
        {"kind": "retrieval", "step": 10**400, "similarity": [[10**400]], "queries": [
            {"rank_i2t": 10**400, "top_texts": [{"score": 10**400}, {"score": None}] * 5000}]},
        {"kind": "retrieval", "queries": [{"caption": {"a": 1}, "top_texts": "x" * 10}]},
        {"kind": "captions", "step": True, "items": [{"caption": "a b " * 100_000, "generated": "b c " * 100_000}]},
        {"kind": ["captions"]},
        {"kind": "captions", "items": json.loads(DEEP)},
    ],
)  # fmt: skip
def test_artefacts_of_any_shape_make_a_page(tmp_path, artefact):
    run = fake_run.write(tmp_path / "run", num_rows=4, artefacts=False)
    (run / "evals").mkdir()
    (run / "evals" / "x.json").write_text(json.dumps(artefact))
    began = time.monotonic()
    assert len(html.write(run).read_text()) < 500_000
    assert time.monotonic() - began < 2


@pytest.mark.parametrize(
    "values", [(1e308, -1e308, 1e308), (5e-324, 1e-323, 5e-324), (10**400, 1, -(10**400)), (1e15, 1e15 + 1, 1e15 + 2)]
)  # fmt: skip
def test_numbers_at_the_ends_of_floats_make_a_page(tmp_path, values):
    rows = [train_row(i, loss=v, **{"time/elapsed_s": v}) for i, v in enumerate(values, 1)]
    evals = [
        {"kind": "eval", "step": i, "eval": "e", "i2t/R@1": v, "num": v, "median_rank": v}
        for i, v in enumerate(values, 1)
    ]
    html.page(_run(tmp_path / "r", *rows, *evals))
    huge = [train_row(2**70 + i, loss=1.0) for i in range(3)]
    with pytest.raises(check.UserError, match="no readable row"):
        _run(tmp_path / "s", *huge)


def test_a_config_that_nests_without_end_is_left_out(tmp_path):
    run = fake_run.write(tmp_path / "run", num_rows=4)
    (run / "config.json").write_text('{"a": ' + DEEP + "}")
    assert "config.json" in html.page(load.load(run))


def test_the_report_never_replaces_a_file_that_is_none(tmp_path, capsys):
    run = fake_run.write(tmp_path / "run", num_rows=4)
    before = (run / "metrics.jsonl").read_bytes()
    for args in ([run], [run, run]):
        assert cli.main(["report", *map(str, args), "--out", str(run / "metrics.jsonl")]) == 2
        assert capsys.readouterr().err.count("\n") == 1
    assert (run / "metrics.jsonl").read_bytes() == before


CONTROLS = "\x1b[31mred\x1b]0;title\x07 \x00\x08\x7f\x9b31m \u202egnp.exe\u2066 \ud800"


def test_control_characters_are_shown_harmlessly(tmp_path):
    run = fake_run.write(tmp_path / "run", num_rows=4)
    config = {"name": CONTROLS, CONTROLS: CONTROLS, "attribution": CONTROLS}
    (run / "config.json").write_text(json.dumps(config))
    item = {"caption": CONTROLS, "generated": CONTROLS + "x", "key": CONTROLS}
    (run / "evals" / "c.json").write_text(json.dumps({"kind": "captions", "items": [item]}))
    pages = html.write(run), html.write_comparison([run, run], tmp_path / "c.html")
    for text in (page.read_text() for page in pages):
        assert not set(text) & set("\x00\x07\x08\x1b\x7f\x9b\u202e\u2066")
        assert "␛[31mred" in text
