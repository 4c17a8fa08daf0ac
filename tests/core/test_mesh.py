"""The mesh, the table of axis names, and how batches and parameters are placed."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from vlp.core import mesh as meshes
from vlp.core.check import UserError
from vlp.core.mesh import MeshShape


@pytest.fixture(scope="module")
def cube():
    return meshes.make(MeshShape(2, 2, 2))


@pytest.mark.parametrize(
    "shape, sizes",
    [
        ((), (8, 1, 1)),
        ((-1, 2, 2), (2, 2, 2)),
        ((2, -1, 1), (2, 4, 1)),
        ((1, 1, -1), (1, 1, 8)),
        ((8, 1, -1), (8, 1, 1)),
        ((2, 2, 2), (2, 2, 2)),
    ],
)
def test_sizes(shape, sizes):
    mesh = meshes.make(MeshShape(*shape))
    assert tuple(mesh.shape[a] for a in meshes.AXES) == sizes


@pytest.mark.parametrize(
    "shape", [(3, 1, 1), (2, 2, 1), (3, -1, 1), (-1, -1, 1), (0, 1, 1), (-2, 1, 1)]
)
def test_a_product_that_is_not_the_devices(shape):
    got = "data={} × fsdp={} × tensor={}".format(*shape)
    with pytest.raises(UserError) as caught:
        meshes.make(MeshShape(*shape))
    message = str(caught.value)
    assert (
        message
        == f"config.mesh: got {got}, expected a product of 8 devices; change it, or use -1 once"
    )


def test_some_of_the_devices():
    mesh = meshes.make(MeshShape(-1, 2, 1), jax.devices()[:4])
    assert dict(mesh.shape) == {"data": 2, "fsdp": 2, "tensor": 1}


def test_spec_takes_the_axes_that_divide(cube):
    spec = lambda names, shape: meshes.spec(names, shape, cube)
    assert spec(("batch", None), (8, 3)) == PartitionSpec(("data", "fsdp"), None)
    assert spec(("batch", None), (2, 3)) == PartitionSpec(("data",), None)  # 4 does not divide 2
    assert spec(("batch",), (3,)) == PartitionSpec(None)
    assert spec(("embed", "mlp"), (6, 4)) == PartitionSpec(("fsdp",), ("tensor",))
    assert spec(("embed", "mlp"), (5, 4)) == PartitionSpec(None, ("tensor",))
    assert spec(("heads", "mlp"), (4, 4)) == PartitionSpec(("tensor",), None)  # each axis once
    assert spec(("layers", "tokens", "kv"), (2, 2, 2)) == PartitionSpec(None, None, None)


def test_batches_must_divide(cube):
    meshes.check_batch(8, cube, 2)
    meshes.check_batch(4, cube)
    for batch, micro, where, message in [
        (
            6,
            1,
            "config.batch",
            "config.batch: got 6, expected a multiple of data×fsdp = 4; use a multiple of 4",
        ),
        (
            12,
            2,
            "x",
            "x: got 12, expected a multiple of data×fsdp = 4 × micro_batches = 2; use a multiple of 8",
        ),
        (0, 1, "x", "x: got 0,"),
        (4, 0, "x", "x: got 4,"),
    ]:
        with pytest.raises(UserError) as caught:
            meshes.check_batch(batch, cube, micro, where)
        assert str(caught.value).startswith(message)


def test_parameters_are_placed_by_their_names(cube):
    params = {
        "kernel": nn.LogicallyPartitioned(
            jax.ShapeDtypeStruct((4, 6), jnp.float32), ("embed", "mlp")
        ),
        "layers": {
            "scale": nn.LogicallyPartitioned(
                jax.ShapeDtypeStruct((2, 4), jnp.float32), ("layers", "embed")
            )
        },
        "temperature": jax.ShapeDtypeStruct((), jnp.float32),
    }
    placed = meshes.shardings(params, cube)
    assert placed["kernel"].spec == PartitionSpec(("fsdp",), ("tensor",))
    assert placed["layers"]["scale"].spec == PartitionSpec(None, ("fsdp",))
    assert placed["temperature"].is_fully_replicated


def test_a_large_parameter_must_name_its_axes(cube):
    small = jax.ShapeDtypeStruct(((1 << 18) - 1,), jnp.float32)
    assert meshes.shardings({"w": small}, cube)["w"].is_fully_replicated
    large = jax.ShapeDtypeStruct((512, 512), jnp.float32)
    with pytest.raises(AssertionError, match="block/w: 1048576 bytes without axis names"):
        meshes.shardings({"block": {"w": large}}, cube)
    with pytest.raises(AssertionError, match="unknown logical axes"):
        meshes.logical(nn.initializers.zeros, "embd")


def test_constrain_pins_inside_a_mesh_and_is_nothing_outside(cube):
    x = jnp.ones((8, 4))
    assert meshes.constrain(x, "batch", None) is x
    f = jax.jit(lambda x: meshes.constrain(x, "batch", "mlp"))
    with jax.set_mesh(cube):
        placed = f(x)
    assert placed.sharding.spec == PartitionSpec(("data", "fsdp"), "tensor")


def test_global_batches_keep_their_rows(cube):
    batch = {"x": np.arange(16).reshape(8, 2), "y": np.arange(8)}
    placed = meshes.to_global(batch, cube)
    for name, rows in batch.items():
        assert placed[name].sharding.is_equivalent_to(meshes.batch_sharding(cube), rows.ndim)
        np.testing.assert_array_equal(meshes.to_host(placed[name]), rows)
        assert {s.data.shape[0] for s in placed[name].addressable_shards} == {2}
