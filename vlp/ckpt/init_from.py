"""Transfers parameters into a model whose shapes may differ: between stages, and from another run."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vlp.core import check, tree
from vlp.core import mesh as meshes
from vlp.ops import posembed

log = logging.getLogger(__name__)
PyTree = Any
Resize = Callable[[Any, Any], Any]

# Position tables: full-match pattern of the leaf's name → rule(old, fresh). Every other leaf must keep its shape.
RESIZE: dict[str, Resize] = {
    r"(.*/)?image_tower/pos": lambda old, fresh: posembed.resize_grid(old, fresh.shape[0]),
    r"(.*/)?image_tower/pool/pos": posembed.resize_grid_after_first,
    r"(.*/)?text_tower/pos": posembed.resize_sequence,
}


def transfer_params(old: PyTree, fresh: PyTree, where: str = "init") -> PyTree:
    """Returns `fresh` with the values of `old`, matched by name.

    Leaves of the same shape are copied bit by bit and position tables are resized. Leaves that only `fresh` has keep
    their values, and leaves that only `old` has are dropped; both are logged. Values take the sharding of `fresh`.

    Args:
        old: the parameters to take values from.
        fresh: the parameters of the new model, freshly initialised.
        where: the config section that asks for it, for errors and the log.

    Raises:
        UserError: a leaf that is no position table has another shape.
    """
    check_fits(old, fresh, where)
    values = tree.named(old)
    names = tree.named(fresh)
    _log(where, "new, initialised", names.keys() - values.keys())
    _log(where, "not used", values.keys() - names.keys())

    def one(name: str, leaf: jax.Array) -> jax.Array:
        if name not in values:
            return leaf
        value = values[name]
        if value.shape != leaf.shape:
            log.info("%s: %s resized from %s to %s", where, name, value.shape, leaf.shape)
            old_new = (jnp.asarray(meshes.to_host(x)) for x in (value, leaf))
            rule = _rule(name)
            assert rule is not None, "check_fits let it through"
            value = np.asarray(rule(*old_new))
        return jax.device_put(value.astype(leaf.dtype), leaf.sharding)

    return tree.map_named(one, fresh)


def select_params(params: PyTree, match: str, where: str) -> dict[str, Any]:
    """Returns the leaves whose whole name matches, as a flat tree {name: leaf}.

    Args:
        params: the tree.
        match: a regular expression.
        where: the config section that has it, for errors.

    Raises:
        UserError: no leaf matches.
    """
    leaves = tree.named(params)
    found = {name: leaf for name, leaf in leaves.items() if re.fullmatch(match, name)}
    if not found:
        parts = sorted({name.split("/")[0] for name in leaves})
        do = f"match full names, such as '{parts[0]}/.*'"
        raise check.error(f"{where}: init_match", repr(match), f"a pattern for some of {parts}", do)
    return found


def check_fits(old: PyTree, fresh: PyTree, where: str) -> None:
    """Raises the UserError of `transfer_params`, from shapes alone."""
    values = tree.named(old)
    for name, leaf in tree.named(fresh).items():
        shape = values[name].shape if name in values else leaf.shape
        if shape != leaf.shape and (_rule(name) is None or shape[1:] != leaf.shape[1:]):
            do = "give both models the same size here, or leave the leaf out with init_match"
            raise check.error(f"{where}: {name}", f"shape {shape}", f"{leaf.shape}", do)


def _rule(name: str) -> Resize | None:
    return next((rule for pattern, rule in RESIZE.items() if re.fullmatch(pattern, name)), None)


def _log(where: str, what: str, names: set[str]) -> None:
    if names:
        log.info("%s: %s: %s", where, what, ", ".join(sorted(names)))
