"""The moving average against its closed form."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vlp.optim import ema

POINTS = ((0.0, 0.5), (0.5, 0.9), (1.0, 1.0))


@pytest.mark.parametrize("decay", [0.6, POINTS])
def test_equals_the_closed_form(decay):
    rng = np.random.default_rng(0)
    start, values = rng.normal(size=3), rng.normal(size=(12, 3))
    update = jax.jit(lambda average, value, done: ema.update(average, value, decay, done))
    average, decays = {"w": jnp.asarray(start, jnp.float32)}, []
    for step, value in enumerate(values):
        average = update(average, {"w": jnp.asarray(value, jnp.float32)}, step / 12)
        decays.append(0.6 if decay == 0.6 else np.interp(step / 12, *zip(*POINTS)))
    # Σ over steps of (1 − d_k) · Π_{j>k} d_j · value_k, and what is left of the start
    weights = [(1 - d) * np.prod(decays[k + 1 :]) for k, d in enumerate(decays)]
    want = np.prod(decays) * start + np.einsum("k,kw->w", weights, values)
    np.testing.assert_allclose(average["w"], want, rtol=1e-5)
    np.testing.assert_allclose(sum(weights) + np.prod(decays), 1)


def test_there_is_no_warm_up():
    first = ema.update(jnp.ones(()), jnp.zeros(()), 0.99)
    np.testing.assert_allclose(first, 0.99, rtol=1e-7)


@pytest.mark.parametrize("decay", [0.9999, ((0.0, 0.9999), (1.0, 0.9999))])
def test_a_decay_near_one_is_not_rounded(decay):
    """1 − 0.9999 in float32 would be 1.0002e-4."""
    moved = ema.update(jnp.zeros(()), jnp.ones(()), decay, 0.3)
    np.testing.assert_allclose(moved, 1e-4, rtol=1e-6)


def test_the_ends_and_fixed_points_are_exact():
    rng = np.random.default_rng(1)
    a, p = (jnp.asarray(rng.normal(size=100), jnp.float32) for _ in range(2))
    np.testing.assert_array_equal(ema.update(a, p, 0.0), p)
    np.testing.assert_array_equal(ema.update(a, p, 1.0), a)
    np.testing.assert_array_equal(ema.update(a, p, POINTS, 1.0), a)
    np.testing.assert_array_equal(ema.update(a, a, 0.999), a)


def test_it_is_float32_whatever_the_parameters_are():
    average = ema.update(jnp.ones(2), jnp.ones(2, jnp.bfloat16), 0.9)
    assert average.dtype == jnp.float32
