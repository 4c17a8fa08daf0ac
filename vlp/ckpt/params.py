"""Parameters of a checkpoint: one call, without the optimiser's code, the model, the mesh or the chips of training."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np

from vlp.ckpt import digest, steps
from vlp.core import check, paths, tree

PyTree = Any
# Arrays are read in groups of this share of all bytes, or one by one: what is read and not yet in place is beyond
# the result's memory.
_SHARE, _LEAST, _MOST = 1 / 32, 8 * 2**20, 512 * 2**20


def load_params(
    path: str | os.PathLike,
    *,
    dtype: Any = None,
    sharding: Any = None,
    prefix: str = "",
    step: int | None = None,
    teacher: str = "",
) -> PyTree:
    """Returns the parameters of a run, as a tree of nested dicts.

    Files are checked against the checkpoint's manifest first. Memory: at most 1.2 times that of the result, if no array
    is a tenth of it or more.

    Args:
        path: a workdir, its folder of checkpoints, or one checkpoint; here or in a bucket.
        dtype: of floating-point leaves; None: as saved.
        sharding: a jax.sharding.Sharding for all leaves, or a function (name, shape) → sharding, as of a run on other
            chips; None: NumPy arrays.
        prefix: only this part: "image_tower" gives the subtree of that name.
        step: of the checkpoint; None: the newest whole one.
        teacher: the parameters of this teacher ("ema") instead of the trained ones.

    Raises:
        UserError: there is no such checkpoint, part or teacher, or the files have changed.
    """
    folder = _find(path, step, "rest" if teacher else "params")
    return read_params(folder, teacher, dtype=dtype, sharding=sharding, prefix=prefix)


def read_params(
    folder: paths.Path,
    teacher: str = "",
    *,
    dtype: Any = None,
    sharding: Any = None,
    prefix: str = "",
) -> PyTree:
    """Returns the parameters in a checkpoint's folder, whose files are not checked. Args: as of `load_params`."""
    from vlp.ckpt import orbax_io

    item, above = folder / ("rest" if teacher else "params"), ["teachers", teacher] * bool(teacher)
    whole: Any = orbax_io.metadata(item)
    found = whole
    for key in above:
        if key not in found:
            raise check.unknown(f"{folder}: teacher", teacher, found if key == teacher else ())
        found = found[key]
    found = _part(found, prefix, os.fspath(folder))
    within = "/".join([*above, *_keys(prefix)])
    leaf = _leaf_args(dtype, sharding)
    out: dict[str, Any] = {}
    for group in _groups(tree.named(found)):
        wanted = {f"{within}/{name}".strip("/"): leaf(name, x) for name, x in group.items()}
        out |= dict(zip(group, orbax_io.read(item, whole, wanted).values(), strict=True))
    return _nested(out)


def _find(path: str | os.PathLike, step: int | None, item: str) -> paths.Path:
    """Returns the folder of a checkpoint with an intact item."""
    where = paths.parse(os.fspath(path), path)
    if step is None and paths.is_dir(where / item):
        known = [where]
    else:
        inner = where / "checkpoints"
        where = inner if paths.is_dir(inner) else where
        known = [steps.folder(where, s) for s in steps.listed(where) if step in (None, s)]
    known.reverse()
    chosen, problems = steps.first_whole(range(len(known)), lambda i: _problem(known[i], item))
    if chosen is not None:
        steps.say(problems, chosen, lambda i: known[i])
        return known[chosen]
    got = "; ".join(f"{known[i]}: {problem}" for i, problem in problems.items())
    got = got or ("no checkpoint" if step is None else f"no step {step}")
    do = "give a workdir of `vlp train`, or one of its checkpoints"
    raise check.error(os.fspath(path), got, "a whole checkpoint", do)


def _problem(folder: paths.Path, item: str) -> str:
    """Returns what is wrong with one item's files, or ""."""
    manifest, found = digest.opened(folder, [item])
    names = [name for name in manifest if name.startswith(f"{item}/")]
    return found or digest.check_files(folder, manifest, names)


def _part(found: PyTree, prefix: str, where: str) -> PyTree:
    """Returns the subtree of a name."""
    for key in _keys(prefix):
        if not isinstance(found, Mapping):
            raise check.error(f"{where}: prefix", repr(prefix), "a part of the tree", "shorten it")
        if key not in found:
            raise check.unknown(f"{where}: prefix {prefix!r}", key, found)
        found = found[key]
    return found


def _leaf_args(dtype: Any, sharding: Any) -> Callable[[str, Any], Any]:
    """Returns the function (name, metadata of an array) → Orbax's arguments to read it."""
    import orbax.checkpoint as ocp

    def one(name: str, x: Any) -> Any:
        floats = dtype is not None and jax.numpy.issubdtype(x.dtype, jax.numpy.floating)
        kind = np.dtype(dtype) if floats else None
        if sharding is None:
            return ocp.RestoreArgs(restore_type=np.ndarray, dtype=kind)
        place = sharding(name, x.shape) if callable(sharding) else sharding
        return ocp.ArrayRestoreArgs(sharding=place, global_shape=x.shape, dtype=kind)

    return one


def _groups(leaves: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Divides leaves into groups of about a share of the bytes, or of one leaf."""
    sizes = {k: int(np.prod(x.shape)) * np.dtype(x.dtype).itemsize for k, x in leaves.items()}
    most = min(max(sum(sizes.values()) * _SHARE, _LEAST), _MOST)
    group: dict[str, Any] = {}
    total = 0
    for name, x in leaves.items():
        num = sizes[name]
        if group and total + num > most:
            yield group
            group, total = {}, 0
        group[name] = x
        total += num
    if group:
        yield group


def _nested(leaves: Mapping[str, Any]) -> PyTree:
    """Returns nested dicts of leaves by name; the leaf itself if its name is ""."""
    out: dict[str, Any] = {}
    for name, x in leaves.items():
        if not name:
            return x
        *folders, last = name.split("/")
        node = out
        for key in folders:
            node = node.setdefault(key, {})
        node[last] = x
    return out


def _keys(prefix: str) -> list[str]:
    return [key for key in prefix.split("/") if key]
