"""Attention against loops over queries and keys."""

import jax.numpy as jnp
import numpy as np
import pytest

from vlp.ops.attention import attend


def loops(q, k, v, mask, causal):
    batch, queries, heads, size = q.shape
    out = np.zeros_like(q)
    for b, t, h in np.ndindex(batch, queries, heads):
        seen = [
            s
            for s in range(k.shape[1])
            if (mask is None or mask[b, t, s]) and (not causal or s <= t)
        ]
        score = np.array([q[b, t, h] @ k[b, s, h] / np.sqrt(size) for s in seen])
        weight = np.exp(score - score.max()) / np.exp(score - score.max()).sum()
        out[b, t, h] = sum(w * v[b, s, h] for w, s in zip(weight, seen, strict=True))
    return out


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_equals_loops(causal, masked):
    rng = np.random.default_rng(0)
    q, k, v = rng.normal(size=(3, 2, 5, 2, 4))
    mask = None
    if masked:
        mask = (rng.uniform(size=(2, 5, 5)) < 0.5) | np.eye(5, dtype=bool)
    args = [jnp.asarray(x, jnp.float32) for x in (q, k, v)]
    got = attend(*args, None if mask is None else jnp.asarray(mask), causal=causal)
    np.testing.assert_allclose(got, loops(q, k, v, mask, causal), atol=1e-5)


def test_queries_and_keys_may_differ_in_number():
    rng = np.random.default_rng(1)
    q, k, v = rng.normal(size=(1, 2, 2, 4)), *rng.normal(size=(2, 1, 6, 2, 4))
    got = attend(*(jnp.asarray(x, jnp.float32) for x in (q, k, v)))
    np.testing.assert_allclose(got, loops(q, k, v, None, False), atol=1e-5)
