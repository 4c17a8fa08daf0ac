"""A run's workdir, open: its checkpoints, metrics and signals, and what a checkpoint says of itself."""

from __future__ import annotations

import dataclasses
import logging
import os
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from jax.sharding import Mesh

from vlp.ckpt.manager import Checkpoints
from vlp.core import paths, tree
from vlp.core.appended import Appended
from vlp.core.config import difference, plain
from vlp.infer import golden
from vlp.optim import make as optimisers
from vlp.runtime import hosts, locks, preflight, sinks
from vlp.runtime import workdir as files
from vlp.runtime.profile import Profile
from vlp.runtime.stop import Stop
from vlp.runtime.watchdog import Watchdog
from vlp.train import summary
from vlp.train.guard import Guard
from vlp.train.rollback import Rollback
from vlp.train.stages import Run
from vlp.train.state import State

log = logging.getLogger(__name__)
REST = (
    "step",
    "stage_step",
    "opt",
    "teachers",
    "method_state",
)  # of a State: all but the parameters


@dataclasses.dataclass(frozen=True)
class Session:
    """What all stages share."""

    config: dict[str, Any]
    settings: Run
    workdir: paths.Path
    mesh: Mesh
    checkpoints: Checkpoints
    metrics: files.Metrics
    stop: Stop
    watchdog: Watchdog
    versions: dict[str, Any]
    lock: locks.Lock
    profile: Profile
    quarantine: Appended  # bad records that this process met
    guard: Guard
    rollbacks: tuple[Rollback, ...]
    scores: dict[int, dict[str, float]] = dataclasses.field(default_factory=dict)  # by step


def open_session(
    config: dict[str, Any],
    settings: Run,
    workdir: paths.Path,
    mesh: Mesh,
    stop: Stop,
    plans: Sequence[StagePlan],
    position: Mapping[str, int],
    guard: Guard,
    rollbacks: tuple[Rollback, ...] = (),
    profile: tuple[int, int] | None = None,
) -> Session:
    """Creates the workdir, or opens it to continue from `position`. This is the first write of a run."""
    with hosts.raise_together("--workdir"):
        lock = locks.lock(workdir)
    last = plans[-1].stage
    done = position["step"] == last.start_step + last.num_steps
    states = [] if done else [saved_part(plan.abstract) for plan in plans]
    preflight.check_workdir(workdir, states, settings.keep_checkpoints)
    note = lambda step: files.write_json(workdir / "saved.json", {"step": step})
    checkpoints = Checkpoints(
        workdir / "checkpoints", settings.keep_checkpoints, on_saved=note, more=settings.keep
    )
    if position["step"]:
        note(position["step"])
    checkpoints.set_aside_after(position["step"])
    first = plans[0]
    versions = files.versions() | {"data": getattr(first.main.source, "info", {})}
    files.write_json(workdir / "config.json", config)
    files.write_json(workdir / "versions.json", versions)
    files.write_bytes(workdir / "tokenizer.model", first.main.tokenizer.to_bytes())
    table = parameters(first.abstract.params)
    files.write_bytes(workdir / "parameters.txt", f"{table}\n".encode())
    followers = sinks.make(settings.sinks, workdir, config)
    with hosts.raise_together("config.sinks"):  # a server may refuse
        metrics = files.Metrics(workdir / "metrics.jsonl", position["step"], followers)
    return Session(
        config,
        settings,
        workdir,
        mesh,
        checkpoints,
        metrics,
        stop,
        Watchdog(settings.hang_secs, workdir / "heartbeats"),
        versions,
        lock,
        Profile(workdir / "profile", profile),
        Appended(workdir / f"quarantine_{jax.process_index()}.jsonl"),
        guard,
        rollbacks,
    )


def say_model(session: Session, plans: Sequence[StagePlan]) -> None:
    """Logs what will be trained: the plan (stages, parameters by part), data, where every parameter is, rules."""
    first = plans[0]
    params = first.abstract.params
    log.info("%s", summary.table([summary.row(plan) for plan in plans]))
    num = summary.parameters(first.stage.model, params)["total"]
    devices = session.versions["devices"]
    device = session.versions["device"]
    log.info("%s: %s parameters on %s × %s", session.config["name"], f"{num:,}", devices, device)
    where = first.stage.data.path or first.stage.data.source
    log.info("data: %s records, %s", f"{first.main.num_records:,}", where)
    log.info("every parameter: %s", session.workdir / "parameters.txt")
    log.info("%s", optimisers.table(first.stage.optim.rules, params))


def parameters(params: Any) -> str:
    """A line per parameter: name, shape, type, size, mesh axes of its dimensions."""
    rows = [("parameter", "shape", "type", "size", "mesh axes")]
    for name, leaf in tree.named(params).items():
        spec = getattr(getattr(leaf, "sharding", None), "spec", ())
        axes = ["+".join(a) if isinstance(a, tuple) else a for a in spec if a]
        shape = " × ".join(map(str, leaf.shape)) or "a number"
        rows.append((name, shape, str(leaf.dtype), f"{tree.size(leaf):,}", ", ".join(axes)))
    wide = [max(len(row[k]) for row in rows) for k in range(4)]
    line = f"{{:{wide[0]}}}  {{:{wide[1]}}}  {{:{wide[2]}}}  {{:>{wide[3]}}}  {{}}"
    return "\n".join(line.format(*row).rstrip() for row in rows)


def last_meta(workdir: paths.Path) -> dict[str, Any] | None:
    """Returns the metadata of the newest complete checkpoint; None without a checkpoint."""
    if not paths.is_dir(workdir / "checkpoints"):
        files.check_saved(workdir)
        return None
    checkpoints = Checkpoints(workdir / "checkpoints", create=False)
    step = checkpoints.newest()
    if step is None:
        files.check_saved(workdir)
        return None
    return checkpoints.meta(step)


def say_changes(meta: Mapping[str, Any] | None, session: Session) -> None:
    """Logs changes of packages and settings since the checkpoint, after which numbers may differ."""
    here = {k: v for k, v in session.versions.items() if k != "data"}
    before = {k: v for k, v in (meta or {}).get("versions", here).items() if k != "data"}
    if meta:
        here["plugins"] = session.config.get("plugins", [])
        before["plugins"] = meta["config"].get("plugins", [])
    for change in difference(before, here):
        log.info("since the checkpoint: %s", change)


def save(
    session: Session, plan: StagePlan, state: State, stage_step: int, interval: Mapping[str, Any]
) -> None:
    """Flushes the metrics to disk, then starts a checkpoint that refers to them.

    interval: sums of metrics since the last row (`Interval.plain`).
    """
    session.watchdog.beat("save", plan.stage.start_step + stage_step)
    session.lock.check()
    session.metrics.flush()
    session.quarantine.flush()
    stage = plan.stage
    step = stage.start_step + stage_step
    samples = stage.start_samples + stage_step * stage.batch
    position = {"step": step, "stage": stage.index, "stage_step": stage_step, "samples": samples}
    meta = {"position": position, "interval": interval, "guard": session.guard.plain()}
    meta["rollbacks"] = [dataclasses.asdict(r) for r in session.rollbacks if r.step <= step]
    meta |= description(session, plan)
    meta |= {
        "scores": session.scores.get(step, {}),
        "golden": golden_pair(session, plan, state),
    }
    session.checkpoints.save(step, *saved_part(state), meta)


def saved_part(state: State) -> tuple[Any, dict[str, Any]]:
    """Returns what a checkpoint holds: the parameters, and all the rest."""
    return state.params, {k: getattr(state, k) for k in REST}


def note_save(session: Session) -> None:
    """Logs how long the last save took, once it is on disk."""
    if (secs := session.checkpoints.save_secs) is not None:
        session.checkpoints.save_secs = None
        session.stop.note_save(secs)


def golden_pair(session: Session, plan: StagePlan, state: State) -> dict[str, Any]:
    """The golden pair of the trained parameters and of those that are evaluated; {} if compiling it would take time
    that a process asked to stop may not have."""
    stage, trees = plan.stage, {"student": state.params}
    if stage.eval_params != "student":
        trees[stage.eval_params] = state.teachers[stage.eval_params]
    stop = session.stop
    if stop.rescuing or (stop.stopped and not golden.compiled(stage.model, session.mesh)):
        return {}
    return golden.describe(stage.model, trees, stage.data, plan.main.tokenizer, session.mesh)


def restore(session: Session, plan: StagePlan, step: int) -> State:
    """The state of a checkpoint, in this run's shardings."""
    target = plan.abstract
    rest = {k: getattr(target, k) for k in REST}
    params, rest = session.checkpoints.restore(step, target.params, rest)
    log.info("restored step %d", step)
    return State(params=params, **rest)


def description(session: Session, plan: StagePlan) -> dict[str, Any]:
    """All that is needed to use the parameters elsewhere."""
    tokenizer = plan.main.tokenizer
    return {
        "config": session.config,
        "stage": plan.stage.index,
        "tokenizer": files.encode_bytes(tokenizer.to_bytes()),
        "preprocessing": plain(plan.stage.data),
        "heads": specifications(plan.stage.objective),
        "versions": session.versions,
        "cwd": os.getcwd(),  # what relative paths of the config mean
        **description_of_data(plan),
    }


def specifications(objective: Any) -> dict[str, Any]:
    """Returns the objective's heads as plain data; one that is given as a module is left out."""
    declared = getattr(objective, "heads", None) or {}
    return {name: plain(spec) for name, spec in declared.items() if isinstance(spec, Mapping)}


def description_of_data(plan: StagePlan) -> dict[str, Any]:
    """Returns what must be equal when the run continues."""
    return {
        "tokenizer_sha256": plan.main.tokenizer.sha256,
        "fingerprints": {name: data.fingerprint for name, data in plan.datasets.items()},
    }
