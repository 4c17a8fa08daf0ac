"""What the convolutional towers share: a convolution, pixels to numbers, and a row of equal blocks under one scan."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Num

from vlp.core import check
from vlp.core import mesh as meshes
from vlp.core.mesh import constrain, gather, logical
from vlp.models.layers import lecun, rematerialised
from vlp.ops.params import spread


class Conv(nn.Module):
    """Convolution of images [B R R C] with a square kernel of `size`.

    padding: rows and columns of zeros on each side. depthwise: each channel on its own, and `width` is their number.
    """

    width: int
    size: int
    stride: int = 1
    padding: int = 0
    depthwise: bool = False
    bias: bool = True
    dtype: str = "float32"

    @nn.compact
    def __call__(self, x: Float[Array, "B R R C"]) -> Float[Array, "B S S D"]:
        inputs = 1 if self.depthwise else x.shape[-1]
        names = (None, None, None, "embed") if self.depthwise else (None, None, "embed", "mlp")
        shape = (self.size, self.size, inputs, self.width)
        init = logical(lecun(self.size**2 * inputs), *names)
        kernel: Any = gather(jnp.asarray(self.param("kernel", init, shape), self.dtype), names)
        y = convolve(x.astype(self.dtype), kernel, self.stride, self.padding)
        if self.bias:
            init = logical(nn.initializers.zeros, names[-1])
            y += spread(self.param("bias", init, (self.width,)), y.shape, y.dtype)
        return constrain(y, "batch", None, None, None)


def convolve(
    x: Float[Array, "B R R C"], kernel: Float[Array, "k k c D"], stride: int, padding: int
) -> Float[Array, "B S S D"]:
    """The convolution of x with a kernel; with a kernel of one input channel, each channel's with its own.

    A depthwise one runs on every device's examples by itself: left to XLA's partitioner, the gradient of its kernel was
    twice as large on a mesh of two devices each for data, fsdp and tensor (JAX 0.10).
    """
    groups = x.shape[-1] // kernel.shape[2]

    def plain(x: Array, kernel: Array) -> Array:
        return jax.lax.conv_general_dilated(
            x,
            kernel,
            (stride, stride),
            [(padding, padding)] * 2,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            feature_group_count=groups,
        )

    mesh = jax.sharding.get_abstract_mesh()
    if groups == 1 or mesh.empty or mesh.size == 1:
        return plain(x, kernel)
    rows = meshes.spec(("batch", None, None, None), x.shape, mesh)
    return jax.shard_map(plain, in_specs=(rows, PartitionSpec()), out_specs=rows)(x, kernel)


def pixels(
    image: Num[Array, "B R R 3"], mean: tuple[float, ...], std: tuple[float, ...]
) -> Float[Array, "B R R 3"]:
    """u8 pixels, or floats in [0, 1], less `mean` and divided by `std`."""
    x = image.astype(jnp.float32) / (255.0 if image.dtype == jnp.uint8 else 1.0)
    mean_3, std_3 = (jnp.broadcast_to(jnp.asarray(v, jnp.float32), x.shape) for v in (mean, std))
    return (x - mean_3) / std_3


def repeat(block: Any, num: int, *, remat: str, scan: bool, static: tuple[int, ...] = ()) -> Any:
    """The module class of `num` blocks in a row, as one scan, whose parameters have a leading axis of layers.

    Args:
        block: a module class; a call takes x, one value per block, then arguments that all blocks share, and returns
            (x, None).
        num: how many blocks.
        remat: what the backward pass keeps of a block (`layers.REMAT`).
        scan: False unrolls the loop; the parameters stay the same.
        static: indices of the arguments that are not arrays, counted from 1 (x).
    """
    every: Any = nn.broadcast
    return nn.scan(
        rematerialised(block, remat, prevent_cse=not scan, static_argnums=static),
        variable_axes={"params": 0},
        split_rngs={"params": True},
        in_axes=(0, every),  # pyright: ignore  # typed as one int
        length=num,
        unroll=1 if scan else num,
        metadata_params={nn.PARTITION_NAME: "layers"},
    )


def check_whole(
    tower: Any, keep_ratio: float, kept: Any, layers: bool, size: int, stride: int
) -> None:
    """Raises UserError for options that only patch towers have, and for images that the strides do not divide."""
    name = type(tower).__name__
    if keep_ratio != 1 or kept is not None:
        got = "a choice of patches" if kept is not None else keep_ratio
        do = "set it to 1, or set config.model.image_tower.name='vit'"
        where, expected = "config.objective.keep_ratio", f"1 with {name}, which sees whole images"
        raise check.error(where, got, expected, do)
    if layers:
        do = "set config.model.image_tower.name='vit'"
        raise check.error(f"config.model.image_tower: {name}", "layers=True", "a ViT", do)
    if size % stride:
        do = f"set it to {max(1, round(size / stride)) * stride}"
        raise check.error("config.data.image_px", size, f"a multiple of {stride} with {name}", do)
