"""Every output of every command is checked before anything is read or computed for it."""

import argparse
import importlib

import pytest

from helpers import runs
from vlp.cli import main
from vlp.core import check

# The option of each output, and a command whose inputs do not exist: an answer about them would come too late.
OUTPUTS = {
    "eval --json": "eval --workdir nowhere --json {}",
    "plan --json": "plan --config nowhere.py --json {}",
    "report --out": "report nowhere --out {}",
    "import --out": "ckpt import nowhere --out {}",
    "export --out": "ckpt export nowhere --to open_clip --out {}",
    "average --out": "average nowhere nowhere --out {}",
    "train --workdir": "train --config configs/clip.py:size=B/32,smoke --workdir {}",
    "emoji --out": "data emoji --out {}",
    "convert --out": "data convert nowhere.csv --out {}",
    "verify --quarantine": "data verify nowhere --quarantine {}",
    "inspect --html": "data inspect nowhere --html {}",
    "filter --out": "data filter nowhere --out {}",
    "tokenizer --out": "data tokenizer nowhere --out {}",
}
NEW = ("average --out", "verify --quarantine", "inspect --html", "tokenizer --out")


@pytest.fixture
def nowhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").symlink_to(runs.ROOT / "configs")
    (tmp_path / "file").write_text("text")


@pytest.mark.parametrize("place", ["/proc/none/out", "file/out", "x" * 300, "file/a/b"])
@pytest.mark.parametrize("output", OUTPUTS)
def test_a_place_that_cannot_be_written(output, place, nowhere, capsys):
    assert runs.vlp(*OUTPUTS[output].format(place).split()) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert place in line and "expected" in line and "nowhere" not in line, line


@pytest.mark.parametrize("output", NEW)
def test_what_is_there_is_not_overwritten(output, nowhere, capsys):
    assert runs.vlp(*OUTPUTS[output].format("file").split()) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "file" in line and "new" in line and "nowhere" not in line, line
    assert open("file").read() == "text"


def test_every_output_is_tried():
    """An option whose value is a file or a directory to write is in the table above."""
    parser = argparse.ArgumentParser()
    commands = parser.add_subparsers()
    for name in main.COMMANDS:
        importlib.import_module(f"vlp.cli.{name}").add_parser(commands)
    found = set()

    def look(parsers):
        for name, inner in parsers.items():
            for action in inner._actions:
                if isinstance(action, argparse._SubParsersAction):
                    look(action.choices)
                elif action.dest in ("out", "json", "html", "quarantine") and action.nargs != 0:
                    found.add(f"{name} --{action.dest}")

    look(commands.choices)
    assert found == set(OUTPUTS) - {"train --workdir"}


def test_checking_leaves_no_trace(tmp_path):
    kept = tmp_path / "rows.json"
    kept.write_text("old")
    check.output_file("--json", kept)
    check.output_file("--json", tmp_path / "new.json")
    check.output_file("--json", "/dev/null")
    check.output_dir("--out", tmp_path / "a" / "b")
    assert kept.read_text() == "old" and list(tmp_path.iterdir()) == [kept]


def test_galleries(coca_run, monkeypatch, capsys):
    """`vlp eval --write` of a workdir that cannot be written."""
    from vlp.infer import load

    refuse = check.error("--write", "'run/evals'", "a place", "choose another")
    seen = []
    monkeypatch.setattr(check, "output_dir", lambda *where: seen.append(where) or _raise(refuse))
    monkeypatch.setattr(load, "load", lambda *_: pytest.fail("too late"))
    assert runs.vlp("eval", "--workdir", coca_run, "--write") == 2
    assert seen == [("--write", coca_run / "evals")]


def _raise(e):
    raise e
