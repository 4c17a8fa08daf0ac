"""What the loss tests share: meshes, the error measure, and one way to run a loss on a mesh."""

import jax
import numpy as np
import pytest

from vlp.core import mesh as meshes


@pytest.fixture(
    params=[(8, 1, 1), (1, 8, 1), (2, 2, 2)], ids=lambda s: "mesh" + "".join(map(str, s))
)
def mesh(request):
    return meshes.make(meshes.MeshShape(*request.param))


@pytest.fixture(scope="session")
def error():
    """Relative norm of the difference of two trees of arrays."""

    def relative(ours, reference) -> float:
        a, b = (
            np.concatenate([np.asarray(x, np.float64).ravel() for x in jax.tree.leaves(t)])
            for t in (ours, reference)
        )
        assert a.shape == b.shape
        return float(np.linalg.norm(a - b) / np.linalg.norm(b))

    return relative
