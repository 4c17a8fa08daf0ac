"""Evaluations during a run: after a step, and those of a restored step that are missing. They end early if the run is
to stop; the next start makes up for them."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax

from vlp.core import agree, check, interrupt
from vlp.core.types import Apply
from vlp.evals.io import IO, own_names
from vlp.runtime import workdir as files
from vlp.train.build import StagePlan
from vlp.train.session import Session
from vlp.train.state import State

log = logging.getLogger(__name__)


def due_evals(plan: StagePlan, stage_step: int) -> list[str]:
    """Returns the labels of the evaluators to run after step `stage_step` of the stage (from 1)."""
    stage = plan.stage
    step, last = stage.start_step + stage_step, stage_step == stage.num_steps
    every = lambda e: e.every_steps and step % e.every_steps == 0
    return [name for name, e in stage.evals.items() if last or every(e)]


def evaluate_all(
    session: Session, plan: StagePlan, state: State, labels: Sequence[str], keep: Callable[[], None]
) -> bool:
    """Runs evaluators; returns False if the run is to stop, in which case the state is saved.

    keep: saves the state. A failed evaluation raises after that, so that it loses no training.
    """
    step = int(state.step) if labels else 0
    for label in labels:
        try:
            with between(session, f"eval {label}", step, keep) as going:
                evaluate(session, plan, state, label, step)
        except Exception:
            keep()
            raise
        if not going:
            keep()
            return False
    return True


def make_up(session: Session, plan: StagePlan, state: State, stage_step: int) -> bool:
    """Runs the evaluations of a restored step that are missing in metrics.jsonl, and those changed since; returns False
    if the run is to stop."""
    step = plan.stage.start_step + stage_step
    rows = session.metrics.begun if jax.process_index() == 0 else []
    done = {row.get("eval") for row in rows if row["kind"] == "eval" and row["step"] == step}
    done -= plan.renewed
    due = due_evals(plan, stage_step)
    missing = agree.share("evaluations to make up for", [n for n in due if n not in done])
    for name in missing:
        why = "added or changed" if name in plan.renewed else "was due when the run stopped"
        log.info("[%d] %s: %s; made up for now", step, name, why)
        try:
            with between(session, f"eval {name}", step) as going:
                evaluate(session, plan, state, name, step)
        except Exception as e:
            if stage_step == plan.stage.num_steps:
                raise
            log.warning("[%d] %s: failed again (%s: %s); skipped", step, name, type(e).__name__, e)
            continue
        if not going:
            return False
    return True


def evaluate(session: Session, plan: StagePlan, state: State, label: str, step: int) -> None:
    """Runs one evaluator on the current parameters, and writes its results to metrics.jsonl and the log."""
    stage = plan.stage
    began = time.monotonic()
    params = state.params if stage.eval_params == "student" else state.teachers[stage.eval_params]
    write = lambda name, value: files.write_artefact(session.workdir, name, {"step": step} | value)
    io = own_names(stage.evals, label, IO(stage.data, plan.main.tokenizer, write))
    results = list(stage.evals[label](Apply(stage.model, params), session.mesh, io))
    samples = stage.start_samples + (step - stage.start_step) * stage.batch
    row: dict[str, Any] = {
        "kind": "eval",
        "step": step,
        "samples": samples,
        "stage": stage.name,
        "eval": label,
    }
    row |= {r.metric: r.value for r in results} | dict(results[0].provenance if results else {})
    session.metrics.write(row | {"time/eval_s": round(time.monotonic() - began, 3)})
    text = "  ".join(f"{r.metric} {r.value:.4g}" for r in results)
    log.info("[%d] %s: %s", step, label, text)
    scores = session.scores.setdefault(step, {})
    scores |= {f"{label}/{r.metric}": float(r.value) for r in results}
    metric = session.settings.keep.metric
    if metric.partition("/")[0] == label and metric not in scores:
        raise check.unknown("config.keep.metric", metric, scores)


@contextlib.contextmanager
def between(
    session: Session, phase: str, step: int, keep: Callable[[], None] | None = None
) -> Iterator[list[str]]:
    """Inside, between two steps, work may end early: if the run is to stop, at the work's next `interrupt.poll`.

    Args:
        session: the run.
        phase: the work, for the watchdog.
        step: steps done.
        keep: saves their state; None: it is saved.

    Yields:
        A list, empty afterwards if the work ended early.
    """
    going = [phase]

    def poll() -> None:
        session.watchdog.beat(phase, step)
        session.stop.check()

    session.watchdog.beat(phase, step)
    try:
        with session.stop.holding(step, keep), interrupt.polled(poll):
            yield going
    except interrupt.Stopped:
        going.clear()
