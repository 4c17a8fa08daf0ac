"""Gradients in bfloat16: nothing is summed over batch or tokens in half precision, however many rows there are."""

import functools
import math
import os
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_shipped import MODELS

from helpers import runs
from helpers.everything import shapes
from vlp.core import mesh as meshes
from vlp.core import tree
from vlp.core.types import Apply, Ctx
from vlp.models.interface import with_fields
from vlp.objectives import OBJECTIVES
from vlp.ops.params import rows, spread
from vlp.train import state as states

SUMS = ("reduce_sum", "scatter-add", "cumsum", "cumlogsumexp", "reduce_window_sum", "psum")


def loss(params, batch, model, objective, num_micro=1):
    return objective(
        Ctx(Apply(model, params), batch, jax.random.key(0), num_micro=num_micro)
    ).loss()


def sums_in_half(jaxpr):
    """Sums of more than one half-precision number in a program, as (primitive, shape)."""
    for eqn in jaxpr.eqns:
        for inner in runs.inner_jaxprs(eqn):
            yield from sums_in_half(inner)
        if eqn.primitive.name not in SUMS:
            continue
        x = eqn.invars[0].aval
        axes = eqn.params.get("axes", range(x.ndim))
        # picking one token of each example is no sum: its gradient has a place of its own
        picked = bool(getattr(eqn.params.get("dimension_numbers"), "operand_batching_dims", ()))
        half = x.dtype in (jnp.bfloat16, jnp.float16)
        if half and math.prod(x.shape[a] for a in axes) > 1 and not picked:
            yield eqn.primitive.name, x.shape


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("keep_ratio, num_micro", [(1.0, 1), (0.5, 2)])
def test_nothing_is_summed_in_half_precision(
    make_batch, random_params, name, keep_ratio, num_micro
):
    model = with_fields(MODELS[name], dtype="bfloat16")
    objective = OBJECTIVES[name](keep_ratio=keep_ratio)
    f = functools.partial(loss, model=model, objective=objective, num_micro=num_micro)
    gradient = jax.make_jaxpr(jax.grad(f))(random_params(model, 16, 8), make_batch(8))
    assert list(sums_in_half(gradient.jaxpr)) == []


@pytest.mark.parametrize("num", [256, 8192])
def test_rows_of_a_table(num):
    """A frequent token keeps its gradient, which in half precision would stop growing at 256 equal addends."""
    rng = np.random.default_rng(0)
    table = jnp.asarray(rng.normal(size=(5, 4)), jnp.float32)
    ids = jnp.asarray(np.minimum(rng.integers(0, 40, num), 4))
    weight_NL = np.exp(rng.normal(size=(num, 4))).astype(np.float32)

    def f(table, dtype):
        return (rows(table, ids, dtype) * weight_NL.astype(dtype)).astype(jnp.float32).sum()

    expected = np.zeros((5, 4))
    np.add.at(expected, ids, np.float64(weight_NL.astype(jnp.bfloat16)))
    np.testing.assert_array_equal(rows(table, ids, "bfloat16"), table.astype(jnp.bfloat16)[ids])
    np.testing.assert_allclose(jax.grad(f)(table, jnp.bfloat16), expected, rtol=1e-5)
    one_more = lambda x: (spread(x, (num, 4), jnp.bfloat16) * weight_NL.astype(jnp.bfloat16)).sum()
    total = np.float64(weight_NL.astype(jnp.bfloat16)).sum(0)
    np.testing.assert_allclose(jax.grad(one_more)(table[0]), total, rtol=2e-5)


def pairs(make_batch, num):
    """Images that their first word decides, and some noise: a gradient that the batch's mean does not cancel."""
    batch = make_batch(num)
    squares = lambda rng, n: rng.uniform(0, 255, (n, 4, 4, 3)).repeat(4, 1).repeat(4, 2)
    patterns, noise = squares(np.random.default_rng(7), 24), squares(np.random.default_rng(1), num)
    return batch | {"image": (0.7 * patterns[batch["text"][:, 1]] + 0.3 * noise).astype(np.uint8)}


@pytest.mark.skipif("VLP_SLOW" not in os.environ, reason="minutes; the program is checked above")
@pytest.mark.parametrize("name", MODELS)
def test_every_gradient_at_two_batch_sizes(make_batch, name):
    """Each leaf near float32 as initialised; what is left is rounding of single numbers, so it falls with more rows."""
    plain = dict(dropout=0.0, drop_path=0.0, width=32, mlp=64)
    model = with_fields(MODELS[name], **plain, **({"embed": 32} if name != "coca" else {}))
    one = make_batch(1)
    objective = OBJECTIVES[name](keep_ratio=1.0)
    one_device = meshes.make(meshes.MeshShape(), jax.devices()[:1])
    params = states.init_params(model, objective, shapes(one), 0, one_device)

    def grads(dtype, batch):
        f = functools.partial(loss, model=with_fields(model, dtype=dtype), objective=objective)
        return tree.named(jax.device_get(jax.jit(jax.grad(f))(params, batch)))

    for num, limit in ((256, 0.03), (8192, 0.02)):
        batch = pairs(make_batch, num)
        exact, half = grads("float32", batch), grads("bfloat16", batch)
        off = {k: np.linalg.norm(half[k] - g) / np.linalg.norm(g) for k, g in exact.items()}
        worst = max(off, key=lambda k: off[k])
        print(name, num, worst, off[worst])
        # softmax's gradient cancels before it reaches queries and keys, which leaves more of the rounding
        inner = {k: x for k, x in off.items() if re.search("/(q|qkv|kv)/|query", k)}
        assert max(x for k, x in off.items() if k not in inner) < limit, (num, off)
        assert max(inner.values()) < 0.05, (num, inner)
