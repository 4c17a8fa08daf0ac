"""Going back to an earlier checkpoint, and leaving out the data that was read since.

A decision is written down before it takes effect: rollbacks.json in the workdir, a row of metrics.jsonl, and the meta
of every later checkpoint. The samples of a step are a function of the step and of these decisions, so a restart, on any
number of hosts, repeats them.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import logging
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from vlp.ckpt import together
from vlp.core import check, paths
from vlp.runtime import workdir as files

if TYPE_CHECKING:
    from vlp.train.build import StagePlan
    from vlp.train.session import Session

log = logging.getLogger(__name__)
FILE = "rollbacks.json"


@dataclasses.dataclass(frozen=True)
class Rollback:
    """A decision: after `step`, the next `left_out` batches of every stream are not read.

    Attributes:
        number: how many there were so far, with this one.
        step: of the checkpoint that the run went back to.
        stage, stage_step: index of the stage, and `step` within it.
        left_out: number of batches.
        found: the step after which it was decided.
        why: "spike" or "nonfinite".
        loss: of that step; median: of the steps before.
    """

    number: int
    step: int
    stage: int
    stage_step: int
    left_out: int
    found: int
    why: str
    loss: float
    median: float


class GoBack(Exception):
    """Raised after a decision was written down: the run starts again from its checkpoint."""


def read(workdir: paths.Path, meta: Mapping[str, Any] | None) -> tuple[Rollback, ...]:
    """Returns the decisions of a run: of its workdir, or of a checkpoint if those are newer (the file was lost)."""
    path = workdir / FILE
    lists = [(meta or {}).get("rollbacks", [])]
    if paths.exists(path):
        try:
            lists.append(json.loads(paths.read(path)))
        except ValueError:
            do = "remove it: the checkpoints' meta has the decisions up to each"
            raise check.error(str(path), "a broken file", "the run's rollbacks", do) from None
    rows = max(lists, key=lambda rows: max((row["number"] for row in rows), default=0))
    return tuple(Rollback(**row | _floats(row)) for row in rows)


def _floats(row: Mapping[str, Any]) -> dict[str, float]:
    return {k: float(row[k]) for k in ("loss", "median")}  # stored as strings if not finite


def extended(rollbacks: Sequence[Rollback], new: Rollback) -> tuple[Rollback, ...]:
    """Adds a decision. It replaces those that took effect at its step or later, whose data it leaves out, too."""
    return (*(r for r in rollbacks if r.step < new.step), new)


def left_out(rollbacks: Sequence[Rollback], stage_step: int) -> int:
    """Returns how many batches of a stage are left out before its step after `stage_step`.

    rollbacks: those of the stage.
    """
    return sum(r.left_out for r in rollbacks if r.stage_step <= stage_step)


def stretches(rollbacks: Sequence[Rollback], first: int, last: int) -> list[tuple[int, int]]:
    """Returns (stage step, number of steps) of the stretches of a stage from step `first` to `last` between which
    data is left out."""
    cuts = sorted({first, last} | {r.stage_step for r in rollbacks if first < r.stage_step < last})
    return [(a, b - a) for a, b in itertools.pairwise(cuts)]


def go_back(session: Session, plan: StagePlan, found: int, why: str, loss: float) -> None:
    """Writes down the decision to go back, and raises GoBack. Returns if the stage has no checkpoint to go back to.

    Args:
        session: the run.
        plan: the stage.
        found: the step (of the run) after which it is decided.
        why: "spike" or "nonfinite".
        loss: of that step.

    Raises:
        GoBack: the decision is written; close the run and start it again.
        Failed: the run went back `max_rollbacks` times before.
    """
    spike, stage, checkpoints = session.settings.spike, plan.stage, session.checkpoints
    median, before = session.guard.median, session.rollbacks
    if (number := max((r.number for r in before), default=0) + 1) > spike.max_rollbacks:
        raise check.Failed(
            f"step {found}: got a loss of {loss:.4g} (median before: {median:.4g}) after {number - 1} rollbacks, "
            "expected no more; look at the data and the learning rate, or raise config.spike.max_rollbacks"
        )
    checkpoints.wait()  # so that all processes know the same ones
    margin = max(spike.margin_steps, 1)
    old = [s for s in checkpoints.steps() if stage.start_step <= s <= found - margin]
    step = next((s for s in reversed(old) if not checkpoints.problem(s)), None)
    if step is None:
        text = "[%d] loss %.4g (median before: %.4g): no checkpoint of this stage is %d steps older; going on"
        log.warning(text, found, loss, median, margin)
        return
    at, inside = step - stage.start_step, [r for r in plan.rollbacks if r.step >= step]
    new = Rollback(
        number=number,
        step=step,
        stage=stage.index,
        stage_step=at,
        left_out=found - step + left_out(inside, found - stage.start_step),
        found=found,
        why=why,
        loss=loss,
        median=median,
    )
    log.warning(
        "[%d] loss %.4g (median before: %.4g): back to step %d, without the %d batches read since",
        found, loss, median, step, new.left_out,
    )  # fmt: skip
    # In this order: a run that dies between the two does these steps again, and decides again.
    checkpoints.set_aside_after(step, "spike")
    rows = [dataclasses.asdict(r) for r in extended(before, new)]
    files.write_json(session.workdir / FILE, rows)
    together.meet("rollback")  # after it, every process reads the same file
    raise GoBack


def tell(session: Session, plan: StagePlan, stage_step: int) -> None:
    """Writes a row for the decisions that take effect after `stage_step`, unless metrics.jsonl has it."""
    due = [r for r in plan.rollbacks if r.stage_step == stage_step]
    rows = session.metrics.begun if due else []
    have = {(row["step"], row.get("number")) for row in rows if row["kind"] == "rollback"}
    for r in (r for r in due if (r.step, r.number) not in have):
        samples = plan.stage.start_samples + stage_step * plan.stage.batch
        session.metrics.write({"kind": "rollback", "samples": samples} | dataclasses.asdict(r))
