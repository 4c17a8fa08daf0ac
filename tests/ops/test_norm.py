"""Layer normalisation: value and gradients against automatic differentiation of the formula; what it holds."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vlp.ops.norm import layer_norm

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
