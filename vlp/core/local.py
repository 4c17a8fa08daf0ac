"""The rows of a global batch that a process loads."""

from __future__ import annotations

import jax
import numpy as np
from jax.sharding import Mesh

from vlp.core import mesh as meshes


def rows(batch: int, mesh: Mesh, process: int | None = None) -> tuple[range, ...]:
    """Returns the rows of a global batch that are stored on the devices of a process.

    Args:
        batch: number of rows of the global batch.
        mesh: the run's mesh.
        process: index of the process (default: this process).

    Returns:
        Blocks of consecutive rows, in order. One block if the process's devices are neighbours in the mesh; several if
        they are not (folded TPU meshes); all rows if only axes that do not split the batch extend over hosts.
    """
    process = jax.process_index() if process is None else process
    indices = meshes.batch_sharding(mesh).devices_indices_map((batch,))
    blocks = {
        index.indices(batch)[:2] for d, (index,) in indices.items() if d.process_index == process
    }
    out: list[range] = []
    for start, stop in sorted(blocks):
        if out and out[-1].stop == start:
            out[-1] = range(out[-1].start, stop)
        else:
            out.append(range(start, stop))
    return tuple(out)


def indices(batch: int, mesh: Mesh) -> np.ndarray:
    """Returns the numbers i64[b] of the rows of a global batch that this process loads; arguments as of `rows`."""
    return np.concatenate([np.arange(block.start, block.stop) for block in rows(batch, mesh)])
