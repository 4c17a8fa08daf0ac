"""What the loss tests share: meshes, the error measure, and one way to run a loss on a mesh."""

import pytest

from vlp.core import mesh as meshes


@pytest.fixture(
    params=[(8, 1, 1), (1, 8, 1), (2, 2, 2)], ids=lambda s: "mesh" + "".join(map(str, s))
)
def mesh(request):
    return meshes.make(meshes.MeshShape(*request.param))
