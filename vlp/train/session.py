"""A run's workdir, open: its checkpoints, metrics and signals, and what a checkpoint says of itself."""

from __future__ import annotations

import dataclasses
import logging
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import IO, Any

from jax.sharding import Mesh

from vlp.ckpt.manager import Checkpoints
from vlp.core import tree
from vlp.core.config import difference, plain
from vlp.optim import make as optimisers
from vlp.runtime import hosts, sinks
from vlp.runtime import workdir as files
from vlp.runtime.profile import Profile
from vlp.runtime.watchdog import Stop, Watchdog
from vlp.train import summary
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
    workdir: pathlib.Path
    mesh: Mesh
    checkpoints: Checkpoints
    metrics: files.Metrics
    stop: Stop
    watchdog: Watchdog
    versions: dict[str, Any]
    lock: IO[str]
    profile: Profile


def open_session(
    config: dict[str, Any],
    settings: Run,
    workdir: pathlib.Path,
    mesh: Mesh,
    stop: Stop,
    first: StagePlan,
    position: Mapping[str, int],
    profile: tuple[int, int] | None = None,
) -> Session:
    """Creates the workdir, or opens it to continue from `position`. This is the first write of a run."""
    with hosts.raise_together("--workdir"):
        lock = files.lock(workdir)
    note = lambda step: files.write_json(workdir / "saved.json", {"step": step})
    checkpoints = Checkpoints(workdir / "checkpoints", settings.keep_checkpoints, on_saved=note)
    if position["step"]:
        note(position["step"])
    checkpoints.set_aside_after(position["step"])
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


def last_meta(workdir: pathlib.Path) -> dict[str, Any] | None:
    """Returns the metadata of the newest complete checkpoint; None without a checkpoint."""
    if not (workdir / "checkpoints").is_dir():
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
    session.watchdog.beat("save")
    session.metrics.flush()
    stage = plan.stage
    step = stage.start_step + stage_step
    samples = stage.start_samples + stage_step * stage.batch
    position = {"step": step, "stage": stage.index, "stage_step": stage_step, "samples": samples}
    meta = {"position": position, "interval": interval, **description(session, plan)}
    rest = {k: getattr(state, k) for k in REST}
    session.checkpoints.save(step, state.params, rest, meta)


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
