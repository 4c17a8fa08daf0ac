"""Layer normalisation whose backward pass needs its input alone."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def layer_norm(
    x: Float[Array, "*b D"],
    scale_D: Float[Array, "D"],
    bias_D: Float[Array, "D"],
    eps: float,
) -> Float[Array, "*b D"]:
    """(x − mean) / √(var + eps) · scale + bias over the last axis, in float32 or wider, returned in x's type.

    Left to automatic differentiation it would hold three copies of x in float32; here x alone is held, in its own type,
    and the statistics are computed again. Source: Ba et al. 2016 (arXiv:1607.06450).
    """
    y, _ = _normalise(x, eps)
    return (y * _over(scale_D, y) + _over(bias_D, y)).astype(x.dtype)


def _normalise(x: Array, eps: float) -> tuple[Array, Array]:
    y = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    y -= y.mean(-1, keepdims=True)
    rate = jax.lax.rsqrt(jnp.square(y).mean(-1, keepdims=True) + eps)
    return y * rate, rate


def _over(v_D: Array, y: Array) -> Array:
    return jnp.broadcast_to(v_D, y.shape)


def _forward(
    x: Array, scale_D: Array, bias_D: Array, eps: float
) -> tuple[Array, tuple[Array, ...]]:
    return layer_norm(x, scale_D, bias_D, eps), (x, scale_D)


def _backward(eps: float, saved: tuple[Array, ...], dz: Array) -> tuple[Array, Array, Array]:
    x, scale_D = saved
    y, rate = _normalise(x, eps)
    dz = dz.astype(y.dtype)
    dy = dz * _over(scale_D, y)
    along = lambda v: v.mean(-1, keepdims=True)
    dx = rate * (dy - along(dy) - y * along(dy * y))
    axes = tuple(range(x.ndim - 1))
    return dx.astype(x.dtype), (dz * y).sum(axes), dz.sum(axes)


layer_norm.defvjp(_forward, _backward)
