"""The state at the start of a stage: restored from a checkpoint, taken from the previous stage, or fresh."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vlp.ckpt import init_from
from vlp.core import check, tree
from vlp.core import mesh as meshes
from vlp.core.config import plain
from vlp.infer.load import load
from vlp.runtime import workdir as files
from vlp.train import state as states
from vlp.train.build import StagePlan, make_method_state, same_shapes, teachers_shapes
from vlp.train.session import Session, description_of_data, restore
from vlp.train.stages import Stage, parse
from vlp.train.state import State


def check_start(
    plans: Sequence[StagePlan], position: Mapping[str, int], meta: Mapping[str, Any] | None
) -> None:
    """Raises UserError for data unlike the checkpoint's, and for parameters that a later stage could not take over."""
    if meta:
        found = description_of_data(plans[position["stage"]])
        for key, value in found.items():
            if meta.get(key, value) != value:
                do = "bring back the run's data, or start a new --workdir"
                raise check.error("config.data", f"other {key}", "the checkpoint's", do)
    for previous, plan in zip((None, *plans), plans):
        stage = plan.stage
        if stage.index < position["stage"] or (stage.index == position["stage"] and meta):
            continue  # already entered
        where = f"stage {stage.name!r}"
        if previous is not None:
            init_from.check_fits(previous.abstract.params, plan.abstract.params, where)
            if stage.keep_opt_state and not same_shapes(previous.abstract.opt, plan.abstract.opt):
                do = "set keep_opt_state=False for this stage"
                raise check.error(
                    where, "an optimiser state of other shapes", "the stage before's", do
                )
        given = initial(stage) if stage.init else {}
        check_clamps(previous, plan, given)
        if stage.init:
            init_from.check_fits(given, plan.abstract.params, source(stage))
            check_frozen(plan, given)
        elif stage.init_match != ".*":
            do = "set config.init to that run's workdir"
            expected = "config.init, a run to take these parameters from"
            raise check.error("config.init_match", repr(stage.init_match), expected, do)


def check_length(last: Stage, position: Mapping[str, int]) -> None:
    """Raises UserError if the last stage would end before the checkpoint's step."""
    if position["stage"] == last.index and position["stage_step"] > last.num_steps:
        got, done = f"{last.num_steps} steps", position["stage_step"]
        do = "give it more, or choose another --workdir"
        raise check.error(f"stage {last.name!r}", got, f"the {done} that it has, or more", do)


@dataclasses.dataclass(frozen=True)
class Changes:
    """What a start does otherwise than the one before it, in words; and each stage's evaluators that are new or
    changed."""

    text: str
    evals: tuple[frozenset[str], ...]


def changed(
    stages: Sequence[Stage], old: Mapping[str, Any], position: Mapping[str, int]
) -> Changes:
    """Returns the differences from the config `old` of the last start, and their effect on the learning rate."""
    _, before = parse(old)
    found, evals = [], []
    for stage, other in zip(stages, before):
        labels = frozenset(k for k in stage.evals if other.evals.get(k) != stage.evals[k])
        evals.append(labels)
        if lost := sorted(other.evals.keys() - stage.evals.keys()):
            found.append(f"stage {stage.name!r}: evaluators removed: {', '.join(lost)}")
        if labels:
            names = ", ".join(sorted(labels))
            found.append(f"stage {stage.name!r}: evaluators added or changed: {names}")
    stage, other = stages[-1], before[-1]
    if stage.num_steps != other.num_steps:
        found.append(f"stage {stage.name!r} has {stage.num_steps:,} steps, not {other.num_steps:,}")
        step = position["stage_step"] if position["stage"] == stage.index else 0
        was, now = (s.schedule.at(s.batch, s.num_steps) for s in (other, stage))
        places = range(step, min(stage.num_steps, other.num_steps) + 1)
        some = np.unique(np.linspace(places[0], places[-1], 9, dtype=np.int64)).tolist()
        if any(abs(float(was(n)) - float(now(n))) > 1e-6 * float(was(n)) for n in some):
            found.append(
                f"its schedule depends on the length: the rate at its step {step:,} goes from "
                f"{float(was(step)):.3g} to {float(now(step)):.3g}, unlike in a run of this length"
            )
    return Changes("; ".join(found), tuple(evals))


def check_clamps(previous: StagePlan | None, plan: StagePlan, given: Mapping[str, Any]) -> None:
    """Raises UserError for a parameter that may start outside of its clamp, where the first update would move it."""
    rules = tree.named(plan.updater.rules)
    before = {} if previous is None else tree.named(previous.updater.rules)
    start = getattr(plan.stage.model, "scale", None)
    for name, rule in rules.items():
        if rule.freeze or rule.clamp is None:
            continue
        low, high = rule.clamp
        if name in given:
            what, values = (
                source(plan.stage),
                (float(np.min(given[name])), float(np.max(given[name]))),
            )
        elif name in before:
            what, values = "the stage before", before[name].clamp or (-math.inf, math.inf)
        elif name.endswith("logit_scale") and start is not None:
            what, values = "config.model.scale", (math.log(start), math.log(start))
        else:
            continue
        if values[0] < low - 1e-6 or values[1] > high + 1e-6:
            got = f"{values[0]:.4g} … {values[1]:.4g} from {what}"
            if values[0] == values[1]:
                got = f"{values[0]:.4g} (its exponential is {math.exp(values[0]):.4g}) from {what}"
            do = "give config.optim.rules one for it with a wider clamp, or None"
            expected = f"a start in the clamp of its rule, [{low:.4g}, {high:.4g}]"
            raise check.error(f"stage {plan.stage.name!r}: {name}", got, expected, do)


def check_frozen(plan: StagePlan, given: Mapping[str, Any]) -> None:
    """Raises UserError for parameters that `init` should have given, did not, and that are never trained."""
    rules = tree.named(plan.updater.rules)
    match = plan.stage.init_match
    lost = [n for n, r in rules.items() if r.freeze and re.fullmatch(match, n) and n not in given]
    if lost:
        got = f"no {lost[0]!r}" + (f" and {len(lost) - 1} more" if lost[1:] else "")
        do = "start from a run of the same architecture, or do not freeze them"
        raise check.error(source(plan.stage), got, "every parameter that is frozen here", do)


def source(stage: Stage) -> str:
    return f"stage {stage.name!r}: init from {stage.init}"


def initial(stage: Stage) -> dict[str, Any]:
    """What `init` gives: the other run's parameters that match `init_match`."""
    return init_from.select_params(load(stage.init).apply.params, stage.init_match, source(stage))


def start_stage(
    session: Session, plan: StagePlan, previous: State | None, position: dict[str, Any] | None
) -> State:
    """Returns the state to train from: restored, taken from the previous stage, or fresh."""
    stage, mesh = plan.stage, session.mesh
    files.write_json(session.workdir / "preprocessing.json", plain(stage.data))
    if position is not None and position["stage_step"] > 0:
        return restore(session, plan, position["step"])
    where = f"stage {stage.name!r}"
    if previous is not None and same_shapes(previous.params, plan.abstract.params):
        params = previous.params
    else:
        loaded = {name: load(t.path).apply for name, t in stage.teachers.items() if t.path}
        nets = teachers_shapes(stage, loaded)
        seed = session.settings.seed
        params = states.init_params(stage.model, stage.objective, plan.batch, seed, mesh, nets)
        if previous is not None:
            params = init_from.transfer_params(previous.params, params, where)
    if stage.init:
        params = init_from.transfer_params(initial(stage), params, source(stage))
    teachers = {}
    for name, teacher in stage.teachers.items():
        if teacher.path:
            teachers[name] = jax.device_put(
                load(teacher.path).apply.params, meshes.replicated(mesh)
            )
        elif teacher.decay is not None and previous is not None and name in previous.teachers:
            teachers[name] = init_from.transfer_params(
                previous.teachers[name], params, f"{where}: teacher {name!r}"
            )
        else:
            teachers[name] = jax.tree.map(jnp.copy, params)
    if previous is not None and same_shapes(previous.method_state, plan.abstract.method_state):
        method_state = previous.method_state
    else:
        method_state = make_method_state(plan, session.settings.seed)
    state = states.create(params, plan.updater, teachers, method_state, stage.start_step)
    if stage.keep_opt_state and previous is not None:
        state = dataclasses.replace(state, opt=previous.opt)
    return jax.device_put(state, jax.tree.map(lambda x: x.sharding, plan.abstract))
