"""A stage made ready to train: everything opened and checked, nothing compiled and nothing written."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import flax.linen as nn
import jax
from jax.sharding import Mesh

from vlp.core import check
from vlp.core import mesh as meshes
from vlp.core.config import plain
from vlp.core.plugins import Plugin
from vlp.core.types import Apply, Weight
from vlp.data import leaves
from vlp.data.config import check_data
from vlp.data.dataset import Dataset, open_dataset
from vlp.data.stages import in_stages
from vlp.evals.io import IO, check_asks, check_ready
from vlp.optim import make as optimisers
from vlp.train import state as states
from vlp.train.rollback import Rollback, left_out
from vlp.train.stages import Run, Stage
from vlp.train.state import State
from vlp.train.step import train_step

PyTree = Any

if TYPE_CHECKING:
    from vlp.infer.load import Loaded


@dataclasses.dataclass(frozen=True)
class StagePlan:
    """A stage made ready: its data, optimiser, teachers' models, shapes and shardings of state and batch, its step."""

    stage: Stage
    datasets: Mapping[str, Dataset]  # "" is the main stream
    updater: optimisers.Updater
    teachers: Mapping[str, tuple[Any, Weight | None]]
    boxed: PyTree  # shapes of the parameters, with the names of their axes
    abstract: State
    batch: Mapping[str, jax.ShapeDtypeStruct]
    step: Any
    starts: Mapping[str, int] = dataclasses.field(default_factory=dict)  # stream → first position
    rollbacks: tuple[Rollback, ...] = ()  # those of the stage
    renewed: frozenset[str] = (
        frozenset()
    )  # evaluators that were added or changed since the last start

    @property
    def main(self) -> Dataset:
        return self.datasets[""]

    def position(self, stage_step: int, name: str = "") -> int:
        """Position in a stream of the sample that is read after `stage_step` steps of the stage."""
        batch = (self.stage.streams[name] if name else self.stage).batch
        return self.starts[name] + (stage_step + left_out(self.rollbacks, stage_step)) * batch


def prepare(stage: Stage, settings: Run, mesh: Mesh) -> StagePlan:
    """Opens a stage's data and checks everything that can be checked without compiling or writing."""
    plan = assemble(stage, settings, mesh)
    datasets = {
        name: open_dataset(
            stream.data,
            reads=leaves.of_stream(stage.objective.reads, name),
            plugins=settings.plugins,
        )
        for name, stream in {"": stage, **stage.streams}.items()
    }
    if (completed := with_tokenizer(stage, datasets[""].tokenizer)) is not stage:
        plan = assemble(completed, settings, mesh)
    stage = completed
    check_text(stage, datasets[""])
    trace(plan)
    for label, evaluator in stage.evals.items():
        io = IO(stage.data, datasets[""].tokenizer)
        check_ready(evaluator, mesh, io, f"config.evals.{label}")
    return dataclasses.replace(plan, datasets=datasets)


def in_order(plans: Sequence[StagePlan], rollbacks: Sequence[Rollback] = ()) -> list[StagePlan]:
    """Makes each stream continue its sample order from stage to stage (`vlp.data.stages.in_stages`).

    rollbacks: whose data is left out; it counts as read.
    """
    datasets: list[dict[str, Dataset]] = [{} for _ in plans]
    starts: list[dict[str, int]] = [{} for _ in plans]
    own = [tuple(r for r in rollbacks if r.stage == plan.stage.index) for plan in plans]
    for name in sorted({name for plan in plans for name in plan.datasets}):
        here = [i for i, plan in enumerate(plans) if name in plan.datasets]
        found, shift = [], 0
        for i in here:
            stage = plans[i].stage
            stream = stage.streams[name] if name else stage
            more = sum(r.left_out for r in own[i])
            starts[i][name] = stream.start_samples + shift
            num = (stage.num_steps + more) * stream.batch
            found.append((plans[i].datasets[name], starts[i][name], num))
            shift += more * stream.batch
        for i, dataset in zip(here, in_stages(found)):
            datasets[i][name] = dataset
    return [
        dataclasses.replace(plan, datasets=data, starts=first, rollbacks=mine)
        for plan, data, first, mine in zip(plans, datasets, starts, own)
    ]


def assemble(stage: Stage, settings: Run, mesh: Mesh) -> StagePlan:
    """All of a stage but its data, which a plan does without; checked, nothing compiled."""
    stage = with_tokenizer(stage)
    check_data(stage.data)
    check_refresh(stage.objective)
    meshes.check_batch(stage.batch, mesh, stage.micro_batches)
    for name, stream in stage.streams.items():
        meshes.check_batch(stream.batch, mesh, where=f"config.streams.{name}.batch")
    check_reads(stage)
    batch = abstract_batch(stage, mesh, settings.plugins)
    check_streams(stage, batch)
    loaded = {name: _load(t.path).apply for name, t in stage.teachers.items() if t.path}
    nets = teachers_shapes(stage, loaded)
    with traced(stage, batch):
        boxed = states.abstract_params(stage.model, stage.objective, batch, nets)
    params = nn.unbox(boxed)
    for label, evaluator in stage.evals.items():
        check_asks(evaluator, Apply(stage.model, params), stage.data, f"config.evals.{label}")
    updater = optimisers.make(stage.optim, params)
    teachers = {
        name: (loaded[name].model if t.path else stage.model, t.decay)
        for name, t in stage.teachers.items()
    }
    step = functools.partial(
        train_step,
        model=stage.model,
        objective=stage.objective,
        updater=updater,
        lr_at=stage.schedule.at(stage.batch, stage.num_steps),
        seed=settings.seed,
        num_steps=stage.num_steps,
        num_micro=stage.micro_batches,
        micro_remat=stage.micro_remat,
        teachers=teachers,
    )
    with traced(stage, batch):
        state = abstract_state(stage, boxed, nets, updater, mesh)
    check_sharded(state, settings, mesh)
    shardings = jax.tree.map(lambda x: x.sharding, state)
    compiled = jax.jit(step, donate_argnums=0, out_shardings=(shardings, meshes.replicated(mesh)))
    return StagePlan(stage, {}, updater, teachers, boxed, state, batch, compiled)


def _load(workdir: str) -> Loaded:
    from vlp.infer.load import load  # here, as it brings Orbax, which a plan does without

    return load(workdir)


def check_reads(stage: Stage) -> None:
    """Raises UserError unless the objective says which leaves it reads."""
    if not hasattr(stage.objective, "reads"):
        got, do = f"{type(stage.objective).__name__} without reads", "name the batch leaves it uses"
        raise check.error("config.objective", got, "reads: ClassVar[frozenset[str]]", do)
    if isinstance(reads := stage.objective.reads, str):
        do = f"write reads = frozenset({{{reads!r}}})"
        raise check.error("config.objective: reads", repr(reads), "a set of leaf names", do)


def check_streams(stage: Stage, batch: Mapping[str, Any]) -> None:
    """Raises UserError for leaves of a stream that the config does not have."""
    if missing := sorted(stage.objective.reads - set(batch)):
        do = "add the stream to config.streams"
        raise check.error("config.objective", f"no batch leaf {missing}", sorted(batch), do)


def teachers_shapes(stage: Stage, loaded: Mapping[str, Apply]) -> states.Nets:
    """Returns {teacher: (model, shapes of its parameters)}; (None, None) for an average of the trained model."""
    shapes = lambda apply: jax.eval_shape(lambda: apply.params)
    of = {name: (apply.model, shapes(apply)) for name, apply in loaded.items()}
    return {name: of.get(name, (None, None)) for name in stage.teachers}


def trace(plan: StagePlan) -> None:
    """Traces the step, which is kept for the first one; what a method cannot do with its data or state shows here."""
    with traced(plan.stage, plan.batch):
        plan.step.eval_shape(plan.abstract, plan.batch)


@contextlib.contextmanager
def traced(stage: Stage, batch: Mapping[str, Any]) -> Iterator[None]:
    """Inside `with`, the model and the objective are traced.

    Raises:
        UserError: an integer of theirs needs more than 32 bits.
        Bug: any other exception of their code, with the place in it.
    """
    try:
        yield
    except check.UserError:
        raise
    except OverflowError as e:
        found = large_integers(stage)
        if not found:
            raise check.bug(f"objective {type(stage.objective).__name__}", e) from e
        name, number = next(iter(found.items()))
        do = f"set {name} to a number below 2^31"
        raise check.error(name, number, "an integer of 32 bits, as in compiled programs", do) from e
    except (OSError, MemoryError):
        raise
    except Exception as e:
        expected = "code that JAX can trace"
        if stage.data.captions == "all" and "text" in batch:
            shape = list(batch["text"].shape)
            expected += f" for text {shape}, of config.data.captions='all': the text tower is called in ctx.captions"
        raise check.bug(f"objective {type(stage.objective).__name__}", e, expected) from e


def large_integers(stage: Stage) -> dict[str, int]:
    """Returns the integers of the model and the objective that 32 bits do not hold, by their place in the config."""
    out: dict[str, int] = {}

    def walk(where: str, value: Any) -> None:
        items = enumerate(value) if isinstance(value, list) else getattr(value, "items", tuple)()
        for key, inner in items:
            walk(f"{where}.{key}", inner)
        if isinstance(value, int) and not -(2**31) <= value < 2**31:
            out[where] = value

    walk("config.model", plain(stage.model))
    walk("config.objective", plain(stage.objective))
    return out


def check_sharded(state: State, settings: Run, mesh: Mesh) -> None:
    """Raises UserError for a large parameter that fsdp leaves whole on every device, unless the config allows it."""
    whole = meshes.whole({"params": state.params, "opt": state.opt}, mesh)
    if whole and not settings.mesh.allow_replicated:
        name = max(whole, key=lambda name: whole[name])
        total, ways = sum(whole.values()) / 2**20, mesh.shape["fsdp"]
        got = f"{len(whole)} leaves of {total:.0f} MB that fsdp={ways} does not divide ({name}, …)"
        do = "use a smaller fsdp (and more data), or set config.mesh.allow_replicated=True"
        raise check.error("config.mesh", got, "every leaf over 1 MB in shards", do)


def abstract_state(
    stage: Stage, boxed: PyTree, nets: states.Nets, updater: optimisers.Updater, mesh: Mesh
) -> State:
    """Shapes and shardings of a stage's state."""
    params = nn.unbox(boxed)
    teachers = {name: params if net is None else own for name, (net, own) in nets.items()}
    create = functools.partial(states.create, updater=updater, step=0)
    own = jax.eval_shape(lambda: init_method_state(stage, 0))
    state = jax.eval_shape(
        lambda p, t, e: create(p, teachers=t, method_state=e), params, teachers, nn.unbox(own)
    )
    shardings = states.shardings(boxed, updater, state, mesh, own)
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), state, shardings
    )


def abstract_batch(
    stage: Stage, mesh: Mesh, plugins: Sequence[Plugin] = ()
) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes and shardings of a global batch of all streams."""
    rows = meshes.batch_sharding(mesh)
    out = {}
    for name, stream in {"": stage, **stage.streams}.items():
        reads = leaves.of_stream(stage.objective.reads, name)
        spec = leaves.spec(stream.data, stream.batch, reads, plugins)
        for key, (shape, dtype) in spec.items():
            full = f"{name}/{key}" if name else key
            out[full] = jax.ShapeDtypeStruct(shape, dtype, sharding=rows)
    return out


def init_method_state(stage: Stage, seed: int) -> PyTree:
    """The objective's own arrays at the start, if it has any; those with names of their axes still carry them."""
    key = jax.random.fold_in(jax.random.key(seed), stage.index)
    return states.method_state(stage.objective, stage.model, key)


def make_method_state(plan: StagePlan, seed: int) -> PyTree:
    """The same, made in its shards."""
    shardings = jax.tree.map(lambda x: x.sharding, plan.abstract.method_state)
    make = lambda: nn.unbox(init_method_state(plan.stage, seed))
    return jax.jit(make, out_shardings=shardings)()


def same_shapes(a: PyTree, b: PyTree) -> bool:
    """Whether two trees have the same structure and leaves of the same shapes and types."""
    shapes = lambda t: (jax.tree.structure(t), [(x.shape, x.dtype) for x in jax.tree.leaves(t)])
    return shapes(a) == shapes(b)


def with_tokenizer(stage: Stage, tokenizer: Any = None) -> Stage:
    """The stage, its objective's fields `mask_id` and `vocab_size` filled in from the tokenizer where they are None.

    Without a tokenizer they are of the model's last row; shapes do not depend on them.
    """
    names = [n for n in ("mask_id", "vocab_size") if getattr(stage.objective, n, 0) is None]
    if not names:
        return stage
    last = getattr(getattr(stage.model, "text_tower", None), "vocab", 8) - 1
    values = {n: last if tokenizer is None else getattr(tokenizer, n) for n in names}
    objective = dataclasses.replace(stage.objective, **values)
    return dataclasses.replace(stage, objective=objective)


def check_text(stage: Stage, data: Dataset) -> None:
    """Raises UserError unless the model's vocabulary and special ids fit the tokenizer's."""
    tokenizer, tower = data.tokenizer, getattr(stage.model, "text_tower", None)
    mask_id = getattr(stage.objective, "mask_id", None)
    if mask_id not in (None, tokenizer.mask_id):
        do = "leave it out"
        raise check.error(
            "config.objective.mask_id", mask_id, f"{tokenizer.mask_id}, the tokenizer's", do
        )
    if tower is None:
        return
    num = tokenizer.vocab_size if mask_id is None else tokenizer.num_ids
    if tower.vocab < num:
        of = "the tokenizer's" if mask_id is None else "with the mask's id"
        do = f"set config.model.text_tower.vocab to {num} or more"
        raise check.error("config.model.text_tower.vocab", tower.vocab, f"{of} {num} or more", do)
    ours, theirs = (tower.pad_id, tower.eos_id), (tokenizer.pad_id, tokenizer.eos_id)
    if ours != theirs:
        do = f"set pad_id={theirs[0]} and eos_id={theirs[1]}"
        where = "config.model.text_tower pad_id, eos_id"
        raise check.error(where, ours, f"the tokenizer's {theirs}", do)


def check_refresh(objective: Any) -> None:
    """Raises UserError for an objective with half of a hook (`train.refresh`)."""
    where = f"objective {type(objective).__name__}"
    every, hook = getattr(objective, "refresh_every", None), getattr(objective, "refresh", None)
    if every is None and hook is None:
        return
    if type(every) is not int or every < 1 or hook is None:
        got = f"refresh_every {every!r} and {'no' if hook is None else 'a'} method refresh"
        do = "give both: refresh_every = 200_000, and refresh(state, embed) → state"
        raise check.error(where, got, "a number of samples, 1 or more, and a method", do)
