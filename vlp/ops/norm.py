"""Layer and batch normalisation whose backward passes need their input alone."""

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

    The backward pass holds x alone, in its own type, and computes the statistics again; automatic differentiation would
    hold three copies of x in float32. Source: Ba et al. 2016 (arXiv:1607.06450).
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


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def batch_norm(
    x: Float[Array, "*b D"],
    scale_D: Float[Array, "D"],
    bias_D: Float[Array, "D"],
    eps: float,
) -> tuple[Float[Array, "*b D"], Float[Array, "D"], Float[Array, "D"]]:
    """(x − mean) / √(var + eps) · scale + bias over all axes but the last, in float32 or wider.

    Under jit on global arrays the mean is over the whole mesh. Source: Ioffe & Szegedy 2015 (arXiv:1502.03167).

    Returns:
        The result in x's type, and mean and (biased) variance, through which no gradient flows.
    """
    y, _, mean, var = _normalise_batch(x, eps)
    return (y * _over(scale_D, y) + _over(bias_D, y)).astype(x.dtype), mean, var


def _normalise_batch(x: Array, eps: float) -> tuple[Array, Array, Array, Array]:
    axes = tuple(range(x.ndim - 1))
    y = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    mean = y.mean(axes)
    y -= _over(mean, y)
    var = jnp.square(y).mean(axes)
    rate = jax.lax.rsqrt(var + eps)
    return y * _over(rate, y), rate, mean, var


def _batch_forward(
    x: Array, scale_D: Array, bias_D: Array, eps: float
) -> tuple[tuple[Array, Array, Array], tuple[Array, Array]]:
    return batch_norm(x, scale_D, bias_D, eps), (x, scale_D)


def _batch_backward(
    eps: float, saved: tuple[Array, Array], grads: tuple[Array, Array, Array]
) -> tuple[Array, Array, Array]:
    x, scale_D = saved
    y, rate, _, _ = _normalise_batch(x, eps)
    axes = tuple(range(x.ndim - 1))
    dz = grads[0].astype(y.dtype)
    dscale_D, dbias_D = (dz * y).sum(axes), dz.sum(axes)
    num = x.size // x.shape[-1]
    dx = dz - _over(dbias_D / num, y) - y * _over(dscale_D / num, y)
    return (dx * _over(scale_D * rate, y)).astype(x.dtype), dscale_D, dbias_D


batch_norm.defvjp(_batch_forward, _batch_backward)
