"""The contrastive loss against double loops in float64, on meshes, and at points whose value is known."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding, PartitionSpec

from vlp.core import mesh as meshes
from vlp.losses import contrastive


def cross_entropy_loops(logits, targets, weights):
    """Per-row cross-entropy to normalised targets, and d(weights · rows)/d(logits)."""
    num = len(logits)
    rows, grad = np.zeros(num), np.zeros((num, num))
    for i in range(num):
        top = max(logits[i])
        total = sum(math.exp(x - top) for x in logits[i])
        for j in range(num):
            share = targets[i, j] / sum(targets[i])
            log_p = logits[i, j] - top - math.log(total)
            rows[i] -= share * log_p
            grad[i, j] = weights[i] * (math.exp(log_p) - share)
    return rows, grad


def loops(zi, zt, scale, targets, wi, wt):
    """Both directions, and the gradient of wi · i2t + wt · t2i with respect to zi, zt and scale."""
    num, width = zi.shape
    dots = np.array(
        [[sum(zi[i, e] * zt[j, e] for e in range(width)) for j in range(num)] for i in range(num)]
    )
    targets = np.eye(num) if targets is None else np.asarray(targets, np.float64)
    i2t, grad_rows = cross_entropy_loops(scale * dots, targets, wi)
    t2i, grad_cols = cross_entropy_loops(scale * dots.T, targets.T, wt)
    dzi, dzt, dscale = np.zeros_like(zi), np.zeros_like(zt), 0.0
    for i in range(num):
        for j in range(num):
            g = grad_rows[i, j] + grad_cols[j, i]
            dzi[i] += g * scale * zt[j]
            dzt[j] += g * scale * zi[i]
            dscale += g * dots[i, j]
    return {"i2t": i2t, "t2i": t2i, "grads": (dzi, dzt, dscale)}


@jax.jit
def ours(zi, zt, scale, targets, wi, wt):
    def total(zi, zt, scale):
        loss = contrastive.softmax(zi, zt, scale, targets=targets)
        return (wi * loss["i2t"] + wt * loss["t2i"]).sum(), loss

    (_, loss), grads = jax.value_and_grad(total, (0, 1, 2), has_aux=True)(zi, zt, scale)
    return {"i2t": loss["i2t"], "t2i": loss["t2i"], "grads": grads}


def inputs(num, width, scale, targets, seed=0):
    rng = np.random.default_rng(seed)
    zi, zt = rng.normal(size=(2, num, width))
    zi, zt = (z / np.linalg.norm(z, axis=1, keepdims=True) for z in (zi, zt))
    matrix = rng.uniform(size=(num, num)) + 0.1 if targets == "matrix" else None
    return zi, zt, np.asarray(scale), matrix, *rng.uniform(0.5, 2, size=(2, num))


def cast(args, dtype):
    return [None if x is None else jnp.asarray(x, dtype) for x in args]


@pytest.mark.parametrize("targets", ["identity", "matrix"])
def test_contrastive_losses_equal_loops(targets, error):
    args = inputs(7, 5, 1 / 0.07, targets)
    assert error(ours(*cast(args, jnp.float32)), loops(*args)) < 1e-5
    args = inputs(7, 5, 100.0, targets)
    with jax.enable_x64(True):
        assert error(ours(*cast(args, jnp.float64)), loops(*args)) < 1e-10


@settings(max_examples=6, deadline=None, derandomize=True)
@given(
    num=st.integers(1, 6),
    width=st.integers(1, 5),
    scale=st.floats(0.1, 100.0),
    targets=st.sampled_from(["identity", "matrix"]),
)
def test_equals_loops_for_any_shape(error, num, width, scale, targets):
    args = inputs(num, width, scale, targets)
    want = loops(*args)
    with jax.enable_x64(True):
        got = ours(*cast(args, jnp.float64))
    size = 1 + np.linalg.norm(want["grads"][0])  # a batch of one has a loss and gradients of 0
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-10 * size, rtol=1e-9)


@pytest.mark.parametrize("targets", ["identity", "matrix"])
def test_sharded_equals_one_device(targets, mesh, error):
    args = cast(inputs(8, 8, 1 / 0.07, targets), jnp.float32)
    rows, whole = meshes.batch_sharding(mesh), meshes.replicated(mesh)
    columns = NamedSharding(mesh, PartitionSpec(None, "tensor"))
    places = [rows, columns, whole, None if targets == "identity" else rows, rows, whole]
    placed = [x if x is None else jax.device_put(x, s) for x, s in zip(args, places, strict=True)]
    with jax.set_mesh(mesh):
        assert error(ours(*placed), ours(*args)) < 1e-5


def test_half_precision_inputs_are_computed_in_float32():
    zi, zt, scale, *_ = cast(inputs(6, 8, 50.0, "identity"), jnp.bfloat16)
    half = contrastive.softmax(zi, zt, jnp.float32(scale))
    full = contrastive.softmax(zi.astype(jnp.float32), zt.astype(jnp.float32), jnp.float32(scale))
    for name in full:
        assert half[name].dtype == jnp.float32
        np.testing.assert_array_equal(half[name], full[name])


def test_known_values():
    same_BE = jnp.full((4, 3), 3**-0.5)  # nothing tells the examples apart
    loss = contrastive.softmax(same_BE, same_BE, jnp.float32(20))
    np.testing.assert_allclose([loss["i2t"], loss["t2i"]], math.log(4), rtol=1e-6)
    excess = contrastive.metrics(loss, jnp.float32(20))["contrastive/minus_log_batch"].mean()
    np.testing.assert_allclose(excess, 0, atol=1e-5)
    np.testing.assert_array_equal(loss["hit_i2t"], 0.25)  # chance, for a collapsed model

    loss = contrastive.softmax(jnp.eye(4), jnp.eye(4), jnp.float32(100))
    np.testing.assert_allclose([loss["i2t"], loss["t2i"]], 0, atol=1e-6)


def test_hits_count_the_pairs_that_nothing_beats():
    zi_BE = jnp.eye(4)
    zt_BE = jnp.array([[1.0, 0, 0, 0], [0, 0, 1, 0], [0, 1, 0, 0], [0, 0, 0, 1]])  # 1 and 2 swapped
    loss = contrastive.softmax(zi_BE, zt_BE, jnp.float32(10))
    np.testing.assert_array_equal(loss["hit_i2t"], [1, 0, 0, 1])
    np.testing.assert_array_equal(loss["hit_t2i"], [1, 0, 0, 1])
    hits = contrastive.metrics(loss, jnp.float32(10))["contrastive/retrieval@1"]
    assert float(hits.mean()) == 0.5
    one_way = contrastive.softmax(zi_BE.at[0].set(zi_BE[3]), zi_BE, jnp.float32(10))
    np.testing.assert_array_equal(one_way["hit_i2t"], [0, 1, 1, 1])  # image 0 prefers text 3
    np.testing.assert_array_equal(one_way["hit_t2i"], [0.25, 1, 1, 0.5])  # equals share
