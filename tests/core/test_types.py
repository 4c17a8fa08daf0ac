"""What a step gives to its objective."""

import flax.linen as nn
import jax
import jax.extend.core
import jax.numpy as jnp
import numpy as np
import pytest

from vlp.core.types import Apply, Ctx


class Two(nn.Module):
    def setup(self):
        self.a, self.b, self.c = nn.Dense(3), nn.Dense(3), nn.Dense(3)

    def image(self, x):
        return {"embed": jnp.tanh(self.a(x)), "ids": jnp.arange(x.shape[0])}

    def text(self, x):
        return jnp.sin(self.b(x))

    def __call__(self, x):
        return self.image(x)["embed"] * self.text(x) * self.c(x)


@pytest.fixture(scope="module")
def two():
    x = jax.random.normal(jax.random.key(0), (4, 5))
    return Two().init(jax.random.key(1), x)["params"], x


def loss(params, x, ordered):
    ctx = Ctx(Apply(Two(), params), {})
    image = ctx.apply("image", x)
    if ordered:
        ctx, image = ctx.then(image)
    return (image["embed"] @ ctx.apply("text", x).T).sum()


@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit, jax.checkpoint], ids=["", "jit", "remat"])
def test_then_changes_no_number(two, wrap):
    params, x = two
    plain = jax.value_and_grad(lambda p: loss(p, x, False))(params)
    ordered = jax.value_and_grad(wrap(lambda p: loss(p, x, True)))(params)
    jax.tree.map(np.testing.assert_array_equal, plain, ordered)


def test_then_differentiates_what_follows_first(two):
    params, x = two
    jaxpr = jax.make_jaxpr(jax.grad(lambda p: loss(p, x, True)))(params).jaxpr
    (at,) = [i for i, e in enumerate(jaxpr.eqns) if e.primitive.name == "optimization_barrier"]
    barrier = jaxpr.eqns[at]
    # text's kernel and bias, the image's embedding; nothing of c, which has no gradient, nor of `ids`
    assert sorted(v.aval.shape for v in barrier.invars) == [(3,), (4, 3), (5, 3)]
    waits = set(barrier.outvars)
    for eqn in jaxpr.eqns[at + 1 :]:
        if waits & {v for v in eqn.invars if not isinstance(v, jax.extend.core.Literal)}:
            waits |= set(eqn.outvars)
    by_name = dict(zip(("a.bias", "a.kernel", "b.bias", "b.kernel"), jaxpr.outvars))
    assert {by_name["a.bias"], by_name["a.kernel"]} <= waits
