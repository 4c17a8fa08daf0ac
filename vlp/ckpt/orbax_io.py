"""How arrays are written and read: Orbax's handlers, with a checksum in every chunk, and what Orbax gets wrong mended.

Orbax has no option for checksums of array data. Zarr 3 has codecs for them, so the specification that Orbax makes of an
array is completed where the private function that makes it still exists. Readers need nothing: the codec is named in
the array's metadata, and TensorStore raises an error for a chunk that does not fit its checksum.
"""

from __future__ import annotations

import contextlib
import functools
import os
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from vlp.ckpt import buckets
from vlp.core import paths, tree

PyTree = Any
# CRC-32C in hardware costs less than any compression, which saves 8 % of float32 weights (benchmarks/checkpoint.py).
_CHECKSUM = {"name": "crc32c"}


def handler() -> ocp.PyTreeCheckpointHandler:
    """Returns the handler of a tree of arrays: Zarr 3 with checksums, or Orbax's default if they cannot be had."""
    there = checksums()
    return ocp.PyTreeCheckpointHandler(use_zarr3=there, use_compression=not there)


@functools.cache
def checksums() -> bool:
    """Makes Orbax add a checksum to every chunk that it writes as Zarr 3; returns whether it could."""
    try:
        from orbax.checkpoint._src.serialization import tensorstore_utils as module

        build = module._build_zarr3_metadata
        _inner(build(global_shape=(2,), chunk_shape=(2,), use_compression=False))
    except Exception:  # a later Orbax, without this private function or with another result
        return False

    def with_checksum(*args: Any, **kwargs: Any) -> Any:
        spec = build(*args, **kwargs)
        codecs = _inner(spec)
        if _CHECKSUM not in codecs:
            codecs.append(_CHECKSUM)
        return spec

    module._build_zarr3_metadata = with_checksum
    return True


def _inner(spec: Any) -> list[Any]:
    """Returns the codecs of an array's chunks."""
    (sharding,) = (c for c in spec["codecs"] if c["name"] == "sharding_indexed")
    codecs = sharding["configuration"]["codecs"]
    if not isinstance(codecs, list):
        raise TypeError("not a list")
    return codecs


def path(where: os.PathLike) -> epath.Path:
    """Returns a path for Orbax, which is told of S3 if it lies there."""
    if paths.is_remote(where):
        buckets.enable()
    return epath.Path(where)


def bound_barriers() -> None:
    """Makes Orbax's barriers of several processes meet at JAX's coordinator, with a limit of time.

    Its default is a collective on the devices. It waits for ever, and a save that another thread starts could meet the
    collectives of the main thread in another order on each host.
    """
    from absl import flags

    if not flags.FLAGS.is_parsed():  # else Orbax cannot read it
        flags.FLAGS.mark_as_parsed()
    with contextlib.suppress(KeyError):  # another Orbax
        flags.FLAGS["experimental_orbax_use_distributed_barrier"].value = True


def restore_args(target: PyTree) -> PyTree:
    """Returns Orbax's restore arguments for a tree of jax.ShapeDtypeStruct with shardings."""
    return ocp.checkpoint_utils.construct_restore_args(target)


def read_smallest(folder: os.PathLike, metadata: PyTree) -> None:
    """Reads the smallest array of an item, to prove that it can be read; raises what TensorStore raises if not."""
    arrays = {k: x for k, x in tree.named(metadata).items() if hasattr(x, "dtype")}
    if arrays:
        smallest = min(arrays, key=lambda name: int(np.prod(arrays[name].shape)))
        read(folder, metadata, {smallest: ocp.RestoreArgs(restore_type=np.ndarray)})


def read(folder: os.PathLike, metadata: PyTree, wanted: Mapping[str, Any]) -> dict[str, Any]:
    """Returns some arrays of an item by name.

    Args:
        folder: of the item.
        metadata: its `metadata`.
        wanted: Orbax's RestoreArgs of each array to read, by name.
    """
    leaf = lambda name, x: x if name in wanted else ocp.PLACEHOLDER
    leaf_args = lambda name, x: wanted.get(name, ocp.RestoreArgs())
    args = ocp.args.PyTreeRestore(
        tree.map_named(leaf, metadata), tree.map_named(leaf_args, metadata)
    )
    # Not a Checkpointer, in whose `restore` all processes meet: one alone may read.
    found = tree.named(ocp.PyTreeCheckpointHandler().restore(path(folder), args=args))
    return {name: found[name] for name in wanted}


def shapes(arrays: PyTree) -> list[tuple[Any, str]]:
    """Returns shape and type of every array, sorted, so that the order of containers does not matter."""
    found = [x for x in jax.tree.leaves(arrays) if hasattr(x, "dtype")]
    return sorted((tuple(getattr(x, "shape", ())), np.dtype(x.dtype).name) for x in found)


def metadata(folder: os.PathLike) -> PyTree:
    """Returns the tree of an item's array metadata (shape, dtype)."""
    return ocp.PyTreeCheckpointHandler().metadata(path(folder)).tree


def _glob(path: Any, pattern: str) -> Iterator[Any]:
    """`epath.Path.glob`, but without reading the directory's own name, such as `lr[1e-3]`, as a pattern.

    Orbax merges the processes' arrays by such a call. If it finds nothing, it only warns. (`core.paths` refuses names
    with such characters in a bucket.)
    """
    if path._uri_scheme:  # not on this machine
        return _GLOB(path, pattern)
    return (epath.Path(str(p)) for p in pathlib.Path(os.fspath(path)).glob(pattern))


_GLOB, epath.gpath.PosixGPath.glob = epath.gpath.PosixGPath.glob, _glob  # type: ignore[method-assign]
