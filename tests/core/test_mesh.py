"""The mesh, the table of axis names, and how batches and parameters are placed."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, PartitionSpec

from vlp.core import mesh as meshes
from vlp.core.check import UserError
from vlp.core.mesh import MeshShape


@pytest.fixture(scope="module")
def cube():
    return meshes.make(MeshShape(2, 2, 2))


@pytest.mark.parametrize(
    "shape, sizes",
    [
        ((), (8, 1, 1, 1)),
        ((-1, 2, 2), (2, 2, 2, 1)),
        ((2, -1, 1), (2, 4, 1, 1)),
        ((1, 1, -1), (1, 1, 8, 1)),
        ((8, 1, -1), (8, 1, 1, 1)),
        ((2, 2, 2), (2, 2, 2, 1)),
        ((2, 2, 1, 2), (2, 2, 1, 2)),
    ],
)
def test_mesh_sizes_fill_the_devices(shape, sizes):
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
        == f"config.mesh: got {got}, expected a product of 8 devices; set one axis to -1: it takes what is left"
    )


def test_some_of_the_devices():
    mesh = meshes.make(MeshShape(-1, 2, 1), jax.devices()[:4])
    assert dict(mesh.shape) == {"replica": 1, "data": 2, "fsdp": 2, "tensor": 1}


@dataclasses.dataclass(frozen=True)
class Chip:
    """What jax.make_mesh looks at in a chip of a TPU pod."""

    id: int
    coords: tuple[int, int, int]
    slice_index: int = 0
    platform: str = "tpu"
    device_kind: str = "TPU v6 lite"
    core_on_chip: int = 0
    process_index: int = 0


@pytest.mark.parametrize("slices", [1, 2])
def test_sizes_that_whole_axes_of_a_torus_do_not_give(slices):
    """CoCa giant's fsdp=128 on 16×16 chips, where JAX by itself has no mesh."""
    chips = [
        Chip(256 * s + 16 * y + x, (x, y, 0), s)
        for s in range(slices)
        for y in range(16)
        for x in range(16)
    ]
    mesh = meshes.make(MeshShape(2, 128, 1), chips)
    assert mesh.devices.shape == (slices, 2, 128, 1)
    assert set(mesh.devices.flat) == set(chips)
    assert {c.slice_index for c in mesh.devices[-1].flat} == {slices - 1}


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
        (4, 0, "x", "config.micro_batches: got 0, expected 1 or more"),
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
    assert placed["layers"]["scale"].spec == PartitionSpec(None, None)  # a vector: whole
    assert placed["temperature"].is_fully_replicated


def grid_of(**sizes):
    sizes = {"replica": 1, "data": 1, "fsdp": 1, "tensor": 1} | sizes
    return AbstractMesh(tuple(sizes.values()), tuple(sizes))


def test_spec_takes_the_most_devices_that_divide():
    grid = grid_of(replica=2, data=3, fsdp=4)
    assert meshes.spec(("batch",), (24,), grid) == PartitionSpec(("replica", "data", "fsdp"))
    assert meshes.spec(("batch",), (12,), grid) == PartitionSpec(("data", "fsdp"))  # 12 > 6
    assert meshes.spec(("batch",), (6,), grid) == PartitionSpec(("replica", "data"))


def test_where_fsdp_does_not_divide_the_width_it_takes_another_dimension():
    """CoCa giant's width is 11 × 128: on 256 devices its MLP is divided by its hidden size."""
    grid, large = grid_of(fsdp=256), 1 << 30
    spec = lambda names, shape, num=large: meshes.param_spec(names, shape, num, grid)
    assert spec(("layers", "embed", "mlp"), (40, 1408, 6144)) == PartitionSpec(
        None, None, ("fsdp",)
    )
    assert spec(("layers", "embed", "mlp"), (256, 1408, 6143)) == PartitionSpec(None, None, None)
    assert spec(("embed", "mlp"), (1408, 6144), num=1000) == PartitionSpec(
        None, None
    )  # not worth it
    both = grid_of(fsdp=4, tensor=2)
    found = meshes.param_spec(("embed", "mlp"), (3, 8), large, both)
    assert found == PartitionSpec(None, ("tensor", "fsdp"))


def test_large_leaves_that_stay_whole_are_named(cube):
    place = lambda shape, *spec: jax.ShapeDtypeStruct(
        shape, jnp.float32, sharding=jax.sharding.NamedSharding(cube, PartitionSpec(*spec))
    )
    placed = {
        "whole": place((1024, 1024)),
        "tensor": place((1024, 1024), "tensor"),
        "shards": place((1024, 1024), ("tensor", "fsdp")),
        "small": place((512, 512)),
    }
    assert meshes.whole(placed, cube) == {"whole": 4 << 20, "tensor": 2 << 20}
    assert meshes.whole(placed, meshes.make(MeshShape())) == {}


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
