"""Meshes and micro-batches of whole steps: the same losses, an n-th of the bytes, a k-th of the activations."""

import functools

import numpy as np
import pytest

from vlp.models.captioner import Captioner, Multimodal
from vlp.models.text import Text
from vlp.models.vit import ViT
from vlp.objectives.coca import Coca
from vlp.optim.make import Optim

TOWER = dict(width=32, depth=1, heads=2, mlp=64, dropout=0.1)
MODEL = Captioner(ViT(patch=4, **TOWER), Text(vocab=24, **TOWER), Multimodal(1), embed=8, queries=3)


@pytest.fixture(scope="module")
def losses(training, random_params, make_batch):
    """(optimiser, mesh) → losses of five steps with masks and dropout on."""
    params = random_params(MODEL, 16, 8)
    batches = [make_batch(start=8 * k) for k in range(5)]

    @functools.cache
    def run(name, shape):
        case = training(model=MODEL, objective=Coca(keep=0.5), params=params, optim=Optim(name))
        return [float(m["loss"]) for m in case.steps(batches, shape)[1]]

    return run


@pytest.mark.parametrize("shape", [(1, 8, 1), (1, 4, 2)], ids=str)
@pytest.mark.parametrize("name, rtol", [("adamw", 1e-4), ("adafactor", 1e-4), ("lion", 1e-3)])
def test_losses_of_five_steps(name, rtol, shape, losses):
    want = losses(name, (8, 1, 1))
    assert abs(want[-1] - want[0]) > 100 * rtol
    np.testing.assert_allclose(losses(name, shape), want, rtol=rtol)
