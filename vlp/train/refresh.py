"""An objective's hook between steps: recomputes clusters, prototypes or banks every `refresh_every` samples.

The hook is `refresh(state, embed) → state`. The trainer calls it before the first step of a stage, and before the first
step at or after every multiple of `refresh_every` samples seen. The result depends only on the parameters, the method
state and the number of samples seen. A checkpoint is written before the call, so a run that is stopped at any step,
including one that refreshes, resumes with the same numbers.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from vlp.core import check, interrupt, local
from vlp.core import mesh as meshes
from vlp.core.appended import Appended
from vlp.core.types import Apply, Ctx
from vlp.train.build import StagePlan
from vlp.train.session import Session
from vlp.train.stages import Stage
from vlp.train.state import State, arrays_of

log = logging.getLogger(__name__)
PyTree = Any


@dataclasses.dataclass(frozen=True)
class Embed:
    """What `refresh` may ask of the present model: `embed(f, num)`.

    samples: number of samples the run has seen. rng(): a NumPy generator that depends only on the seed and on it.
    position: in the main stream, of the sample that the next step reads first.
    """

    plan: StagePlan
    state: State
    mesh: Mesh
    quarantine: Appended
    seed: int
    samples: int
    position: int

    def rng(self) -> np.random.Generator:
        return np.random.default_rng((self.seed, self.samples))

    def __call__(self, f: Callable[[Ctx], PyTree], num: int) -> PyTree:
        """Evaluates a function of the batch on the next samples of the main stream, which training has yet to see.

        Args:
            f: f(ctx) → leaves that lead with the batch axis, without dropout and masks (`ctx.keys` is None). Compiled
                once if it is a method of the objective or a function of a module.
            num: Number of samples.

        Returns:
            What f returns, as NumPy arrays that lead with `num`, the same on every process.
        """
        stage = self.plan.stage
        data, batch = self.plan.main, stage.batch
        nets = tuple((name, net) for name, (net, _) in self.plan.teachers.items())
        run = _compiled(f, stage.model, nets, stage.micro_batches)
        found = []
        for rows in data.train_iter(
            start=self.position,
            batch=batch,
            num_batches=-(-num // batch),
            seed=self.seed,
            quarantine=self.quarantine,
            rows=local.rows(batch, self.mesh),
        ):
            interrupt.poll()
            out = run(self.state.params, self.state.teachers, meshes.to_global(rows, self.mesh))
            found.append(jax.tree.map(meshes.to_host, out))
        return jax.tree.map(lambda *parts: np.concatenate(parts)[:num], *found)


@functools.lru_cache(maxsize=8)
def _compiled(
    f: Callable[[Ctx], PyTree], model: Any, nets: tuple[tuple[str, Any], ...], num_micro: int
) -> Callable[..., PyTree]:
    def run(params: PyTree, averages: dict[str, PyTree], batch: dict[str, jax.Array]) -> PyTree:
        frozen = {name: Apply(net, averages[name]) for name, net in nets}
        return f(Ctx(Apply(model, params), batch, frozen=frozen, num_micro=num_micro))

    return jax.jit(run)


def due(stage: Stage, stage_step: int) -> bool:
    """Returns whether the method state is refreshed before the step after `stage_step`."""
    every = getattr(stage.objective, "refresh_every", 0)
    seen = stage.start_samples + stage_step * stage.batch
    return bool(every) and (stage_step == 0 or seen // every > (seen - stage.batch) // every)


def refreshed(session: Session, plan: StagePlan, state: State, stage_step: int) -> State:
    """Returns the state with the method state refreshed by the objective.

    Raises:
        UserError: the arrays have other names, shapes or types than before.
    """
    stage, began = plan.stage, time.monotonic()
    seen = stage.start_samples + stage_step * stage.batch
    before = jax.tree.map(meshes.to_host, state.method_state)
    seed, position = session.settings.seed, plan.position(stage_step)
    embed = Embed(plan, state, session.mesh, session.quarantine, seed, seen, position)
    after = jax.tree.map(np.asarray, stage.objective.refresh(before, embed))
    old, new = arrays_of(before), arrays_of(after)
    for name in sorted(old.keys() | new.keys()):
        if old.get(name) != new.get(name):
            where = f"objective {type(stage.objective).__name__}: refresh: method_state{name}"
            got, expected = new.get(name, "no array"), old.get(name, "no array")
            do = "return the arrays that init_method_state makes, with the same types"
            raise check.error(where, got, expected, do)
    place = lambda v, x: jax.make_array_from_callback(v.shape, x.sharding, lambda at: v[at])
    method_state = jax.tree.map(place, after, plan.abstract.method_state)
    step = stage.start_step + stage_step
    log.info("[%d] method state refreshed in %.1f s", step, time.monotonic() - began)
    return dataclasses.replace(state, method_state=method_state)
