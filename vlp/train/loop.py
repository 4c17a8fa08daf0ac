"""The training loop: data, step, log, evaluate, save. The same loop trains every method, stage and machine."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import functools
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from tqdm import tqdm

from vlp.core import check, flags, local, paths, plugins, progress
from vlp.core import mesh as meshes
from vlp.core.appended import Appended
from vlp.core.config import plain
from vlp.data.dataset import start_plan
from vlp.runtime import hosts, notices
from vlp.runtime import workdir as files
from vlp.runtime.profile import check_range
from vlp.runtime.sinks import check_sinks
from vlp.runtime.stop import PREEMPTED, Stop
from vlp.train import bar as bars
from vlp.train import nonfinite, refresh, rollback
from vlp.train.build import StagePlan, in_order, prepare
from vlp.train.evaluation import between, due_evals, evaluate_all, make_up
from vlp.train.guard import Guard
from vlp.train.metrics import (
    BROKEN,
    FINE,
    Clock,
    Interval,
    Sums,
    flops_frac,
    input_metrics,
    values,
)
from vlp.train.session import (
    Session,
    description_of_data,
    last_meta,
    note_save,
    open_session,
    save,
    say_changes,
    say_model,
)
from vlp.train.stages import parse
from vlp.train.start import changed, check_length, check_start, start_stage
from vlp.train.state import State

log = logging.getLogger(__name__)
AHEAD = 2  # steps queued on the device while the host prepares the next one


def run(
    config: Mapping[str, Any],
    directory: str | os.PathLike,
    profile: tuple[int, int] | None = None,
    extend: bool = False,
) -> int:
    """Starts or continues training. Going back to a checkpoint (`train.rollback`) is a start like any other.

    Args, Returns and Raises: as `start`.
    """
    while True:
        try:
            return start(config, directory, profile, extend)
        except rollback.GoBack:
            profile = None  # its steps may be over


def start(
    config: Mapping[str, Any],
    directory: str | os.PathLike,
    profile: tuple[int, int] | None = None,
    extend: bool = False,
) -> int:
    """Trains from the last checkpoint, or from the start, to the end.

    Args:
        config: the whole config.
        directory: the work directory, which is created.
        profile: first and last step to profile, counted from 1 over the whole run.
        extend: whether the last stage's length may differ from that of the run's last start.

    Returns:
        The exit code: 0, or 75 if the run was pre-empted and saved.

    Raises:
        UserError: a mistake in the config or the work directory.
        Failed: loss or gradient are not finite in several steps in a row, or the parameters in one.
        GoBack: the loss jumped, and the run is to be started again.
    """
    resolved: dict[str, Any] = plain(config)
    if "plugins" in resolved:
        resolved["plugins"] = plugins.resolve(resolved["plugins"])
    workdir = paths.parse("--workdir", directory)
    with hosts.raise_together("start"):
        flags.pin()
        settings, stages = parse(resolved)
        files.check_config(workdir, resolved, extend)
        check_sinks(settings.sinks)
        check_platform(settings.platform)
        mesh = meshes.make(settings.mesh)
    with jax.set_mesh(mesh), Stop(settings.grace_secs) as stop, notices.watched(stop.ask):
        meta = last_meta(workdir)
        position = meta["position"] if meta else {"step": 0, "stage": 0, "stage_step": 0}
        total = stages[-1].start_step + stages[-1].num_steps
        with hosts.raise_together("config.data") as reported:
            check_range(profile, position["step"], total)
            plans = []
            for stage in stages:
                with progress.phase(f"opening the data of stage {stage.name!r}, tracing its step"):
                    plans.append(prepare(stage, settings, mesh))
            rollbacks = rollback.read(workdir, meta)
            plans = in_order(plans, rollbacks)
            check_start(plans, position, meta)
            check_length(plans[-1].stage, position)
            if meta:
                old = files.latest(workdir, meta["config"])
                own = {"plugins": resolved["plugins"]} if "plugins" in resolved else {}
                changes = changed(stages, old | own, position)
                plans = [dataclasses.replace(p, renewed=e) for p, e in zip(plans, changes.evals)]
                if extend or changes.text:
                    flag = "--extend" if extend else "since the last start"
                    log.info("%s: %s", flag, changes.text or "nothing differs")
            reported |= {plan.stage.name: description_of_data(plan) for plan in plans}
        guard = Guard(settings.spike, (meta or {}).get("guard"))
        session = open_session(
            resolved, settings, workdir, mesh, stop, plans, position, guard, rollbacks, profile
        )
        say_model(session, plans)
        say_changes(meta, session)
        return train_stages(session, plans, position, Interval((meta or {}).get("interval")))


def train_stages(
    session: Session, plans: Sequence[StagePlan], position: dict[str, int], interval: Interval
) -> int:
    """Trains from `position` to the end of the run, or until it is asked to stop; closes the session.

    Args:
        session: the run's open files, mesh, watchdog and profiler.
        plans: all stages.
        position: of the checkpoint to continue from.
        interval: sums of metrics since the last logged row.

    Returns:
        The exit code, as of `run`.
    """
    state, stop, last, step = None, session.stop, plans[-1].stage, position["step"]

    def finish() -> None:
        session.checkpoints.wait()
        session.lock.close()

    stop.finish = finish  # where a thread ends the process
    # closes the parts in reverse order, also if one of them fails to close
    with contextlib.ExitStack() as closing:
        for part in (
            session.lock, session.checkpoints, session.watchdog, session.metrics, session.quarantine,
        ):  # fmt: skip
            closing.callback(part.close)
        closing.callback(session.profile.close)
        for plan in plans[position["stage"] :]:
            with progress.phase(f"entering stage {plan.stage.name!r}"), stop.holding(step):
                state = start_stage(session, plan, state, position if state is None else None)
            first, num = int(state.stage_step), plan.stage.num_steps
            phase = lambda: f"training: {session.watchdog.phase}"
            with (
                progress.phase(phase, since=lambda: session.watchdog.last),
                bars.shown(plan.stage.name, first, num) as bar,
            ):
                state = train_stage(session, plan, state, interval, bar)
            step, left = int(state.step), due_evals(plan, int(state.stage_step))
            if stop.stopped and (step < last.start_step + last.num_steps or left):
                session.checkpoints.wait()  # the line below is true only after this
                log.info("stopped at step %d and saved; the same command continues", step)
                return PREEMPTED
        with stop.holding(step):  # asked to stop, it waits for nothing else
            session.checkpoints.wait()
        note_save(session)
        log.info("done: %s", session.workdir)
        return 0


def train_stage(
    session: Session, plan: StagePlan, state: State, interval: Interval, bar: tqdm
) -> State:
    """Trains to the end of the stage, or until the process is asked to stop.

    Args:
        session: the run's open files, mesh, watchdog and profiler.
        plan: the stage, its data and its compiled step.
        state: the state to start from.
        interval: sums of metrics since the last logged row.
        bar: progress bar.

    Returns:
        The last state, which is also saved.
    """
    stage, settings, stop = plan.stage, session.settings, session.stop
    first = saved = int(state.stage_step)
    if first and not make_up(session, plan, state, first):
        return state
    batches = feed(plan, settings.seed, first, session.mesh, session.quarantine)
    clock = Clock(stage.batch, flops_frac(plan, session.mesh))
    pending: collections.deque[Done] = (
        collections.deque()
    )  # dispatched steps whose metrics are not read yet

    def record(ahead: int = 0) -> None:
        """Reads the metrics of all steps except the last `ahead`, which may still run."""
        while len(pending) > ahead:
            write_step(session, plan, pending.popleft(), clock, bar)

    def keep(done: int) -> None:
        """Saves the state, of `done` steps, unless its checkpoint exists."""
        nonlocal saved
        if done != saved:
            record()
            save(session, plan, state, done, interval.plain())
            saved = done

    for number in range(first, stage.num_steps):
        step, last = stage.start_step + number + 1, number + 1 == stage.num_steps
        held = functools.partial(keep, number)
        rollback.tell(session, plan, number)
        if refresh.due(stage, number):
            record()
            with clock.paused(), between(session, "refresh", step - 1, held) as going:
                state = refresh.refreshed(session, plan, state, number)
            if not going:
                held()
                break
        session.watchdog.beat("data", step - 1)
        with stop.holding(step - 1, held):
            batch = clock.wait(lambda: next(batches))
        session.watchdog.beat(
            f"step {number + 1}" if number > first else "compiling the step", step
        )
        session.profile.before(step)
        compiling = stop.holding(step - 1, held) if number == first else contextlib.nullcontext()
        with compiling, jax.profiler.StepTraceAnnotation("train", step_num=step):
            state, metrics = plan.step(state, batch)
        stop.work()
        session.profile.after(step, metrics)
        status = interval.add(metrics)
        logging_due = last or not number or (number + 1) % settings.log_every_steps == 0
        records = {k: v for k, v in batch.items() if k.rpartition("/")[2] == "record"}
        sums = interval.take() if logging_due else None
        pending.append(Done(number + 1, metrics, status, records, sums))
        record(ahead=AHEAD if number else 0)
        session.checkpoints.look()
        note_save(session)
        bar.update()
        if not bar.disable:
            progress.said()
        stopping = stop.poll()
        due = [] if stopping else due_evals(plan, number + 1)  # made up for at the next start
        if due or last or stopping or step % settings.save_every_steps == 0:
            record()
            with clock.paused():
                stopping |= not evaluate_all(
                    session, plan, state, due, functools.partial(keep, number + 1)
                )
                if last or stopping or step % settings.save_every_steps == 0:
                    keep(number + 1)
                    stopping = stopping or (not last and stop.poll())  # asked while it saved
        if stopping:
            break
    return state


def feed(
    plan: StagePlan, seed: int, stage_step: int, mesh: Mesh, quarantine: Appended
) -> Iterator[dict[str, jax.Array]]:
    """Yields the global batches of a stage, as arrays on the devices.

    The samples of a batch depend only on the number of samples seen before, so a resumed run gets the same ones.

    Args:
        plan: the stage and its datasets.
        seed: of the order and of all draws.
        stage_step: steps of the stage that are already done.
        mesh: the run's mesh.
        quarantine: where bad records are listed.

    Yields:
        {leaf: array [B …]}, with the leaves of another stream named "stream/leaf".
    """
    streams = {
        name: _batches(plan, name, seed, stage_step, mesh, quarantine) for name in plan.datasets
    }
    for batches in zip(*streams.values()):
        named = {
            f"{n}/{k}" if n else k: v
            for n, leaves in zip(streams, batches)
            for k, v in leaves.items()
        }
        yield meshes.to_global(named, mesh)


def _batches(
    plan: StagePlan, name: str, seed: int, stage_step: int, mesh: Mesh, quarantine: Appended
) -> Iterator[dict[str, np.ndarray]]:
    """Yields this host's batches of one stream ("": the main one). Arguments: as of `feed`."""
    stage, data = plan.stage, plan.datasets[name]
    batch = stage.streams[name].batch if name else stage.batch
    samples = (stage.num_steps - stage_step) * batch
    reading = start_plan(data, batch=batch, samples=samples, num_hosts=jax.process_count())
    log.info("%s: %s", f"data of stream {name!r}" if name else "data", reading)
    for first, num in rollback.stretches(plan.rollbacks, stage_step, stage.num_steps):
        yield from data.train_iter(
            start=plan.position(first, name),
            batch=batch,
            num_batches=num,
            seed=seed,
            quarantine=quarantine,
            rows=local.rows(batch, mesh),
        )


@dataclasses.dataclass(frozen=True)
class Done:
    """A dispatched step: its number in the stage (from 1), its metrics and status, still on the device."""

    number: int
    metrics: dict[str, jax.Array]
    status: jax.Array
    records: dict[str, jax.Array]  # the record ids of each stream's batch
    sums: Sums | None  # of the metrics since the last row; None if no row is due


def write_step(session: Session, plan: StagePlan, done: Done, clock: Clock, bar: Any) -> None:
    """Waits for a step, checks that its metrics are finite, and writes a row of means if one is due.

    Args:
        session: the run's open files.
        plan: the stage.
        done: the step.
        clock: counts steps and the time since the last row.
        bar: progress bar.

    Raises:
        Failed: the parameters are not finite, or too many updates in a row were skipped.
        GoBack: the loss jumped; the run starts again from a checkpoint.
    """
    stage = plan.stage
    clock.count()
    number, step = done.number, stage.start_step + done.number
    row = {"kind": "train", "step": step, "samples": stage.start_samples + number * stage.batch}
    row["stage"] = stage.name
    status, loss = jax.device_get((done.status, done.metrics["loss"]))
    spiked = session.guard.see(float(loss), applied=bool(status == FINE))
    if status != FINE:
        nonfinite.refuse(session, plan, done.metrics, done.records, row, bool(status == BROKEN))
    if spiked:
        rollback.go_back(session, plan, step, "spike", float(loss))
    if done.sums is None:
        return
    averages, warm = values(done.sums), clock.warm
    times = clock.read() | input_metrics(plan, number)
    session.metrics.write(row | averages | times)
    rate, wait = times["time/examples_per_s"], times["time/data_wait_frac"]
    if wait > 0.05:
        limit = plan.main.loader_stats.limiting()
        log.info("waiting for data %.0f%% of the time; slowest loader stage: %s", 100 * wait, limit)
    bar.set_postfix_str(
        f"loss {averages['loss']:.3f}, {rate:.0f} examples/s, waiting for data {wait:.0%}"
    )
    if bar.disable:
        left = (stage.num_steps - number) * stage.batch / max(rate, 1e-9)
        pace = f"{rate:.0f} examples/s  {left:.0f} s left" if warm else "compiled"
        log.info(
            "[%d] %s %d/%d  loss %.4f  %s  data wait %.0f%%",
            step, stage.name, number, stage.num_steps, averages["loss"], pace, 100 * wait,
        )  # fmt: skip


def check_platform(wanted: str) -> None:
    """Raises UserError if JAX's devices are not of the kind that config.platform names ("": any)."""
    found = jax.default_backend()
    if wanted and wanted != found:
        do = (
            "check the installation (pip install 'vlp[tpu]' or 'vlp[cuda]'), or set config.platform"
        )
        raise check.error("config.platform", f"{found} devices", wanted, do)
