"""Runs of tiny models for the tests of training, checkpoints, evaluation and commands; also their config file.

In-process runs use one of the eight devices unless told otherwise, and share what they compile unless told otherwise.
"""

import contextlib
import copy
import dataclasses
import functools
import json
import logging
import os
import pathlib
import re
import subprocess
import sys
from typing import Any, ClassVar
from unittest import mock

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from vlp.cli import main as cli
from vlp.core import mesh as meshes
from vlp.core import paths, tree
from vlp.core.mesh import logical
from vlp.core.types import Out, Term
from vlp.models import MODELS
from vlp.objectives import OBJECTIVES
from vlp.runtime import workdir
from vlp.train import loop
from vlp.train import state as states

ROOT = pathlib.Path(__file__).parents[2]
TOWER = {"width": 8, "depth": 1, "heads": 2, "mlp": 16}
DATA = {
    "source": "shapes", "num_records": 21, "image_px": 16, "text_len": 8, "captions": "uniform",
    "read_threads": 1,
}  # fmt: skip
CLIP = {
    "name": "tiny", "batch": 8, "steps": 4,
    "model": {
        "name": "two_tower", "embed": 8,
        "image_tower": {"patch": 8, "pool": "mean", **TOWER},
        "text_tower": {"vocab": 128, "pool": "eos", **TOWER},
    },
    "objective": {"name": "clip"},
    "data": DATA,
    "schedule": {"lr": 1e-2, "warmup_frac": 0.2},
    "log_every_steps": 1, "save_every_steps": 2,
}  # fmt: skip
COCA = CLIP | {
    "steps": 0,
    "model": {
        "name": "two_tower", "embed": 8, "poolers": {"queries": 2}, "decoder": {"depth": 1},
        "image_tower": {"patch": 8, "dropout": 0.1, **TOWER},
        "text_tower": {"vocab": 128, "dropout": 0.1, **TOWER},
    },
    "objective": {"name": "coca", "keep_ratio": 0.5},
    "teachers": {"ema": {"decay": 0.9}},
    "eval_params": "ema",
    "evals": {"retrieval": {"every_steps": 3, "batch": 8}},
    "stages": [
        {"name": "masked", "steps": 5},
        {
            "name": "unmasked", "steps": 4, "batch": 16, "objective": {"keep_ratio": 1.0},
            "data": {"image_px": 24, "text_len": 10},
            "evals": {"captions": {"batch": 8, "items": 2}},
        },
    ],
}  # fmt: skip
TOY = {
    "name": "toy", "batch": 8, "steps": 4,
    "model": {"name": "toy"},
    "objective": {"name": "toy"},
    "data": DATA,
    "schedule": {"lr": 1e-2},
    "log_every_steps": 1, "save_every_steps": 2,
}  # fmt: skip


class Toy(nn.Module):
    """A dual encoder that compiles in no time: mean colour and bag of words."""

    embed: int = 4

    def setup(self):
        init = lambda *names: logical(nn.initializers.normal(0.5), *names)
        self.colour = self.param("colour", init("pixels", "embed"), (3, self.embed))
        self.words = self.param("words", init("vocab", "embed"), (128, self.embed))

    def image(self, image, *, keep_ratio=1.0, keys=None):
        return {"embed": image.astype(jnp.float32).mean(axis=(1, 2)) / 255 @ self.colour}

    def text(self, text, *, keys=None):
        return {"embed": self.words[text].mean(axis=1)}


@jax.custom_vjp
def spoilt(x, bad):
    """x, whose gradient is NaN where `bad` (bool, as x's first axis)."""
    return x


spoilt.defvjp(
    lambda x, bad: (x, bad),
    lambda bad, g: (jnp.where(bad.reshape(-1, *[1] * (g.ndim - 1)), jnp.nan, g), None),
)


@dataclasses.dataclass(frozen=True)
class ToyObjective:
    """Distance of the pair's embeddings, squared or more; not a number at stage step `nan_step`.

    fault: what happens to the samples at the stream positions `bad` (first, last + 1): "loss" (NaN), "gradient" (NaN,
    with a finite loss), "state" (NaN in the method's state alone) or "spike" (a loss 100 times as large).
    """

    reads: ClassVar = frozenset({"image", "text"})
    nan_step: int = -1
    power: int = 2
    fault: str = ""
    bad: tuple[int, int] = (0, 0)

    def init_method_state(self, key, model):
        return {"seen": jnp.zeros(())} if self.fault else ()

    def __call__(self, ctx):
        zi_BE, zt_BE = ctx.map(self.encode)
        index_B = ctx.batch["index"][:, 1].astype(jnp.int32)
        bad_B = (index_B >= self.bad[0]) & (index_B < self.bad[1])
        if self.fault == "gradient":
            zi_BE = spoilt(zi_BE, bad_B)
        total = ((zi_BE - zt_BE) ** self.power).sum()
        total = jnp.where(ctx.step == self.nan_step, jnp.nan, total)
        if self.fault in ("loss", "spike"):
            total *= jnp.where(bad_B.any(), jnp.nan if self.fault == "loss" else 100.0, 1.0)
        terms = {"distance": Term(total, zi_BE.shape[0])}
        if not self.fault:
            return Out(terms)
        seen = ctx.method_state["seen"] + zi_BE.shape[0]
        return Out(terms, {"seen": jnp.where(bad_B.any() & (self.fault == "state"), jnp.nan, seen)})

    def encode(self, ctx) -> Any:
        image = ctx.student("image", ctx.batch["image"])
        return image["embed"], ctx.student("text", ctx.batch["text"])["embed"]


def register_toy():
    """Registers the toy model and objective; tests use the fixture `toy`."""
    MODELS["toy"], OBJECTIVES["toy"] = Toy, ToyObjective


class Killed(BaseException):
    """Raised in place of the death of the process."""


def get_config(arg):
    return json.loads(pathlib.Path(arg).read_text())


def changed(config, **changes):
    """The config with values replaced, by dotted path: changed(CLIP, **{"model.embed": 4}, steps=2)."""
    config = copy.deepcopy(config)
    for path, value in changes.items():
        node = config
        *parents, last = path.split(".")
        for part in parents:
            node = node[int(part)] if isinstance(node, list) else node.setdefault(part, {})
        node[int(last) if isinstance(node, list) else last] = value
    return config


def arguments(config, directory, file=None):
    """The command line that trains `config` in `directory`. file: where the config is written, for one in a bucket."""
    file = pathlib.Path(file or f"{directory}.config.json")
    file.write_text(json.dumps(config))
    return ["train", "--config", f"{__file__}:{file}", "--workdir", str(directory)]


def vlp(*argv, devices=1, compile_anew=False):
    """`vlp argv` in this process, on the first devices; returns the exit code.

    Stages (their compiled steps) and initial parameters are those of earlier calls where model, stage and mesh are
    equal; `compile_anew` runs the command as a user's process does.
    """
    make = functools.partial(meshes.make, devices=jax.devices()[:devices])
    patches = [(meshes, "make", make)]
    if not compile_anew:
        patches += [(loop, "prepare", _prepare), (states, "init_params", _init)]
    with contextlib.ExitStack() as stack:
        for owner, name, new in patches:
            stack.enter_context(mock.patch.object(owner, name, new))
        return cli.main([str(a) for a in argv])


def train(config, directory, devices=1, compile_anew=False):
    return vlp(*arguments(config, directory), devices=devices, compile_anew=compile_anew)


def refused(capsys, *argv, devices=1):
    """Runs a command that must answer with exit code 2 and one line; returns the line."""
    assert vlp(*argv, devices=devices) == 2
    lines = answer(capsys)
    assert len(lines) == 1, lines
    return lines[0]


def answer(capsys):
    """Returns the lines of stderr without those that say, on a busy machine, that a command still runs."""
    lines = capsys.readouterr().err.strip().splitlines()
    return [line for line in lines if not re.fullmatch(r".* … \d+ s", line)]


def command(*argv, program=(__file__,), path=()):
    """`vlp argv` as a process of its own, on one device, that knows the toy; its output is captured.

    path: folders of modules that come before all others.
    """
    modules = os.pathsep.join(map(str, (*path, ROOT)))
    env = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": modules}
    argv = [sys.executable, *program, *map(str, argv)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(argv, cwd=ROOT, env=env, **pipes)


def rows(directory):
    """Returns the rows of metrics.jsonl without their times."""
    out = workdir.read(paths.of(directory) / "metrics.jsonl")
    return [{k: v for k, v in row.items() if not k.startswith("time/")} for row in out]


def saved(directory, step=None):
    """Returns every array of a checkpoint by name, and its step as ""."""
    import orbax.checkpoint as ocp

    folders = [
        p for p in paths.listing(paths.of(directory) / "checkpoints") if p.name.startswith("step_")
    ]
    folder = folders[-1] if step is None else folders[0].with_name(f"step_{step:09d}")
    out = {"": np.int64(folder.name.removeprefix("step_"))}
    with ocp.PyTreeCheckpointer() as reader:
        for item in ("params", "rest"):
            meta = reader.metadata(folder / item).item_metadata.tree
            args = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), meta)
            arrays = tree.named(reader.restore(folder / item, restore_args=args))
            out |= {f"{item}/{k}": v for k, v in arrays.items()}
    return out


def assert_same_run(a, b):
    """Asserts equal records, and equal last states to the bit."""
    for row_a, row_b in zip(rows(a), rows(b)):
        assert row_a == row_b
    assert len(rows(a)) == len(rows(b))
    state_a, state_b = saved(a), saved(b)
    assert state_a.keys() == state_b.keys()
    for name, value in state_a.items():
        np.testing.assert_array_equal(value, state_b[name], err_msg=name)


def contents(directory):
    """Returns every path below a directory with its bytes, to compare before and after a command."""
    paths = sorted(pathlib.Path(directory).rglob("*"))
    return {str(p): p.read_bytes() if p.is_file() else None for p in paths}


_PREPARE, _INIT = loop.prepare, states.init_params
MEMORY = {}


def _prepare(stage, settings, mesh):
    key = repr(stage), settings.seed, mesh
    if key not in MEMORY:
        MEMORY[key] = _PREPARE(stage, settings, mesh)
    return MEMORY[key]


def _init(model, objective, batch, seed, mesh, teachers=None):
    key = repr(model), repr(objective), repr(batch), seed, mesh, repr(teachers)
    if key not in MEMORY:
        MEMORY[key] = _INIT(model, objective, batch, seed, mesh, teachers)
    return jax.tree.map(jnp.copy, MEMORY[key])  # the run gives its arrays away


def inner_jaxprs(eqn):
    """The jaxprs inside of an equation: bodies of loops, branches, calls."""
    for value in eqn.params.values():
        for inner in value if isinstance(value, tuple | list) else (value,):
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns"):
                yield inner


if __name__ == "__main__":
    from vlp import __main__ as program  # which takes Ctrl-C: not in the tests' own process

    logging.root.handlers.clear()  # Grain's, which would keep the command from setting its own
    register_toy()
    sys.exit(program.main())
