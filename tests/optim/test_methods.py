"""Adafactor and Lion against their equations in float64, the moments' type, and rates that fall from block to block."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vlp.core import tree
from vlp.core.check import UserError
from vlp.optim import make as optimisers
from vlp.optim.make import Optim, Rule

EVERY = (Rule(".*"),)
RNG = np.random.default_rng(0)
# One leaf that Adafactor factors (two dimensions of 32 or more, stacked three times), one that it does not.
PARAMS = {
    "kernel": RNG.normal(size=(3, 32, 40)).astype(np.float32),
    "bias": RNG.normal(size=(7,)).astype(np.float32),
}
GRADS = [
    {k: (10.0**-s * RNG.normal(size=x.shape)).astype(np.float32) for k, x in PARAMS.items()}
    for s in range(4)
]


def train(optim, params=PARAMS, grads=GRADS, lr=0.1):
    """Parameters after each step, and the last state."""
    updater = optimisers.make(optim, params)
    opt, out, update = updater.init(params), [], jax.jit(updater.update)
    for g in grads:
        params, opt, _ = update(g, opt, params, lr)
        out.append(params)
    return out, opt


def lion(params, lr, b1, b2, decay):
    """Chen et al. 2023, algorithm 2."""
    m = {k: np.zeros(x.shape) for k, x in params.items()}
    for g in GRADS:
        for k in params:
            update = np.sign(b1 * m[k] + (1 - b1) * g[k])
            params[k] = params[k] - lr * (update + decay * params[k])
            m[k] = b2 * m[k] + (1 - b2) * g[k]
        yield dict(params)


def adafactor(params, lr, b1, b2, decay):
    """Shazeer & Stern 2018, algorithms 4 and 5 (eps1 1e-30, d 1), with b2's ceiling and the average of b1."""
    m = {k: np.zeros(x.shape) for k, x in params.items()}
    rows, columns, whole = np.zeros((3, 32)), np.zeros((3, 40)), np.zeros(7)
    for t, grads in enumerate(GRADS, 1):
        rate = min(b2, 1 - t**-0.8)
        square = {k: np.float64(g) ** 2 + 1e-30 for k, g in grads.items()}
        rows = rate * rows + (1 - rate) * square["kernel"].mean(axis=2)
        columns = rate * columns + (1 - rate) * square["kernel"].mean(axis=1)
        whole = rate * whole + (1 - rate) * square["bias"]
        estimate = [np.outer(r, c) / r.mean() for r, c in zip(rows, columns)]
        for k, v in {"kernel": np.stack(estimate), "bias": whole}.items():
            u = grads[k] / np.sqrt(v)
            u = u / max(1, np.sqrt((u**2).mean()))
            m[k] = b1 * m[k] + (1 - b1) * u
            params[k] = params[k] - lr * (m[k] + decay * params[k])
        yield dict(params)


@pytest.mark.parametrize("equations", [lion, adafactor])
def test_equals_its_equations(equations):
    name = equations.__name__
    paper = {"lion": (0.9, 0.99), "adafactor": (0.9, 0.999)}[name]
    capped = (0.8, 0.5)  # b2 below what 1 − t^−0.8 reaches
    for betas, given in [(paper, {}), (capped, dict(b1=0.8, b2=0.5))]:
        got, _ = train(Optim(name, weight_decay=0.3, clip_norm=None, rules=EVERY, **given))
        want = equations({k: np.float64(x) for k, x in PARAMS.items()}, 0.1, *betas, 0.3)
        for ours, by_hand in zip(got, want, strict=True):
            for k in PARAMS:
                np.testing.assert_allclose(ours[k], by_hand[k], rtol=1e-4, atol=1e-5, err_msg=k)


@pytest.mark.parametrize("name", ["adamw", "adafactor", "lion"])
def test_first_moments_in_bfloat16(name):
    """They take half the memory, and training stays close."""
    full, _ = train(Optim(name, rules=EVERY, weight_decay=0.0))
    half, opt = train(Optim(name, rules=EVERY, weight_decay=0.0, mu_dtype="bfloat16"))
    moments = [x for x in jax.tree.leaves(opt) if x.dtype == jnp.bfloat16]
    assert sorted(x.shape for x in moments) == [(3, 32, 40), (7,)]
    assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(half))
    moved = full[-1]["kernel"] - PARAMS["kernel"]
    apart = full[-1]["kernel"] - half[-1]["kernel"]  # Lion: a sign may turn, on a leaf of 3,840
    assert 0 < np.linalg.norm(apart) < 0.05 * np.linalg.norm(moved)


def test_adafactor_keeps_rows_and_columns():
    _, opt = train(Optim("adafactor", rules=EVERY))
    sizes = {name: leaf.size for name, leaf in tree.named(opt).items() if "kernel" in name}
    assert sorted(sizes.values()) == [1, 3 * 32, 3 * 40, 3 * 32 * 40]  # v, rows, columns, average


def test_the_rate_falls_from_block_to_block():
    """Block k of n at decay^(n − k), whatever the optimiser and the leaf's rank; the decay falls with it."""
    params = {
        "encoder": {
            "blocks": {
                "kernel": np.ones((3, 2, 2), np.float32),
                "bias": np.ones((3, 2), np.float32),
            }
        }
    }
    params["head"] = np.ones(2, np.float32)
    grads = [jax.tree.map(np.ones_like, params)]
    rules = (Rule(".*/blocks/.*", lr=2.0, layer_decay=0.5), Rule(".*"))
    plain, _ = train(Optim("lion", weight_decay=0.5, rules=EVERY), params, grads)
    got, _ = train(Optim("lion", weight_decay=0.5, rules=rules), params, grads)
    np.testing.assert_array_equal(got[0]["head"], plain[0]["head"])
    for leaf in ("kernel", "bias"):
        ratio = (1 - got[0]["encoder"]["blocks"][leaf]) / (1 - plain[0]["encoder"]["blocks"][leaf])
        np.testing.assert_allclose(ratio.reshape(3, -1).mean(1), [0.25, 0.5, 1.0], rtol=1e-5)
    with pytest.raises(UserError, match="config.optim.rules: got head, expected leaves of stacked"):
        optimisers.make(Optim(rules=(Rule(".*", layer_decay=0.5),)), params)


def test_mistakes_in_the_optimiser_are_one_line():
    with pytest.raises(UserError, match="config.optim.name: got 'adam', expected one of .*did you"):
        Optim("adam")
    with pytest.raises(UserError, match="config.optim.mu_dtype: got float16, expected 'float32'"):
        Optim(mu_dtype="float16")


@pytest.mark.parametrize("depth", [2, 40])
def test_adafactor_takes_each_block_on_its_own(depth):
    """A stack of any depth is updated as so many separate models are: moments, clipping and average."""
    rng = np.random.default_rng(1)
    shapes = {"kernel": (32, 48), "heads": (36, 3, 2, 33), "bias": (40,), "scale": (5,)}
    draw = lambda: {
        # blocks whose gradients differ in size by far: a shared clip would show
        k: (rng.normal(size=(depth, *s)).T * 10.0 ** rng.uniform(-3, 3, depth)).T.astype(np.float32)
        for k, s in shapes.items()
    }
    params, *grads = ({"encoder": {"blocks": draw()}} for _ in range(4))
    optim = Optim("adafactor", rules=EVERY, clip_norm=None)
    got, _ = train(optim, params, grads)
    block = lambda tree, k: jax.tree.map(lambda x: x[k], tree["encoder"]["blocks"])
    for k in (0, depth // 2, depth - 1):
        alone, _ = train(optim, block(params, k), [block(g, k) for g in grads])
        for ours, own in zip(got, alone, strict=True):
            for name in shapes:
                np.testing.assert_allclose(block(ours, k)[name], own[name], rtol=2e-5, atol=1e-6)
