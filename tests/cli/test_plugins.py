"""Parts from outside of the package: in a module, in a file beside the config, or in the config file itself."""

import json
import shutil

import pytest

from helpers import runs
from vlp.infer import load as loading
from vlp.infer.load import load
from vlp.models import MODELS
from vlp.objectives import OBJECTIVES

PARTS = '''
"""A model, an objective and an evaluator of a user's own."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import flax.linen as nn
import jax.numpy as jnp

from vlp.core.mesh import logical
from vlp.core.types import Out, Result, Term


class Colours(nn.Module):
    embed: int = 4

    def setup(self):
        init = lambda *names: logical(nn.initializers.normal(0.5), *names)
        self.colour = self.param("colour", init("pixels", "embed"), (3, self.embed))
        self.words = self.param("words", init("vocab", "embed"), (128, self.embed))

    def image(self, image, *, keep_ratio=1.0, keys=None):
        return {"embed": image.astype(jnp.float32).mean(axis=(1, 2)) / 255 @ self.colour}

    def text(self, text, *, keys=None):
        return {"embed": self.words[text].mean(axis=1)}


@dataclasses.dataclass(frozen=True)
class Distance:
    reads: ClassVar = frozenset({"image", "text"})
    power: int = 2

    def __call__(self, ctx):
        zi_BE, zt_BE = ctx.map(self.encode)
        return Out({"distance": Term(((zi_BE - zt_BE) ** self.power).sum(), zi_BE.shape[0])})

    def encode(self, ctx):
        image = ctx.student("image", ctx.batch["image"])
        return image["embed"], ctx.student("text", ctx.batch["text"])["embed"]


@dataclasses.dataclass(frozen=True)
class Counted:
    split: str = "test"
    batch: int = 8
    every_steps: int = 0

    def asks(self, apply, image, text):
        return apply("image", image)["embed"]

    def __call__(self, apply, mesh, io):
        dataset = io.open(self.split)
        yield Result("records", float(dataset.num_records), io.provenance(dataset))


MODELS = {"colours": Colours}
OBJECTIVES = {"distance": Distance}
EVALS = {"counted": Counted}
'''
CONFIG = runs.TOY | {
    "steps": 2, "model": {"name": "colours"}, "objective": {"name": "distance"},
    "evals": {"counted": {}}, "plugins": ["my_parts"],
}  # fmt: skip


def write(folder, config, parts=PARTS):
    """A config file and, beside it, my_parts.py; returns the options of `vlp train`."""
    folder.mkdir(exist_ok=True)
    (folder / "my_parts.py").write_text(parts)
    (folder / "config.py").write_text(f"def get_config():\n    return {config!r}\n")
    return "--config", folder / "config.py"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("plugins")
    argv = write(folder / "mine", CONFIG)
    assert runs.vlp("train", *argv, "--workdir", folder / "run") == 0
    return folder / "run"


def test_every_command_knows_the_parts_of_plugins(run, tmp_path, capsys, monkeypatch):
    """Nothing is added to vlp's own tables; the checkpoint knows where its parts came from, and not from where
    the command is started."""
    monkeypatch.chdir(tmp_path)
    assert "colours" not in MODELS and "distance" not in OBJECTIVES
    entry = json.loads((run / "config.json").read_text())["plugins"]
    assert entry == load(run).meta["config"]["plugins"]
    assert entry[0]["file"].endswith("mine/my_parts.py") and len(entry[0]["sha256"]) == 64
    assert runs.vlp("eval", "--workdir", run) == 0
    assert capsys.readouterr().out.split()[:3] == ["counted", "test", "records"]
    assert runs.vlp("average", run, run, "--out", tmp_path / "mean") == 0
    assert runs.vlp("eval", "--workdir", tmp_path / "mean") == 0
    assert runs.vlp("plan", "--config", run.parent / "mine" / "config.py") == 0
    assert type(load(run).apply.model).__name__ == "Colours"
    from PIL import Image

    Image.new("RGB", (20, 30)).save(tmp_path / "a.png")
    line = runs.refused(capsys, "caption", "--workdir", run, tmp_path / "a.png")
    assert "got a Colours, expected a model with a decoder" in line


def test_parts_may_lie_in_the_config_file_or_in_an_installed_module(tmp_path, capsys, monkeypatch):
    file = tmp_path / "config.py"
    config = {k: v for k, v in CONFIG.items() if k != "plugins"}
    file.write_text(f"{PARTS}\n\ndef get_config(arg):\n    return {config!r}\n")
    assert runs.vlp("train", "--config", file, "--workdir", tmp_path / "run") == 0
    assert load(tmp_path / "run").meta["config"]["plugins"][0]["file"] == str(file)
    assert runs.vlp("eval", "--workdir", tmp_path / "run") == 0
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "parts_by_name.py").write_text(PARTS)
    monkeypatch.syspath_prepend(tmp_path / "site")
    argv = write(tmp_path / "other", config)
    named = '--config.plugins=("parts_by_name",)'
    assert runs.vlp("plan", *argv, named) == 0
    assert runs.vlp("train", *argv, named, "--workdir", tmp_path / "named") == 0
    assert load(tmp_path / "named").meta["config"]["plugins"] == [{"module": "parts_by_name"}]
    monkeypatch.undo()
    capsys.readouterr()


def test_plugins_import_what_lies_beside_them_each_from_its_own_folder(tmp_path, capsys):
    """With a dot or without; two plugins of one folder share one module."""
    parts = PARTS.replace("class Colours", "from DOTbits import EMBED\n\n\nclass Colours")
    parts = parts.replace("embed: int = 4", "embed: int = EMBED")
    for dot in (".", ""):
        for embed in (3, 5):
            folder = tmp_path / f"{embed}{dot}"
            argv = write(folder, CONFIG, parts.replace("DOT", dot))
            (folder / "bits.py").write_text(f"EMBED = {embed}\n")
            assert runs.vlp("plan", *argv) == 0
            assert f"{(3 + 128) * embed:,}" in capsys.readouterr().out.replace("_", ",")
    again = "from .my_parts import OBJECTIVES, Colours\nMODELS = {'more': Colours}\n"
    argv = write(folder := tmp_path / "both", CONFIG | {"plugins": ["more", "my_parts"]})
    (folder / "more.py").write_text(again)
    assert runs.vlp("plan", *argv) == 0
    (folder / "more.py").write_text("from .mine import x\n")
    assert "got no module 'mine' in line 1" in runs.refused(capsys, "plan", *argv)


def test_a_plugin_that_changed_is_noted_and_one_that_is_gone_is_named(
    run, tmp_path, capsys, caplog
):
    """A plugin is loaded only where its parts are used: not to evaluate one of vlp's own models."""
    caplog.set_level("INFO")
    config = runs.changed(runs.CLIP, steps=1, objective={"name": "distance"}, plugins=["my_parts"],
                          evals={"retrieval": {"batch": 8}})  # fmt: skip
    argv = write(tmp_path / "mine", config)
    assert runs.vlp("train", *argv, "--workdir", tmp_path / "clip") == 0
    file = tmp_path / "mine" / "my_parts.py"
    file.write_text(PARTS + "\n# another\n")
    assert runs.vlp("train", *argv, "--workdir", tmp_path / "clip") == 0
    assert "since the checkpoint: plugins.0.sha256" in caplog.text
    shutil.rmtree(tmp_path / "mine")
    assert runs.vlp("eval", "--workdir", tmp_path / "clip") == 0
    other = shutil.copytree(run, tmp_path / "run")
    moved = run.parent / "mine" / "my_parts.py"
    moved.rename(tmp_path / "kept.py")
    loading._load.cache_clear()
    line = runs.refused(capsys, "eval", "--workdir", other)
    assert str(moved) in line and "which is gone" in line
    (tmp_path / "kept.py").rename(moved)


MISTAKES = {
    "a name that is there": (PARTS.replace('"distance"', '"clip"'), {}, "OBJECTIVES['clip']"),
    "no class": (PARTS + "\nEVALS['x'] = 3\n", {}, "EVALS['x'] = 3, expected a class"),
    "no dataclass": (PARTS + "\nEVALS['x'] = dict\n", {}, "expected a dataclass"),
    "it raises": ("1 / 0\n", {}, "got ZeroDivisionError (division by zero) in line 1"),
    "no file": (PARTS, {"plugins": ["none.py"]}, "got 'none.py', expected a file"),
    "no module": (PARTS, {"plugins": ["no_such_parts"]}, "got no module 'no_such_parts'"),
    "a word": (PARTS, {"plugins": "my_parts"}, "expected a list of modules"),
    "no name": (PARTS, {"plugins": [3]}, "expected a module or a file"),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_in_plugins_are_one_line(mistake, tmp_path, capsys):
    parts, changes, message = MISTAKES[mistake]
    argv = write(tmp_path / "mine", CONFIG | changes, parts)
    for command in (["plan"], ["train", "--workdir", tmp_path / "run"]):
        assert message in runs.refused(capsys, *command, *argv)
    assert not (tmp_path / "run").exists()
