"""Every mistake of a user: exit code 2, one line that says what to do, nothing written, nothing trained."""

import shutil

import pytest
from PIL import Image

from helpers import runs
from helpers.runs import CLIP, COCA, changed
from vlp.train import loop


def refused(capsys, *argv, devices=1):
    line = runs.refused(capsys, *argv, devices=devices)
    assert line.startswith("vlp: ") and "got " in line and ", expected " in line and "; " in line
    return line


@pytest.fixture(autouse=True)
def no_training(monkeypatch):
    def fail(*args):
        raise AssertionError("got as far as training")

    monkeypatch.setattr(loop, "open_session", fail)


def zeroshot(**changes):
    """Patch: a zero-shot evaluation of two shapes."""
    section = {"label": "shape", "classes": ["circle", "square"], "batch": 8}
    return {"evals": {"zeroshot": section | changes}}


MISTAKES = {
    "top key": ({"batchh": 8}, "did you mean 'batch'"),
    "nested key": ({"optim.weight_decy": 0.1}, "did you mean 'weight_decay'"),
    "model key": ({"model.image_tower.widht": 8}, "did you mean 'width'"),
    "stage key": ({"stages": [{"stepps": 3}]}, "did you mean 'steps'"),
    "type": ({"optim.b1": "big"}, "config.optim.b1: got 'big', expected float"),
    "objective": ({"objective.name": "cilp"}, "did you mean 'clip'"),
    "objective key": ({"objective.keep_rati": 0.5}, "did you mean 'keep_ratio'"),
    "keep_ratio": ({"objective.keep_ratio": 1.5}, "got 1.5"),
    "evaluator": ({"evals": {"retrieval": {"splitt": "val"}}}, "did you mean 'split'"),
    "eval split": ({"evals": {"retrieval": {"split": "tset", "batch": 8}}}, "test"),
    "two lengths": ({"samples": 80}, "steps=4, samples=80"),
    "no length": ({"steps": 0}, "steps=0, samples=0"),
    "warm-up": ({"schedule.warmup_steps": 2}, "one warm-up"),
    "patch": ({"model.image_tower.patch": 7}, "a multiple of model.image.patch = 7"),
    "vocabulary": ({"model.text_tower.vocab": 100}, "the tokenizer's 128 or more"),
    "micro-batches": ({"micro_batches": 3}, "multiple of 3"),
    "no micro-batches": ({"micro_batches": 0}, "config.micro_batches: got 0, expected 1 or more"),
    "mesh": ({"mesh": {"data": 3}}, "product of 1 devices"),
    "operations per image": ({"data.randaugment": 2**31}, "in 0 … 100"),
    "platform": ({"platform": "tpu"}, "got cpu devices, expected tpu"),
    "no decoder": ({"objective.name": "coca"}, "config.model.decoder"),
    "captions of a dual encoder": ({"evals": {"captions": {"batch": 8}}}, "config.model.decoder"),
    "rule without leaf": ({"optim.rules": [{"match": "imge.*"}, {"match": ".*"}]}, "imge"),
    "uncovered leaf": ({"optim.rules": [{"match": "image_tower.*"}]}, "a rule for every"),
    "source": ({"data.source": "shaps"}, "did you mean 'shapes'"),
    "size below 1": ({"model.embed": -1}, "config.model.embed: got -1, expected at least 0"),
    "dtype": ({"model.image_tower.dtype": "float99"}, "got 'float99', expected one of"),
    "gradient ascent": ({"optim.rules": [{"match": ".*", "lr": -3.0}]}, "rules.lr: got -3.0"),
    "clamp": ({"optim.rules": [{"match": ".*", "clamp": [4.0, 1.0]}]}, "expected (low, high)"),
    "layer decay": ({"optim.rules": [{"match": ".*", "layer_decay": 5.0}]}, "in (0, 1]"),
    "pattern": ({"optim.rules": [{"match": "("}]}, "expected a regular expression"),
    "all frozen": ({"optim.rules": [{"match": ".*", "freeze": True}]}, "every parameter frozen"),
    "rules in words": ({"optim.rules": "[dict(match=1)]"}, "write only literals"),
    "scale": ({"model.scale": -5.0}, "config.model.scale: got -5.0"),
    "dropout": (
        {"model.image_tower.dropout": 1.5},
        "image_tower.dropout: got 1.5, expected in [0, 1)",
    ),
    "registers": ({"model.image_tower.registers": -1}, "registers: got -1, expected at least 0"),
    "mean": ({"model.image_tower.mean": [0.5]}, "a number of each colour"),
    "nothing left": (
        {"batch": 1, "objective.leave_one_out": True},
        "config.batch: got 1, expected 2",
    ),
    "no bias": ({"objective": {"name": "siglip"}}, "set config.model.scale=10.0"),
    "decay of an average": ({"teachers": {"ema": {"decay": 1.5}}}, "expected in [0, 1), None"),
    "average without decay": (
        {"teachers": {"ema": {}}, "eval_params": "ema"},
        "one of ['student']",
    ),
    "init_match alone": ({"init_match": "image_tower/.*"}, "expected config.init"),
    "init_match": ({"init_match": "("}, "config.init_match: got '(', expected a regular"),
    "num_captions": ({"data.num_captions": 3}, "expected 1, but for captions 'all'"),
    "weights of no sources": ({"data.captions": "weighted"}, "caption_sources"),
    "every_steps": (
        {"evals": {"retrieval": {"every_steps": -1, "batch": 8}}},
        "every_steps: got -1",
    ),
    "gallery": ({"evals": {"retrieval": {"gallery": -5, "batch": 8}}}, "gallery: got -5"),
    "the same split twice": (zeroshot(extra_splits=["test"]), "splits that differ"),
    "prompts that are cut": (
        zeroshot(
            phrases=[
                "one two three four five six seven eight circle",
                "one two three four five six seven",
            ]
        ),
        "the same tokens for 'circle' and 'square'",
    ),
    "items": (zeroshot(items=-1), "items: got -1, expected at least 0"),
    "a name for a section": ({"objective": "clip"}, "write config.objective.name=clip"),
    "a word for a model": ({"model": "two_tower"}, "write config.model.name=two_tower"),
    "no evaluators": ({"evals": None}, "config.evals: got None, expected a section of evaluators"),
    "a number for stages": ({"stages": 3}, "config.stages: got 3, expected a list of dicts"),
    "a list for a section": ({"objective": ["clip"]}, "got ['clip'], expected a section"),
    "a list for a name": ({"objective.name": ["clip"]}, "config.objective.name: got"),
    "nan": ({"schedule.lr": float("nan")}, "config.schedule.lr: got nan, expected a number"),
    "too deep": ({"model.image_tower.depth": 2**31}, "expected at most 1,024"),
    "too large": ({"data.image_px": 2**31}, "expected at most 16,384"),
    "batch": ({"batch": 2**31}, "expected at most 67,108,864"),
    "hang_secs": ({"hang_secs": -1.0}, "config.hang_secs: got -1.0, expected at least 0"),
    "no such data": ({"data": {"path": "/nowhere", "image_px": 16}}, "/nowhere"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_in_a_config_are_one_line(mistake, tmp_path, capsys):
    changes, message = MISTAKES[mistake]
    argv = runs.arguments(changed(CLIP, **changes), tmp_path / "run")
    before = runs.contents(tmp_path)
    assert message in refused(capsys, *argv)
    assert runs.contents(tmp_path) == before


def test_a_batch_that_the_mesh_does_not_divide_is_one_line(tmp_path, capsys):
    argv = runs.arguments(changed(CLIP, batch=12), tmp_path / "run")
    line = refused(capsys, *argv, devices=8)
    assert "config.batch: got 12, expected a multiple of data×fsdp = 8" in line
    evals = {"retrieval": {"batch": 12}}
    argv = runs.arguments(changed(CLIP, evals=evals), tmp_path / "run")
    assert "got 12" in refused(capsys, *argv, devices=8)


def test_mistakes_in_overrides_are_one_line(tmp_path, capsys):
    argv = runs.arguments(CLIP, tmp_path / "run")
    assert "'stepps'" in refused(capsys, *argv, "--config.stepps=3")
    assert "optmi" in refused(capsys, *argv, "--config.optmi.b1=0.5")
    argv = ["train", "--config", tmp_path / "none.py", "--workdir", tmp_path / "run"]
    assert "none.py" in refused(capsys, *argv)
    argv = ["plan", "--config", f"{runs.ROOT / 'configs' / 'coca.py'}:szie=base"]
    assert "did you mean 'size'" in refused(capsys, *argv)


FILES = {
    "it raises": ("def get_config(arg):\n    raise KeyError('x')\n", "got KeyError ('x') in line 2"),
    "it returns nothing": ("def get_config(arg):\n    pass\n", "got None from get_config"),
    "no Python": ("syntax error here\n", "got SyntaxError (invalid syntax"),
    "an import": ("import nosuch\n", "got no module 'nosuch' in line 1"),
    "no function": ("get_config = 3\n", "got get_config = 3, expected def get_config(arg)"),
    "no argument": ("def get_config():\n    return {}\n", "the argument 'x' for get_config()"),
}  # fmt: skip


@pytest.mark.parametrize("mistake", FILES)
def test_mistakes_in_config_files_are_one_line(mistake, tmp_path, capsys):
    text, message = FILES[mistake]
    (tmp_path / "c.py").write_text(text)
    argv = ["train", "--config", f"{tmp_path / 'c.py'}:x", "--workdir", tmp_path / "run"]
    assert message in refused(capsys, *argv)


def test_a_function_without_an_argument(tmp_path):
    (tmp_path / "c.conf").write_text(f"def get_config():\n    return {runs.CLIP!r}\n")
    assert runs.vlp("plan", "--config", tmp_path / "c.conf") == 0


def test_mistakes_on_the_command_line_are_one_line(tmp_path, capsys):
    config = ("--config", f"{runs.ROOT / 'configs' / 'clip.py'}:smoke")
    run = ("train", *config, "--workdir", tmp_path / "run")
    assert "expected --config.batch=64" in refused(capsys, *run, "--config.batch", "64")
    assert "an empty name" in refused(capsys, *run, "--config..batch=3")
    assert "--mfu: got '--'" in refused(capsys, "plan", *config, "--mfu=--")
    assert "a\\nb" in refused(capsys, "train", "--config", "a\nb", "--workdir", tmp_path / "run")
    assert "--devices: got 100000000" in refused(capsys, "plan", *config, "--devices", 10**8)
    assert "--gpu: got" in refused(capsys, "plan", *config, "--gpu", "H100:100000000")
    for argv in ([], ["plan"], ["plan", "--confg=x"], ["trian"], ["eval", "--workdir"]):
        assert runs.vlp(*argv) == 2
        assert len(capsys.readouterr().err.splitlines()) == 1, argv


@pytest.mark.parametrize("argv", [
    ["train", "--config.objective.nan_step"], ["data", "emoji", "--vocab-size"], ["data", "bench", "d", "--workers"],
    ["data", "tokenizer", "d", "--vocab-size"], ["data", "convert", "photos", "--tokenizer"],
    ["data", "filter", "photos", "--max-words"], ["data", "filter", "photos", "--min-side-px"],
    ["data", "filter", "photos", "--num-frequent"],
    ["plan", "--slices"], ["eval", "--workdir", "photos", "--step"], ["train", "--processes"],
])  # fmt: skip
def test_numbers_that_no_machine_holds_are_refused(tmp_path, capsys, argv):
    """A number of thirty digits, in each place that takes a number."""
    (tmp_path / "photos").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "photos" / "a.png")
    (tmp_path / "photos" / "a.txt").write_text("a dog")
    argv = [str(tmp_path / a) if a == "photos" else a for a in argv]
    if argv[0] in ("train", "plan"):
        toy = runs.arguments(runs.TOY, tmp_path / "run")
        argv[1:1] = toy[1:] if argv[0] == "train" else toy[1:-2]
    if argv[0] == "data" and argv[1] != "bench":
        argv[2:2] = ["--out", str(tmp_path / "out")]
    argv[-1] += f"={10**30}"
    refused(capsys, *argv)


def test_a_plan_refuses_what_training_refuses(tmp_path, capsys):
    for name in (
        "keep_ratio",
        "captions of a dual encoder",
        "rule without leaf",
        "no bias",
        "resize",
    ):
        changes = MISTAKES[name][0] if name in MISTAKES else {"data.resize": "bilinaer"}
        argv = runs.arguments(changed(CLIP, **changes), tmp_path / "run")
        message = MISTAKES[name][1] if name in MISTAKES else "did you mean 'bilinear'"
        assert message in refused(capsys, "plan", *argv[1:-2]), name


def test_a_workdir_of_another_run_is_refused(tmp_path, capsys):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.txt").write_text("mine")
    argv = runs.arguments(CLIP, tmp_path / "run")
    before = runs.contents(tmp_path)
    assert "a directory with other files" in refused(capsys, *argv)
    assert runs.contents(tmp_path) == before


def test_workdir_of_another_config(clip_run, tmp_path, capsys):
    directory = tmp_path / "run"
    shutil.copytree(clip_run, directory)
    argv = runs.arguments(changed(CLIP, **{"schedule.lr": 0.5}), directory)
    before = runs.contents(directory)
    assert "schedule.lr: 0.01 -> 0.5" in refused(capsys, *argv)
    assert runs.contents(directory) == before


def test_mistakes_of_a_later_stage_are_told_before_the_first(tmp_path, capsys):
    """What would only go wrong in the second stage is told before the first."""
    config = changed(COCA, **{"stages.1.data.image_px": 21})
    assert "image_px" in refused(capsys, *runs.arguments(config, tmp_path / "run"))
    config = changed(COCA, **{"stages.1.keep_opt_state": True})
    assert "optimiser" in refused(capsys, *runs.arguments(config, tmp_path / "run"))


@pytest.mark.parametrize("text", ["\ud800", "a\0b"])
@pytest.mark.parametrize("command", [
    ["report", "run", "--out"], ["report"], ["data", "tokenizer", "data", "--out"],
    ["data", "inspect", "data", "--html"], ["data", "verify", "data", "--quarantine"],
    ["data", "convert", "photos", "--out"], ["eval", "--workdir", "run", "--json"],
    ["average", "run", "--out"], ["train", "--config", "toy.json", "--workdir"], ["plan", "--config"],
])  # fmt: skip
def test_a_path_that_no_file_can_have_is_refused(tmp_path, capsys, monkeypatch, command, text):
    monkeypatch.chdir(tmp_path)
    assert "a text that paths can have" in refused(capsys, *command, text)
    assert not list(tmp_path.iterdir())


def test_mistakes_in_other_commands_are_one_line(clip_run, tmp_path, capsys):
    assert "no checkpoints" in refused(capsys, "eval", "--workdir", tmp_path)
    assert "no step 77" in refused(capsys, "eval", "--workdir", clip_run, "--step", 77)
    assert "retrival" in refused(capsys, "eval", "--workdir", clip_run, "--evals", "retrival")
    image = tmp_path / "a.png"
    assert "no file" in refused(capsys, "caption", "--workdir", clip_run, image)
    image.write_bytes(b"<html>")
    assert "not a usable image" in refused(capsys, "caption", "--workdir", clip_run, image)
    from PIL import Image

    Image.new("RGB", (20, 30)).save(image)
    assert "config.model.decoder" in refused(capsys, "caption", "--workdir", clip_run, image)
    refused(capsys, "report", tmp_path)
