"""Stacks: the scan, rematerialisation and precision change no numbers; dropout draws per example."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from helpers import runs
from vlp.core import tree
from vlp.models.layers import REMAT, BlockConfig, Norm, Stack, drop, fold

CONFIG = BlockConfig(width=16, heads=2, mlp=32, dropout=0.1, drop_path=0.1)
STACK = Stack(2, CONFIG)
KEYS = jax.random.split(jax.random.key(0), 3)
RNG = np.random.default_rng(0)
X, CONTEXT = (jnp.asarray(RNG.normal(size=(3, n, 16)), jnp.float32) for n in (5, 4))
MASK = jnp.asarray((RNG.uniform(size=(3, 5, 5)) < 0.6) | np.eye(5, dtype=bool))


def value_and_grads(stack, params, x):
    def loss(params, x):
        y, layers = stack.apply(
            {"params": params}, x, context=CONTEXT, mask=MASK, keys=KEYS, causal=True, collect=True
        )
        return (jnp.sin(y) + jnp.cos(layers).sum(axis=0)).sum()

    return jax.jit(jax.value_and_grad(loss, (0, 1)))(params, x)


def with_config(**changes):
    return Stack(2, dataclasses.replace(CONFIG, **changes))


@functools.cache
def weights():
    shapes = jax.eval_shape(lambda key: STACK.init(key, X, context=CONTEXT), jax.random.key(0))
    rng = np.random.default_rng(1)
    draw = lambda s: 0.25 * rng.normal(size=s.shape).astype(np.float32)
    return jax.tree.map(draw, nn.unbox(shapes["params"]))


@functools.cache
def reference():
    return value_and_grads(STACK, weights(), X)


@pytest.mark.parametrize(
    "change",
    [dict(scan=False)]
    + [dict(remat=name) for name in REMAT if name != "none"]
    + [dict(remat="full", scan=False)],
    ids=str,
)
def test_scan_and_remat_change_no_numbers(change):
    value, grads = value_and_grads(with_config(**change), weights(), X)
    want, want_grads = reference()
    np.testing.assert_allclose(value, want, rtol=1e-6)
    difference = jax.tree.map(lambda a, b: a - b, grads, want_grads)
    assert float(tree.norm(difference)) < 1e-5 * float(tree.norm(want_grads))


@pytest.mark.parametrize("policy", [name for name in REMAT if name != "none"])
def test_remat_really_recomputes(policy):
    """The policies differ in what they save: each program has its own number of products."""
    program = lambda stack: str(jax.make_jaxpr(lambda p: value_and_grads(stack, p, X))(weights()))
    plain, remat = program(STACK), program(with_config(remat=policy))
    assert "remat" not in plain and "remat" in remat
    if policy == "full":
        assert remat.count("dot_general") > plain.count("dot_general")


def test_each_layer_draws_its_own_dropout():
    """Two equal layers that add 1 to everything, where dropout lets them."""
    add_one = {"kernel": 0.0, "bias": 1.0}

    def fixed(name, x):
        part, leaf = name.split("/")[-2:]
        return np.full_like(x, add_one[leaf] * (part == "down")) if part in ("out", "down") else x

    params = tree.map_named(fixed, weights())
    layers = jax.jit(lambda k: STACK.apply({"params": params}, X, keys=k, collect=True)[1])(KEYS)
    first, second = np.asarray(layers[0] - X), np.asarray(layers[1] - layers[0])
    for added in (first, second):
        kept = added > 0.5
        np.testing.assert_allclose(added, kept / 0.81, atol=1e-5)  # dropout 0.1, drop path 0.1
    assert ((first > 0.5) != (second > 0.5)).any()


def test_dropout_keeps_the_mean_and_draws_per_example():
    keys = jax.random.split(jax.random.key(1), 400)
    x = jnp.ones((400, 4, 10))
    y = np.asarray(drop(x, keys, 0.25))
    np.testing.assert_allclose(sorted(set(y.ravel())), [0, 1 / 0.75], rtol=1e-6)
    np.testing.assert_allclose(y.mean(), 1, atol=0.05)
    assert len({row.tobytes() for row in y}) > 390
    np.testing.assert_array_equal(drop(x[7:8], keys[7:8], 0.25), y[7:8])
    path = np.asarray(drop(x, keys, 0.25, path=True)).reshape(400, -1)
    assert (path.min(axis=1) == path.max(axis=1)).all()  # all of an example or nothing
    np.testing.assert_allclose(path.mean(), 1, atol=0.1)
    assert drop(x, None, 0.25) is x and drop(x, keys, 0.0) is x
    assert fold(None, 3) is None


def test_norm_equals_its_formula():
    x = np.random.default_rng(0).normal(3, 5, (2, 7))
    params = {"scale": np.float32(np.arange(7)), "bias": np.float32(np.ones(7))}
    want = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6) * np.arange(
        7
    ) + 1
    got = Norm().apply({"params": params}, jnp.asarray(x, jnp.float32))
    np.testing.assert_allclose(got, want, atol=1e-5)


def test_half_precision_keeps_softmax_and_norms_in_float32():
    half = with_config(dtype="bfloat16", scan=False)
    run = lambda p, x: half.apply({"params": p}, x, context=CONTEXT, mask=MASK)[0]
    jaxpr = jax.make_jaxpr(run)(weights(), X)
    assert jaxpr.out_avals[0].dtype == jnp.bfloat16
    types = {}

    def walk(jaxpr):
        for eqn in jaxpr.eqns:
            types.setdefault(eqn.primitive.name, set()).update(
                v.aval.dtype.name for v in eqn.outvars[:1]
            )
            for inner in runs.inner_jaxprs(eqn):
                walk(inner)

    walk(jaxpr.jaxpr)
    assert types["exp"] == {"float32"} and types["rsqrt"] == {"float32"}
    assert "bfloat16" in types["dot_general"]
