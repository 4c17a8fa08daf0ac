"""The moving average against its closed form."""

import jax
import jax.numpy as jnp
import numpy as np

from vlp.optim import ema


def test_equals_the_closed_form():
    rng = np.random.default_rng(0)
    start, values = rng.normal(size=3), rng.normal(size=(12, 3))
    update = jax.jit(lambda average, value, step: ema.update(average, value, 0.6, step))
    average, decays = {"w": jnp.asarray(start, jnp.float32)}, []
    for step, value in enumerate(values):
        average = update(average, {"w": jnp.asarray(value, jnp.float32)}, jnp.int32(step))
        decays.append(min(0.6, (1 + step) / (10 + step)))
    assert decays[0] == 0.1 and decays[-1] < 0.6 + 1e-9
    # Σ over steps of (1 − d_k) · Π_{j>k} d_j · value_k, and what is left of the start
    weights = [(1 - d) * np.prod(decays[k + 1 :]) for k, d in enumerate(decays)]
    want = np.prod(decays) * start + np.einsum("k,kw->w", weights, values)
    np.testing.assert_allclose(average["w"], want, rtol=1e-5)
    np.testing.assert_allclose(sum(weights) + np.prod(decays), 1)


def test_the_decay_rises_to_its_bound():
    at = lambda step, decay: ema.update(jnp.ones(()), jnp.zeros(()), decay, jnp.int32(step))
    np.testing.assert_allclose(
        [at(0, 0.99), at(8, 0.99), at(10**6, 0.99)], [0.1, 0.5, 0.99], rtol=1e-6
    )
    np.testing.assert_allclose(at(10**6, 0.0), 0.0)


def test_it_is_float32_whatever_the_parameters_are():
    average = ema.update(jnp.ones(2), jnp.ones(2, jnp.bfloat16), 0.9, jnp.int32(100))
    assert average.dtype == jnp.float32
