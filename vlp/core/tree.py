"""Trees of arrays with named leaves: "image/blocks/attn/qkv/kernel"."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

PyTree = Any


def name(path: tuple[Any, ...]) -> str:
    """The "/"-joined name of a leaf from its key path."""
    return "/".join(str(getattr(k, "key", getattr(k, "name", getattr(k, "idx", k)))) for k in path)


def named(tree: PyTree) -> dict[str, Any]:
    """The leaves of a tree by name, in the tree's order."""
    return {name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def map_named(f: Callable[..., Any], tree: PyTree, *rest: PyTree) -> PyTree:
    """Maps f(name, leaf, *leaves) over trees of the same structure."""
    return jax.tree_util.tree_map_with_path(
        lambda path, *leaves: f(name(path), *leaves), tree, *rest
    )


def where(mask: PyTree, tree: PyTree) -> PyTree:
    """Returns `tree` with None in place of the leaves where `mask` is False."""
    return jax.tree.map(lambda m, x: x if m else None, mask, tree)


def merge(first: PyTree, second: PyTree) -> PyTree:
    """Fills the gaps (None) of `first` with the leaves of `second`."""
    return jax.tree.map(
        lambda a, b: b if a is None else a, first, second, is_leaf=lambda x: x is None
    )


def norm(tree: PyTree) -> jax.Array:
    """Global l2 norm over all leaves, in float32."""
    squares = [jnp.sum(jnp.square(x.astype(jnp.float32))) for x in jax.tree.leaves(tree)]
    return jnp.sqrt(jnp.sum(jnp.stack(squares))) if squares else jnp.float32(0)


def size(tree: PyTree) -> int:
    """Number of scalars in all leaves (arrays or shapes)."""
    return sum(int(np.prod(x.shape)) for x in jax.tree.leaves(tree))
