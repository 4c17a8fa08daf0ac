"""Terms, schedules and dicts of arrays."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vlp.core.check import UserError
from vlp.core.types import Apply, Ctx, Named, Out, Term, at


def test_the_mean_of_what_counts():
    x = jnp.float32([1, 2, 6])
    assert float(Term.mean_of(x).mean()) == 3
    assert float(Term.mean_of(x, where=jnp.array([True, False, True])).mean()) == 3.5
    assert float(Term.mean_of(x, where=jnp.zeros(3, bool)).mean()) == 0
    loss = Out({"a": Term.mean_of(x, 0.5), "b": Term.mean_of(x, jnp.float32(2))}).loss()
    assert float(loss) == 7.5


def test_a_schedule_joins_its_points():
    points = ((0.25, 1.0), (0.75, 3.0))
    found = [float(at(points, progress)) for progress in (0.0, 0.25, 0.5, 0.75, 1.0)]
    assert found == [1, 1, 2, 3, 3]
    assert at(2.0, 0.3) == 2.0
    ctx = Ctx(Apply(None, {}), {}, progress=0.5)
    assert float(ctx.at(points)) == 2 and ctx.at(1.0) == 1


@pytest.mark.parametrize(
    "points", [((0.5, 1.0), (0.5, 2.0)), ((0.5, 1.0), (0.2, 2.0)), ((2.0, 1.0),)]
)
def test_points_that_do_not_rise(points):
    with pytest.raises(UserError, match="whose progress rises within"):
        at(points, 0.0)


def test_a_missing_key_is_one_line_and_a_named_dict_is_a_tree():
    x = Named({"b": jnp.ones(2), "a": None}, "here", "give it")
    with pytest.raises(UserError) as caught:
        x["c"]
    assert str(caught.value) == "here: got no 'c', expected one of ['a', 'b']; give it"
    y = jax.jit(lambda t: jax.tree.map(lambda v: 2 * v, t))(x)
    assert type(y) is Named and y["a"] is None and y.where == "here"
    np.testing.assert_array_equal(y["b"], [2, 2])
    assert {**y} == dict(y) and (y | {"d": 1})["d"] == 1


@pytest.mark.parametrize("num_micro", [1, 2])
@pytest.mark.parametrize("wrong", [lambda x: x.sum(), lambda x: x.T, lambda x: jnp.tile(x, (2, 1))])
def test_what_map_returns_leads_with_the_batch(wrong, num_micro):
    ctx = Ctx(Apply(None, {}), {"x": jnp.ones((8, 3))}, num_micro=num_micro)
    with pytest.raises(UserError, match="ctx.map: what f returns: got shape"):
        ctx.map(lambda c: wrong(c.batch["x"]))
    with pytest.raises(UserError, match="an array given.*got shape"):
        ctx.map(lambda c, y: y, jnp.ones((3, 2)))
