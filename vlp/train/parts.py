"""A stage made ready to train: everything opened and checked, nothing compiled and nothing written."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
from jax.sharding import Mesh

from vlp.core import check
from vlp.core import mesh as meshes
from vlp.data.loader import Dataset, open_dataset
from vlp.evals.io import IO, check_ready
from vlp.infer.load import load
from vlp.models.answers import check_needs
from vlp.optim import make as optimisers
from vlp.train import state as states
from vlp.train.stages import Run, Stage
from vlp.train.state import State
from vlp.train.step import train_step

PyTree = Any


@dataclasses.dataclass(frozen=True)
class Parts:
    """A stage made ready: its data, optimiser, teachers' models, its state's shapes and shardings, compiled step."""

    stage: Stage
    datasets: Mapping[str, Dataset]  # "" is the main stream
    updater: optimisers.Updater
    teachers: Mapping[str, tuple[Any, float | None]]
    abstract: State
    step: Any

    @property
    def main(self) -> Dataset:
        return self.datasets[""]


def prepare(stage: Stage, settings: Run, mesh: Mesh) -> Parts:
    """Opens a stage's data and checks everything that can be checked without compiling or writing."""
    meshes.check_batch(stage.batch, mesh, stage.micro_batches)
    datasets = {"": open_dataset(stage.data)}
    for name, stream in stage.streams.items():
        meshes.check_batch(stream.batch, mesh, where=f"config.streams.{name}.batch")
        datasets[name] = open_dataset(stream.data)
    check_text(stage, datasets[""])
    boxed = states.abstract_params(stage.model, stage.data.image_px, stage.data.text_len)
    updater = optimisers.make(stage.optim, nn.unbox(boxed))
    teachers = {}
    for name, teacher in stage.teachers.items():
        teachers[name] = (
            load(teacher.path).apply.model if teacher.path else stage.model,
            teacher.decay,
        )
    step = functools.partial(
        train_step,
        model=stage.model,
        objective=stage.objective,
        updater=updater,
        lr_at=stage.schedule.at(stage.batch, stage.num_steps),
        seed=settings.seed,
        num_micro=stage.micro_batches,
        teachers=teachers,
    )
    state = abstract_state(stage, updater, mesh)
    shardings = jax.tree.map(lambda x: x.sharding, state)
    compiled = jax.jit(step, donate_argnums=0, out_shardings=(shardings, meshes.replicated(mesh)))
    parts = Parts(stage, datasets, updater, teachers, state, compiled)
    needs = getattr(stage.objective, "needs", frozenset())
    do = "change config.objective or config.model"
    px, length = stage.data.image_px, stage.data.text_len
    check_needs(stage.model, needs, px, length, "config.objective", do)
    batch = abstract_batch(parts)
    missing = stage.objective.reads - set(batch)
    if missing:
        raise check.error(
            "config.objective",
            f"no batch leaf {sorted(missing)}",
            sorted(batch),
            "change config.data",
        )
    try:
        compiled.eval_shape(state, batch)  # the trace is kept for the first step
    except (TypeError, ValueError, AssertionError, IndexError) as e:
        if stage.data.captions != "all":
            raise
        got = f"'all' (text {list(batch['text'].shape)}) with {type(stage.objective).__name__}"
        expected = f"an objective that reads several captions ({type(e).__name__})"
        do = "set it to 'uniform', or change config.objective"
        raise check.error("config.data.captions", got, expected, do) from e
    for label, evaluator in stage.evals.items():
        io = IO(stage.data, parts.main.tokenizer)
        check_ready(evaluator, stage.model, mesh, io, f"config.evals.{label}")
    return parts


def abstract_state(stage: Stage, updater: optimisers.Updater, mesh: Mesh) -> State:
    """Shapes and shardings of a stage's state."""
    px, length = stage.data.image_px, stage.data.text_len
    params = nn.unbox(states.abstract_params(stage.model, px, length))
    teachers = {}
    for name, teacher in stage.teachers.items():
        teachers[name] = params
        if teacher.path:
            loaded = load(teacher.path)
            teachers[name] = jax.eval_shape(lambda tree: tree, loaded.apply.params)
    create = functools.partial(states.create, updater=updater, step=0)
    extra = jax.eval_shape(lambda: init_extra(stage, 0))
    state = jax.eval_shape(lambda p, t, e: create(p, teachers=t, extra=e), params, teachers, extra)
    shardings = states.shardings(stage.model, px, length, updater, state, mesh)
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), state, shardings
    )


def abstract_batch(parts: Parts) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes of a global batch, from one real row of each stream."""
    out = {}
    for name, data in parts.datasets.items():
        size = parts.stage.streams[name].batch if name else parts.stage.batch
        for key, rows in data.batch_at(0, 1, 0).items():
            out[f"{name}.{key}" if name else key] = jax.ShapeDtypeStruct(
                (size, *rows.shape[1:]), rows.dtype
            )
    return out


def init_extra(stage: Stage, seed: int) -> PyTree:
    """The objective's own arrays at the start, if it has any."""
    init = getattr(stage.objective, "init_extra", None)
    return () if init is None else init(jax.random.fold_in(jax.random.key(seed), stage.index))


def same_shapes(a: PyTree, b: PyTree) -> bool:
    """Whether two trees have the same structure and leaves of the same shapes."""
    shapes = lambda t: (jax.tree.structure(t), [x.shape for x in jax.tree.leaves(t)])
    return shapes(a) == shapes(b)


def check_text(stage: Stage, data: Dataset) -> None:
    """The model's vocabulary and special tokens against the tokenizer's."""
    tower = getattr(stage.model, "text_tower", None)
    if tower is None:
        return
    ours, theirs = (tower.pad_id, tower.eos_id), (data.tokenizer.pad_id, data.tokenizer.eos_id)
    if tower.vocab < data.tokenizer.vocab_size:
        do = f"set config.model.text_tower.vocab to {data.tokenizer.vocab_size} or more"
        raise check.error(
            "config.model.text_tower.vocab",
            tower.vocab,
            f"the tokenizer's {data.tokenizer.vocab_size} or more",
            do,
        )
    if ours != theirs:
        raise check.error(
            "config.model.text_tower pad_id, eos_id",
            ours,
            f"the tokenizer's {theirs}",
            "change them",
        )
