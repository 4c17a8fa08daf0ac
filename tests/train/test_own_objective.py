"""A user's own objective, in the config's file: its mistakes are answered before anything compiles, its heads load."""

import re

import jax.numpy as jnp
import pytest

from helpers import runs
from vlp.infer.load import load

FILE = """
import dataclasses
from typing import ClassVar

from vlp.core.types import Out, Term


def distance(zi_BE, zt_BE):
    return ((zi_BE - zt_BE) ** 2).sum(axis=1)


@dataclasses.dataclass(frozen=True)
class Mine:
    reads: ClassVar = frozenset({"image", "text"})
    heads: ClassVar = {"match": {"name": "mlp", "depth": 1, "width_out": 1}}

    def __call__(self, ctx):
        loss_B = ctx.map(self.encode)
        return Out({"distance": Term.mean_of(loss_B)})

    def encode(self, ctx):
        zi_BE = ctx.student("image", ctx.batch["image"])["embed"]
        zt_BE = ctx.student("text", ctx.batch["text"])["embed"]
        return distance(ctx.head("match", zi_BE), ctx.head("match", zt_BE))


OBJECTIVES = {"mine": Mine}


def get_config(arg):
    return CONFIG
"""
CONFIG = runs.CLIP | {
    "objective": {"name": "mine"}, "steps": 1, "evals": {"retrieval": {"batch": 8, "gallery": 0}},
}  # fmt: skip


def write(folder, *changes, config=CONFIG):
    text = FILE.replace("CONFIG", repr(config))
    for old, new in changes:
        assert text.count(old), old
        text = text.replace(old, new)
    (folder / "mine.py").write_text(text)
    return "--config", folder / "mine.py"


def test_a_finished_run_with_a_head_loads_and_evaluates_with_it(tmp_path, capsys):
    assert runs.vlp("train", *write(tmp_path), "--workdir", tmp_path / "run") == 0
    (tmp_path / "mine.py").unlink()  # neither the objective nor its file is needed
    assert load(tmp_path / "run").apply("head", "match", jnp.ones((3, 8))).shape == (3, 1)
    assert runs.vlp("eval", "--workdir", tmp_path / "run") == 0
    assert runs.vlp("average", *[tmp_path / "run"] * 2, "--out", tmp_path / "mean") == 0
    assert load(tmp_path / "mean").apply("head", "match", jnp.ones((3, 8))).shape == (3, 1)


def test_an_exception_in_its_code_is_a_line_with_the_place_and_the_calls_that_led_there(
    tmp_path, capsys
):
    argv = write(tmp_path, ("zi_BE - zt_BE", "zi_BE - zt_BE[:, :, 0]"))
    train = ["train", *argv, "--workdir", tmp_path / "run"]
    assert runs.vlp(*train, compile_anew=True) == 1
    line, *frames = runs.answer(capsys)
    assert re.match(rf"vlp: objective Mine, {tmp_path}/mine.py:9: got IndexError \(Too many", line)
    places = [x.split(", line ")[1] for x in frames if x.strip().startswith("File")]
    assert places == ["18, in __call__", "24, in encode", "9, in distance"]
    assert "(zi_BE - zt_BE[:, :, 0])" in frames[-1] or "(zi_BE" in frames[-2]
    assert not (tmp_path / "run").exists()


MISTAKES = {
    "no term": ((('{"distance": Term.mean_of(loss_B)}', "{}"),), {}, "got an Out without terms, expected one term"),
    "a leaf": ((('ctx.batch["text"]', 'ctx.batch["txt"]'),), {}, "got no 'txt', .*did you mean 'text'.* name it in"),
    "a leaf to read": ((('{"image", "text"}', '{"image", "texts"}'),), {}, "'texts'.*did you mean 'text'"),
    "an output": (((')["embed"]', ')["embeds"]'),), {}, "got no 'embeds', .*did you mean 'embed'"),
    "a method": ((('student("image"', 'student("imge"'),), {}, "a TwoTower without a method 'imge'.*mean 'image'"),
    "a head": ((('head("match"', 'head("mach"'),), {}, "got 'mach', .*did you mean 'match'.* else declare"),
    "a head's name": ((('"name": "mlp"', '"name": "mpl"'),), {}, "got 'mpl', .*did you mean 'mlp'"),
    "a tower": ((), {"model.image_tower.name": "vitt"}, "image_tower.name: got 'vitt'.*did you mean 'vit'"),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_one_line(mistake, tmp_path, capsys):
    changes, values, message = MISTAKES[mistake]
    argv = write(tmp_path, *changes, config=runs.changed(CONFIG, **values))
    line = runs.refused(capsys, "plan", *argv)
    assert re.search(message, line), line


def test_texts_read_without_their_mask_are_a_warning(tmp_path, caplog):
    """Not an error: the first of a record's captions always exists."""
    text = 'ctx.student("text", ctx.batch["text"])["embed"]'
    folded = 'ctx.captions(lambda c: c.student("text", c.batch["text"])["embed"])'
    config = runs.changed(CONFIG, **{"data.captions": "all", "data.num_captions": 2})
    masked = f'({folded} * ctx.batch["text.mask"][..., None])'
    for loss, warned in ((folded, True), (masked, False)):
        caplog.clear()
        assert runs.vlp("plan", *write(tmp_path, (text, f"{loss}.mean(1)"), config=config)) == 0
        assert warned == ("Mine: reads texts [8, 2, 8] without text.mask" in caplog.text)
