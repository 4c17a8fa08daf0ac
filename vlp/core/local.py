"""Which rows of a global batch this process has to load: those that its devices hold, however the mesh is laid out."""

from __future__ import annotations

import jax
from jax.sharding import Mesh

from vlp.core import mesh as meshes


def rows(batch: int, mesh: Mesh, process: int | None = None) -> tuple[range, ...]:
    """The blocks of consecutive rows of a global batch on a process's devices (default: this one's), in order.

    One block on hosts in a row; several where a TPU mesh is folded so that a host's chips are not neighbours in it;
    every row where an axis that does not split the batch runs across hosts.
    """
    process = jax.process_index() if process is None else process
    places = meshes.batch_sharding(mesh).devices_indices_map((batch,))
    blocks = {
        index.indices(batch)[:2] for d, (index,) in places.items() if d.process_index == process
    }
    out: list[range] = []
    for start, stop in sorted(blocks):
        if out and out[-1].stop == start:
            out[-1] = range(out[-1].start, stop)
        else:
            out.append(range(start, stop))
    return tuple(out)
