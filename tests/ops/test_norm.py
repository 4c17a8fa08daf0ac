"""Layer and batch norm: value and gradients against those of the formula; what the backward pass holds."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vlp.ops.norm import batch_norm, layer_norm

EPS = 1e-6


def formula(x, scale, bias):
    y = x - x.mean(-1, keepdims=True)
    y /= jnp.sqrt((y**2).mean(-1, keepdims=True) + EPS)
    return y * jnp.broadcast_to(scale, y.shape) + jnp.broadcast_to(bias, y.shape)


@pytest.mark.parametrize("shape", [(5,), (3, 5), (2, 3, 8)])
def test_value_and_gradients(shape):
    rng = np.random.default_rng(0)
    draw = lambda *s: jnp.asarray(rng.normal(size=s), jnp.float32)
    x, scale, bias, out = 3 + draw(*shape), draw(shape[-1]), draw(shape[-1]), draw(*shape)
    ours = lambda x, s, b: (layer_norm(x, s, b, EPS) * out).sum()
    plain = lambda x, s, b: (formula(x, s, b) * out).sum()
    np.testing.assert_allclose(
        layer_norm(x, scale, bias, EPS), formula(x, scale, bias), rtol=1e-5, atol=1e-5
    )
    for got, want in zip(
        jax.grad(ours, (0, 1, 2))(x, scale, bias), jax.grad(plain, (0, 1, 2))(x, scale, bias)
    ):
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


def test_its_input_in_half_precision_is_all_that_it_holds():
    x = jnp.ones((4, 16), jnp.bfloat16)
    ones = jnp.ones(16)
    _, pull = jax.vjp(lambda x, s, b: layer_norm(x, s, b, EPS), x, ones, ones)
    held = [v for v in jax.tree.leaves(pull) if v.size >= x.size]
    assert [(v.shape, v.dtype) for v in held] == [(x.shape, jnp.bfloat16)]


def batch_formula(x, scale, bias):
    axes = tuple(range(x.ndim - 1))
    y = x - x.mean(axes, keepdims=True)
    y /= jnp.sqrt((y**2).mean(axes, keepdims=True) + EPS)
    return y * jnp.broadcast_to(scale, y.shape) + jnp.broadcast_to(bias, y.shape)


@pytest.mark.parametrize("shape", [(5, 3), (4, 2, 2, 3)])
def test_batch_norm_and_its_gradients_equal_the_formula(shape):
    rng = np.random.default_rng(0)
    draw = lambda *s: jnp.asarray(rng.normal(size=s), jnp.float32)
    x, scale, bias, out = 3 + 2 * draw(*shape), draw(shape[-1]), draw(shape[-1]), draw(*shape)
    y, mean, var = batch_norm(x, scale, bias, EPS)
    axes = tuple(range(x.ndim - 1))
    np.testing.assert_allclose(y, batch_formula(x, scale, bias), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(mean, np.asarray(x).mean(axes), rtol=1e-5)
    np.testing.assert_allclose(var, np.asarray(x).var(axes), rtol=1e-5)
    ours = jax.grad(lambda *a: (batch_norm(*a, EPS)[0] * out).sum(), (0, 1, 2))(x, scale, bias)
    plain = jax.grad(lambda *a: (batch_formula(*a) * out).sum(), (0, 1, 2))(x, scale, bias)
    for got, want in zip(ours, plain):
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)
