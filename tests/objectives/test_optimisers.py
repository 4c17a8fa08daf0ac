"""Adafactor and Lion on a mesh: the same parameters as on one device, factored moments and all."""

import numpy as np
import pytest

from vlp.core import tree
from vlp.models.dual import Dual
from vlp.models.text import Text
from vlp.models.vit import ViT
from vlp.objectives.clip import Clip
from vlp.optim.make import Optim

TOWER = dict(width=32, depth=1, heads=1, mlp=64)
MODEL = Dual(ViT(patch=4, pool="mean", **TOWER), Text(vocab=24, pool="eos", **TOWER), embed=8)


@pytest.mark.parametrize("name", ["adafactor", "lion"])
def test_sharded_equals_unsharded(name, training, random_params, make_batch):
    params = random_params(MODEL, 16, 8)
    case = training(model=MODEL, objective=Clip(keep=0.5), params=params, optim=Optim(name))
    batches = [make_batch(start=8 * k) for k in range(2)]
    one, many = (case.steps(batches, shape)[0][-1] for shape in ((1, 1, 1), (1, 8, 1)))
    factored = [k for k, x in tree.named(one.opt).items() if "v_row" in k and x.size > 1]
    assert len(factored) >= 8 if name == "adafactor" else not factored
    rtol, few = (1e-4, 0) if name == "adafactor" else (1e-5, 5)
    others = tree.named(many.params)
    for leaf, a in tree.named(one.params).items():
        if not leaf.endswith(
            "qkv/bias"
        ):  # a key's bias has no gradient but rounding, made large here
            apart = ~np.isclose(a, others[leaf], rtol=rtol, atol=1e-5)
            assert apart.sum() <= few, leaf  # Lion: the sign of a gradient near zero may turn
