"""Which rows of a global batch a process loads: those that its devices hold."""

from __future__ import annotations

import jax
from jax.sharding import Mesh

from vlp.core import mesh as meshes


def rows(batch: int, mesh: Mesh, process: int | None = None) -> tuple[range, ...]:
    """Returns the rows of a global batch on a process's devices, as blocks of consecutive rows in order.

    One block if the host's devices are neighbours in the mesh; several if they are not (folded TPU meshes); all rows if
    an axis that does not split the batch extends over hosts.

    Args:
        batch: number of rows of the global batch.
        mesh: the run's mesh.
        process: number of the process; None: this one.
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
