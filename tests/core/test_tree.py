"""Named leaves, masks and norms."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from vlp.core import tree

TREE = {"b": {"w": jnp.array([3.0]), "u": jnp.array([[1.0, 2.0]])}, "a": [jnp.array(4.0)]}


def test_names_follow_the_path():
    assert list(tree.named(TREE)) == ["a/0", "b/u", "b/w"]
    assert tree.map_named(lambda n, x, y: (n, y), {"a": 1, "b": [2]}, {"a": 3, "b": [4]}) == {
        "a": ("a", 3),
        "b": [("b/0", 4)],
    }
    state = optax.ScaleByAdamState(jnp.array(0), {"w": 1}, {"w": 2})
    assert list(tree.named(state)) == ["count", "mu/w", "nu/w"]  # as attributes are


def test_where_and_merge_take_a_tree_apart_and_together():
    mask = {"b": {"w": True, "u": False}, "a": [True]}
    first = tree.where(mask, TREE)
    second = tree.where(jax.tree.map(lambda m: not m, mask), TREE)
    assert list(tree.named(first)) == ["a/0", "b/w"] and list(tree.named(second)) == ["b/u"]
    for merged in (tree.merge(first, second), tree.merge(second, first)):
        jax.tree.map(np.testing.assert_array_equal, merged, TREE)


def test_norm_and_size_count_every_leaf():
    np.testing.assert_allclose(tree.norm(TREE), np.sqrt(9 + 1 + 4 + 16), rtol=1e-6)
    assert tree.norm(jax.tree.map(lambda x: x.astype(jnp.bfloat16), TREE)).dtype == jnp.float32
    assert float(tree.norm({})) == 0
    assert tree.size(TREE) == 4
    assert tree.size(jax.eval_shape(lambda: TREE)) == 4
