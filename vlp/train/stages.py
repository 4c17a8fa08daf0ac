"""A run is a list of stages: each an overlay on the config, with its own length, data, objective and schedule.

FLIP's unmasked tuning, CLIPA's lengths and resolutions, freezing and fine-tuning are stages. Samples seen counts over
the whole run; a stage begins where the one before it ended, and its schedule counts from there.
"""

from __future__ import annotations

import collections
import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from vlp.ckpt.keep import Keep, check_keep
from vlp.core import check, plugins
from vlp.core.config import build, build_named, overlay, plain
from vlp.core.mesh import MeshShape
from vlp.core.plugins import Plugin
from vlp.core.types import MICRO_REMAT
from vlp.data.config import Data
from vlp.evals import EVALS
from vlp.models import MODELS, TOWERS
from vlp.models.heads import HEADS
from vlp.models.heads import build as build_heads
from vlp.models.interface import check_fields
from vlp.objectives import OBJECTIVES
from vlp.optim.make import Optim
from vlp.optim.schedules import Schedule
from vlp.train.guard import Spike

MAX_BATCH = 2**26
# Settings that apply only to the stage that sets them: later stages do not inherit them from the base config.
ONCE = ("init", "init_match")


@dataclasses.dataclass(frozen=True)
class Teacher:
    """A teacher: a second model without gradients.

    Without `decay` and `path`, the teacher is the model with the parameters at the start of the stage.

    Attributes:
        decay: makes the teacher the moving average of the trained parameters: average ← decay · average + (1 − decay) ·
            parameters, after each step, without built-in warm-up. A number, or ((progress, decay), …) points over the
            stage, interpolated linearly (a warm-up: ((0, 0.9), (0.1, 0.999))). Methods whose papers update it before
            the forward pass (ALBEF, MoCo) get the same teacher.
        path: workdir of another run, of any architecture, whose model is the teacher.
    """

    decay: float | tuple[tuple[float, float], ...] | None = None
    path: str = ""


@dataclasses.dataclass(frozen=True)
class Stream:
    """A second stream of batches: its data and its own global batch size. `start_samples` is filled in."""

    data: Data
    batch: int
    start_samples: int = 0


@dataclasses.dataclass(frozen=True)
class Run:
    """What holds for all stages. What may change at a restart: `runtime.restart.FREE`."""

    name: str
    seed: int = 0
    mesh: MeshShape = MeshShape()
    platform: str = ""  # "tpu", "gpu", "cpu": stop if JAX found another one
    log_every_steps: int = 10
    save_every_steps: int = 1000
    keep_checkpoints: int = 2  # the newest ones
    keep: Keep = Keep()  # which others
    sinks: tuple[str, ...] = ()  # who follows metrics.jsonl: "tensorboard", "wandb", "clu"
    max_nonfinite_steps: int = 3  # stop after so many in a row whose update was skipped
    spike: Spike = Spike()
    hang_secs: float = 3600.0  # exit 76 with all stacks if nothing moves for so long; 0: never
    grace_secs: float = 30.0  # between SIGTERM and SIGKILL (GCE spot, Kubernetes, Slurm's KillWait)
    plugins: tuple[
        Plugin, ...
    ] = ()  # modules and files of users that extend the tables (core.plugins)


@dataclasses.dataclass(frozen=True)
class Stage:
    """One stage, built. Length: `samples` or `steps` (of `batch`); `index`, `start_samples` are filled in."""

    name: str
    batch: int
    model: Any
    objective: Any
    data: Data
    optim: Optim
    schedule: Schedule
    samples: int = 0
    steps: int = 0
    micro_batches: int = 1
    micro_remat: str = (
        "full"  # what the backward pass keeps of a micro-batch (core.types.MICRO_REMAT)
    )
    streams: Mapping[str, Stream] = dataclasses.field(default_factory=dict)
    teachers: Mapping[str, Teacher] = dataclasses.field(default_factory=dict)
    evals: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    eval_params: str = "student"  # or the name of a teacher ("ema")
    init: str = ""  # workdir whose parameters the stage starts from; not inherited by later stages
    init_match: str = ".*"  # only parameters whose whole name matches ("image_tower/.*")
    keep_opt_state: bool = False
    index: int = 0
    start_step: int = 0
    start_samples: int = 0

    @property
    def num_steps(self) -> int:
        return self.steps or -(-self.samples // self.batch)

    @property
    def end_samples(self) -> int:
        return self.start_samples + self.num_steps * self.batch


SECTIONS = {"data": Data, "optim": Optim, "schedule": Schedule}
SYNONYMS = {"learning_rate": "lr", "batch_size": "batch", "num_steps": "steps"}


def _names(cls: type) -> set[str]:
    return {f.name for f in dataclasses.fields(cls)}


RUN_KEYS = _names(Run)
STAGE_KEYS = _names(Stage) - {"name", "index", "start_step", "start_samples"}


def _unknown(section: str, key: str, known: Iterable[str], where: str = "") -> check.UserError:
    """Returns the error for a key that a section ("": the config itself) lacks; names the section that has it."""
    where = where or f"config.{section}".rstrip(".")
    name = SYNONYMS.get(key, key)
    if name != key and name in known:
        return check.error(where, repr(key), repr(name), f"rename it to {where}.{name}")
    homes = {"": RUN_KEYS | STAGE_KEYS} | {k: _names(cls) for k, cls in SECTIONS.items()}
    for home in (h for h, names in homes.items() if h != section and name in names):
        place = f"config.{home}.{name}".replace("..", ".")
        return check.error(f"{where}.{key}", "a field of another section", place, f"write {place}")
    return check.unknown(where, key, known)


def parse(config: Mapping[str, Any]) -> tuple[Run, tuple[Stage, ...]]:
    """Builds the run and its stages from a loaded config. Every mistake in the config is raised here."""
    config = plain(config)
    if "plugins" in config:
        config = {**config, "plugins": plugins.resolve(config["plugins"])}
    for key in config:
        if key not in RUN_KEYS | STAGE_KEYS | {"stages"}:
            raise _unknown("", key, RUN_KEYS | STAGE_KEYS | {"stages"})
    run = build(Run, {k: v for k, v in config.items() if k in RUN_KEYS}, "config")
    bounds = {
        "hang_secs": (0 <= run.hang_secs < math.inf, "at least 0"),
        "grace_secs": (1 <= run.grace_secs < math.inf, "1 or more"),
    }
    check.bounds("config", run, bounds)
    for key in ("log_every_steps", "save_every_steps", "keep_checkpoints", "max_nonfinite_steps"):
        if getattr(run, key) < 1:
            raise check.error(
                f"config.{key}", getattr(run, key), "1 or more", f"set config.{key} to 1 or more"
            )
    if not 0 <= run.seed < 2**32:  # JAX drops the bits above
        raise check.error(
            "config.seed", run.seed, "0 … 4,294,967,295 (32 bits)", "write a smaller number"
        )
    base = {k: v for k, v in config.items() if k in STAGE_KEYS}
    stages: list[Stage] = []
    seen: collections.Counter[str] = collections.Counter()  # samples, by stream
    patches = config.get("stages") or [{}]
    if not (isinstance(patches, list | tuple) and all(isinstance(p, Mapping) for p in patches)):
        do = """write ({"name": "first", "steps": 10},), with literals only"""
        raise check.error("config.stages", repr(patches)[:80], "a list of dicts", do)
    for i, patch in enumerate(patches):
        where = f"config.stages.{i}" if config.get("stages") else "config"
        for key in patch:
            if key not in STAGE_KEYS | {"name"}:
                raise _unknown("", key, STAGE_KEYS | {"name"}, where)
        inherited = {k: v for k, v in base.items() if not (i and k in ONCE)}
        section = overlay(inherited, patch)
        if "steps" in patch or "samples" in patch:  # a stage's own length replaces the base's
            for key in {"steps", "samples"} - set(patch):
                section.pop(key, None)
        start = (
            (stages[-1].start_step + stages[-1].num_steps, stages[-1].end_samples)
            if stages
            else (0, 0)
        )
        stage = _build(section, where, i, *start, run.plugins)
        streams = {
            name: dataclasses.replace(stream, start_samples=seen[name])
            for name, stream in stage.streams.items()
        }
        for name, stream in streams.items():
            seen[name] += stream.batch * stage.num_steps
        stages.append(dataclasses.replace(stage, streams=streams))
        last = stages[-1]
        if last.start_step + last.num_steps >= 2**31 or last.end_samples >= 2**53:
            got = f"{last.start_step + last.num_steps} steps, {last.end_samples} samples"
            expected = "fewer than 2^31 steps and 2^53 samples in all"
            raise check.error(where, got, expected, "shorten the run")
        names = [s.name for s in stages]
        if len(set(names)) < len(names):
            raise check.error(
                where, f"name {names[-1]!r} twice", "a different name for each stage", "rename it"
            )
    check_keep("config.keep", run.keep)
    label = run.keep.metric.partition("/")[0]
    if label and label not in (known := {name for stage in stages for name in stage.evals}):
        raise check.unknown("config.keep.metric", run.keep.metric, (f"{k}/METRIC" for k in known))
    return run, tuple(stages)


def check_average(where: str, teacher: Teacher) -> None:
    """Raises UserError for an invalid decay of a teacher."""
    decay = teacher.decay
    if isinstance(decay, tuple):
        places, values = zip(*decay) if decay else ((-1,), (-1,))
        rising = sorted(set(places)) == list(places)
        right = rising and min(places + values) >= 0 and max(places + values) <= 1
    else:
        right = decay is None or 0 <= decay < 1
    expected = "in [0, 1), None, or ((progress, decay), …) with rising progress, all in [0, 1]"
    check.bounds(where, teacher, {"decay": (right, expected)})


def evaluators(section: Any, added: Sequence[Plugin] = ()) -> dict[str, Any]:
    """Builds a section of evaluators, by label. Plugins are loaded for those that `vlp` does not have."""
    where = "config.evals"
    if not isinstance(section, Mapping):
        do = "write {} for none"
        raise check.error(where, repr(section), "a section of evaluators", do)
    names = [v.get("name", k) if isinstance(v, Mapping) else k for k, v in section.items()]
    table = plugins.extended("EVALS", EVALS, added, names)
    built = {k: build_named(table, v, f"{where}.{k}", default=k) for k, v in section.items()}
    for key, evaluator in built.items():
        every = getattr(evaluator, "every_steps", 0) >= 0
        rules = {"every_steps": (every, "at least 0 (0: at the end of a stage)")}
        check.bounds(f"{where}.{key}", evaluator, rules)
    return built


def with_heads(model: Any, objective: Any, added: Sequence[Plugin] = ()) -> Any:
    """The model with the heads that the objective declares. Raises UserError for a model that takes none."""
    declared = getattr(objective, "heads", None)
    if not declared:
        return model
    where = f"objective {type(objective).__name__}.heads"
    if not hasattr(model, "heads"):
        got, do = f"a {type(model).__name__}, which has no field heads", "use two_tower"
        raise check.error("config.model", got, f"a model with the heads {sorted(declared)}", do)
    names = [spec.get("name", "") for spec in declared.values() if isinstance(spec, Mapping)]
    table = plugins.extended("HEADS", HEADS, added, names)
    return model.clone(heads=build_heads(declared, where, table))


def _build(
    section: dict[str, Any],
    where: str,
    index: int,
    start_step: int,
    start_samples: int,
    added: Sequence[Plugin],
) -> Stage:
    section = dict(section)
    name = section.pop("name", f"stage{index}")
    tables = {
        "model": plugins.extended("MODELS", MODELS, added),
        "objective": plugins.extended("OBJECTIVES", OBJECTIVES, added),
    }
    for key, table in tables.items():
        if key not in section:
            raise check.error(where, "no value", f"a section {key}", f"set {where}.{key}")
        towers = plugins.extended("TOWERS", TOWERS, added) if key == "model" else {}
        section[key] = build_named(table, section[key], f"config.{key}", more=towers)
    section["model"] = with_heads(section["model"], section["objective"], added)
    check_fields(section["model"], "config.model")
    section["evals"] = evaluators(section.get("evals", {}), added)
    section.setdefault("optim", {})
    built = {"index": index, "start_step": start_step, "start_samples": start_samples, "name": name}
    built |= {k: section.pop(k) for k in ("model", "objective", "evals")}
    for key, cls in SECTIONS.items():
        if key not in section:
            raise check.error(where, "no value", f"a section {key}", f"set {where}.{key}")
        for name in section[key] if isinstance(section[key], Mapping) else ():
            if name not in _names(cls):
                raise _unknown(key, name, _names(cls))
        section[key] = build(cls, section[key], f"config.{key}")
    stage = build(Stage, section | built, "config")
    if stage.micro_remat not in MICRO_REMAT:
        raise check.unknown("config.micro_remat", stage.micro_remat, MICRO_REMAT)
    batches = {"config.batch": stage.batch}
    batches |= {f"config.streams.{k}.batch": s.batch for k, s in stage.streams.items()}
    for key, batch in batches.items():
        if not 1 <= batch <= MAX_BATCH:
            expected = "1 or more" if batch < 1 else f"at most {MAX_BATCH:,}"
            raise check.error(key, batch, expected, f"set {key} to {expected}")
    if bool(stage.steps) == bool(stage.samples) or stage.num_steps < 1:
        got = f"steps={stage.steps}, samples={stage.samples}"
        raise check.error(
            where, got, "one of them above 0", "give the stage's length in samples or in steps"
        )
    for key, teacher in stage.teachers.items():
        if teacher.path and teacher.decay is not None:
            do = "drop one of them"
            raise check.error(f"config.teachers.{key}", "decay and path", "one of them", do)
        where = f"config.teachers.{key}"
        check_average(where, teacher)
        if key == "student":
            raise check.error(where, "the name 'student'", "another name", "rename it")
    check.pattern("config.init_match", stage.init_match)
    if index and stage.init and stage.keep_opt_state:
        do = "drop keep_opt_state, or init"
        got = "True together with init: the optimiser state belongs to other parameters"
        raise check.error(f"config.stages.{index}.keep_opt_state", got, "one of them", do)
    known = ("student", *(k for k, t in stage.teachers.items() if t.decay is not None))
    if stage.eval_params not in known:
        raise check.unknown("config.eval_params", stage.eval_params, known)
    stage.schedule.at(stage.batch, stage.num_steps)
    return stage
