"""Skipping a step costs no second copy of the state."""

import jax
import numpy as np

from helpers import runs
from vlp.core import mesh as meshes
from vlp.train import build, step
from vlp.train.stages import parse


def peak(config):
    """Bytes of the compiled step's arguments and temporaries, and of the parameters."""
    settings, (stage,) = parse(config)
    mesh = meshes.make(settings.mesh, devices=jax.devices()[:1])
    compiler = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", False)  # as in training
    with jax.set_mesh(mesh):
        plan = build.assemble(stage, settings, mesh)
        memory = plan.step.lower(plan.abstract, plan.batch).compile().memory_analysis()
    jax.config.update("jax_disable_most_optimizations", compiler)
    sizes = [np.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(plan.abstract.params)]
    return memory.argument_size_in_bytes + memory.temp_size_in_bytes, sum(sizes)


def test_the_peak_of_a_step_that_may_be_skipped_grows_by_less_than_one_percent(monkeypatch, toy):
    """Beside a step that is always applied. The state is nearly all of the memory here."""
    config = runs.changed(runs.TOY, teachers={"ema": {"decay": 0.9}}, **{"model.embed": 8192})
    skips, params = peak(config)
    monkeypatch.setattr(step, "changed_if", lambda wanted, change, x: change(x))
    always, _ = peak(config)
    assert params > 4e6 and skips <= 1.01 * always, (skips, always, params)
