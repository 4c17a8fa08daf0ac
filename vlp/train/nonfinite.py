"""Steps whose loss, gradient or parameters are not finite: skipped, listed, and after several in a row the end."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from vlp.core import check
from vlp.core import mesh as meshes
from vlp.data import order
from vlp.runtime import workdir as files
from vlp.train import rollback
from vlp.train.build import StagePlan
from vlp.train.metrics import APPLIED, FINITE
from vlp.train.session import Session

log = logging.getLogger(__name__)
MAX_KEYS = 1024  # of a batch that are listed: each costs a read of its record


def refuse(
    session: Session,
    plan: StagePlan,
    metrics: Mapping[str, jax.Array],
    records: Mapping[str, jax.Array],
    row: Mapping[str, Any],
    broken: bool,
) -> None:
    """Tells of a step whose loss, gradient or parameters are not finite, and lists its batch in nonfinite_stepN.json.

    Args:
        session: the run's open files.
        plan: the stage.
        metrics: of the step.
        records: the record ids u32[B, 2] of each stream's batch.
        row: the start of its row in metrics.jsonl.
        broken: whether the parameters are not finite; else the update was skipped.

    Raises:
        Failed: the parameters are not finite, or too many updates in a row were skipped.
        GoBack: the same, and there is a checkpoint to go back to.
    """
    settings, guard, step = session.settings, session.guard, row["step"]
    found = {k: float(v) for k, v in jax.device_get(metrics).items() if k != APPLIED}
    path = session.workdir / f"nonfinite_step{step}.json"
    listed = {"step": step, "metrics": found}
    for name in sorted(records):
        data = plan.datasets[name.rpartition("/")[0]]
        ids = order.join_words(meshes.to_host(records[name])).tolist()
        some = ids[: MAX_KEYS if jax.process_index() == 0 else 4]
        batch = {"records": ids, "keys": [data.key(i) for i in some]}
        if name == "record":
            listed |= batch
        else:
            listed |= {"streams": listed.get("streams", {}) | {name.rpartition("/")[0]: batch}}
    files.write_json(path, listed)
    session.metrics.write({**row, "kind": "nonfinite", **found})
    session.metrics.flush()
    got = ", ".join(f"{k} {found[k]}" for k in FINITE)
    if all(np.isfinite(found[k]) for k in FINITE):
        got += ", and a statistic or the method's state not finite"
    if not broken and guard.in_a_row < settings.max_nonfinite_steps:
        text = "[%d] update skipped (%d in a row): %s; the batch is listed in %s"
        log.warning(text, step, guard.in_a_row, got, path)
        return
    if not broken and settings.spike.factor:
        rollback.go_back(session, plan, step, "nonfinite", found["loss"])
    often = "" if broken else f" (steps in a row whose updates were skipped: {guard.in_a_row})"
    do = "lower the learning rate or inspect these records"
    if not broken:
        do += "; config.max_nonfinite_steps and config.spike may change when the run is continued"
    raise check.Failed(
        f"step {step}: got {got}{often}, expected finite numbers; see {path} for the batch "
        f"(keys {', '.join(listed['keys'][:4])}, …), {do}"
    )
