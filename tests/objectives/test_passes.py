"""The passes that methods share: their order in the backward pass, captions folded into the batch."""

import flax.linen as nn
import jax
import jax.extend.core
import jax.numpy as jnp
import numpy as np
import pytest
from test_shipped import MODELS

from helpers import runs
from vlp.core.check import UserError
from vlp.core.types import Apply, Ctx
from vlp.objectives import OBJECTIVES
from vlp.objectives.passes import after


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
        ctx, image = after(ctx, image)
    return (image["embed"] @ ctx.apply("text", x).T).sum()


@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit, jax.checkpoint], ids=["", "jit", "remat"])
def test_the_barrier_changes_no_number(two, wrap):
    params, x = two
    plain = jax.value_and_grad(lambda p: loss(p, x, False))(params)
    ordered = jax.value_and_grad(wrap(lambda p: loss(p, x, True)))(params)
    jax.tree.map(np.testing.assert_array_equal, plain, ordered)


def test_later_calls_are_differentiated_first(two):
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


def equations(jaxpr):
    return len(jaxpr.eqns) + sum(equations(j) for eqn in jaxpr.eqns for j in runs.inner_jaxprs(eqn))


@pytest.mark.parametrize("name", MODELS)
def test_the_program_does_not_grow_with_the_number_of_captions(name, make_batch, random_params):
    model, pairs = MODELS[name], make_batch()
    objective = OBJECTIVES[name](keep_ratio=0.5)
    params = random_params(model, 16, 8)

    def size(k, num_micro):
        text = np.repeat(pairs["text"][:, None], k, axis=1)
        batch = pairs | {"text": text, "text.mask": np.ones(text.shape[:2], bool)}
        seed = jax.random.key(0)
        f = lambda p, b: objective(Ctx(Apply(model, p), b, seed, num_micro=num_micro)).loss()
        return equations(jax.make_jaxpr(jax.grad(f))(params, batch).jaxpr)

    for num_micro in (1, 2):
        one, eight = size(1, num_micro), size(8, num_micro)
        print(name, num_micro, one, eight)
        assert eight <= 1.1 * one


def rows(**more):
    index = np.stack([np.zeros(3), np.arange(3)], axis=1).astype(np.uint32)
    leaves = {"text": np.arange(24).reshape(3, 2, 4), "index": index, "x": np.arange(3.0)}
    return jax.tree.map(jnp.asarray, leaves | more)


def test_captions_see_one_caption_a_row_and_their_examples_leaves():
    seen = {}

    def f(ctx, y):
        seen.update(ctx.batch, y=y)
        return {"first": ctx.batch["text"][:, 0], "y": y}

    batch = rows(**{"text.mask": np.bool_([[1, 1], [1, 0], [1, 1]])})
    out = Ctx(Apply(None, {}), batch).captions(f, jnp.arange(6).reshape(3, 2))
    np.testing.assert_array_equal(seen["text"], batch["text"].reshape(6, 4))
    np.testing.assert_array_equal(seen["text.mask"], batch["text.mask"].reshape(6))
    np.testing.assert_array_equal(seen["x"], [0, 0, 1, 1, 2, 2])
    np.testing.assert_array_equal(seen["y"], np.repeat(np.arange(6).reshape(3, 2), 2, axis=0))
    np.testing.assert_array_equal(out["first"], batch["text"][:, :, 0])
    assert out["y"].shape == (3, 2, 2)


def test_each_caption_has_draws_of_its_own():
    """Caption 0 those that it has alone; none depends on how many there are beside it."""
    seed = jax.random.key(3)
    data = lambda ctx: jax.random.key_data(ctx.keys("mask"))
    one = data(Ctx(Apply(None, {}), rows(text=np.zeros((3, 4))), seed))
    two = Ctx(Apply(None, {}), rows(), seed).captions(data)
    three = Ctx(Apply(None, {}), rows(text=np.zeros((3, 3, 4))), seed).captions(data)
    np.testing.assert_array_equal(two[:, 0], one)
    np.testing.assert_array_equal(three[:, :2], two)
    assert len(np.unique(np.asarray(three).reshape(9, -1), axis=0)) == 9


@pytest.mark.parametrize("name", ["cap", "clip", "coca", "mammut", "siglip"])
def test_a_caption_that_is_missing_counts_for_nothing(name, make_batch, random_params):
    """Whatever stands in its place: the loss of records with one caption each is that of those captions."""
    model, pairs, other = MODELS[name], make_batch(), make_batch(start=40)
    params = random_params(model, 16, 8)
    objective = OBJECTIVES[name](keep_ratio=0.5)
    run = jax.jit(lambda p, b: objective(Ctx(Apply(model, p), b)).loss())
    want = run(params, pairs)
    for k in (0, 1):
        text = np.stack([pairs["text"], other["text"]][:: 1 - 2 * k], axis=1)
        mask = np.zeros((8, 2), bool)
        mask[:, k] = True
        np.testing.assert_allclose(
            run(params, pairs | {"text": text, "text.mask": mask}), want, rtol=1e-5
        )


def test_what_is_missing_is_one_line(make_batch, random_params):
    model, batch = MODELS["clip"], jax.tree.map(jnp.asarray, make_batch())
    params = jax.tree.map(jnp.asarray, random_params(model, 16, 8))
    ctx = Ctx(Apply(model, params), batch)
    asks = {
        "objective: batch: got no 'label', expected one of ['image', 'index', 'text']; name it in": lambda: (
            ctx.batch["label"]
        ),
        "config.model: TwoTower.image: got no 'feats', expected one of ['embed', ": lambda: (
            ctx.student("image", batch["image"])["feats"]
        ),
        "config.model: got a TwoTower without a method 'fuse'": lambda: ctx.student("fuse"),
        "objective: head: got 'match', expected one of []; declare heads = {'match': ": lambda: (
            ctx.head("match", jnp.ones((8, 8)))
        ),
        "config.teachers: got none, expected 'ema', which the objective asks": lambda: ctx.teacher(
            "ema"
        ),
    }
    for message, ask in asks.items():
        with pytest.raises(UserError) as caught:
            jax.eval_shape(ask)
        assert str(caught.value).startswith(message) and "\n" not in str(caught.value)
