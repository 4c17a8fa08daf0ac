"""Meshes and micro-batches of a masked CoCa with dropout: the same losses, an n-th of the bytes, a k-th of the
activations."""

import functools
import pathlib

import flax.linen as nn
import jax
import numpy as np
import pytest

from vlp.core import mesh as meshes
from vlp.core import tree
from vlp.core.config import load
from vlp.core.mesh import MeshShape
from vlp.models.text import Text
from vlp.models.two_tower import Decoder, Poolers, TwoTower
from vlp.models.vit import ViT
from vlp.objectives.coca import Coca
from vlp.optim import make as optimisers
from vlp.train import state as states
from vlp.train.build import abstract_batch, abstract_state
from vlp.train.stages import parse

TOWER = dict(width=32, depth=1, heads=2, mlp=64, dropout=0.1)
MODEL = TwoTower(
    ViT(patch=4, **TOWER),
    Text(vocab=24, **TOWER),
    embed=8,
    decoder=Decoder(1),
    poolers=Poolers(queries=3),
)


@pytest.fixture(scope="module")
def case(training, random_params):
    params = random_params(MODEL, 16, 8)
    return training(model=MODEL, objective=Coca(keep_ratio=0.5), params=params)


@pytest.fixture(scope="module")
def losses(case, make_batch):
    """(optimiser, mesh) → losses of five steps. The gradients are compiled once a mesh for all optimisers."""

    @functools.cache
    def run(name, shape):
        mesh, _ = case.on(shape, {})
        updater = optimisers.make(optimisers.Optim(name), case.params)
        with jax.set_mesh(mesh):
            create = lambda p: states.create(p, updater, {}, (), 0)
            abstract = jax.eval_shape(create, case.params)
            layout = states.shardings(case.boxed, updater, abstract, mesh)
            state = jax.device_put(create(case.params), layout)
            out = (layout.params, layout.opt, meshes.replicated(mesh))
            update = jax.jit(updater.update, out_shardings=out, compiler_options=case.quick)
            factored = [k for k, x in tree.named(state.opt).items() if "v_row" in k and x.size > 1]
            assert bool(factored) == (name == "adafactor")
            params, opt, found = state.params, state.opt, []
            for k in range(5):
                batch = meshes.to_global(make_batch(start=8 * k), mesh)
                loss, grads = case.compiled(1, True)(params, batch, (), {})
                params, opt, _ = update(grads, opt, params, 3e-3)
                found.append(float(loss))
        return found

    return run


@pytest.mark.parametrize("shape", [(1, 8, 1), (1, 4, 2)], ids=str)
@pytest.mark.parametrize("name, rtol", [("adamw", 1e-4), ("adafactor", 1e-4), ("lion", 1e-3)])
def test_losses_of_five_steps(name, rtol, shape, losses):
    want = losses(name, (8, 1, 1))
    assert len(set(want)) == 5 and np.isfinite(want).all()
    np.testing.assert_allclose(losses(name, shape), want, rtol=rtol)


@pytest.mark.parametrize("shape, n", [((1, 8, 1), 8), ((1, 4, 2), 8), ((2, 4, 1), 4)], ids=str)
@pytest.mark.parametrize("optimiser", ["adamw", "adafactor"])
def test_bytes_of_coca_base(optimiser, shape, n):
    """By shapes: a device holds an n-th of the parameters and of the optimiser's state."""
    config = pathlib.Path(__file__).parents[2] / "configs" / "coca.py"
    _, (stage, *_) = parse(load(f"{config}:size=base"))
    mesh = meshes.make(MeshShape(*shape))
    batch = abstract_batch(stage, mesh)
    boxed = states.abstract_params(stage.model, stage.objective, batch)
    updater = optimisers.make(optimisers.Optim(optimiser), nn.unbox(boxed))
    state = abstract_state(stage, boxed, {}, updater, mesh)
    leaves = jax.tree.leaves((state.params, state.opt))
    shard = lambda x: np.prod(x.sharding.shard_shape(x.shape))
    whole = sum(x.size * x.dtype.itemsize for x in leaves)
    one = sum(shard(x) * x.dtype.itemsize for x in leaves)
    assert whole > 2e9
    assert one == pytest.approx(whole / n, rel=0.05)


def test_activations_of_micro_batches(case, make_batch, error):
    """Eight micro-batches: the same gradients, an eighth of the activations by the compiler's figure."""
    batch, temp, grads = make_batch(64), {}, {}
    with jax.set_mesh(case.on((1, 1, 1), {})[0]):
        for k in (1, 8):
            program = case.compiled(k, True).lower(case.params, batch, (), {}).compile()
            temp[k] = program.memory_analysis().temp_size_in_bytes
            grads[k] = program(case.params, batch, (), {})[1]
    assert error(grads[8], grads[1]) < 1e-5
    assert temp[8] < temp[1] / 6
