"""Queues of past embeddings, as an objective's state: further columns of its losses."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from vlp.core.mesh import logical


def start(key: jax.Array, names: Sequence[str], num: int, width: int) -> dict[str, Any]:
    """Queues [num, width] of random unit vectors, by name, with the names of their axes: rows lie as a batch does."""

    def rows(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        x = jax.random.normal(key, shape)
        return x / jnp.linalg.norm(x, axis=-1, keepdims=True)

    make = logical(rows, "batch", None)
    return {n: make(k, (num, width)) for n, k in zip(names, jax.random.split(key, len(names)))}


def push(queue_QE: jax.Array, z_BE: jax.Array) -> jax.Array:
    """The queue with the batch's rows in front, and without its oldest ones."""
    return jnp.concatenate([z_BE.astype(queue_QE.dtype), queue_QE])[: queue_QE.shape[0]]
