"""CLIP's modified ResNet image tower (Radford et al. 2021, arXiv:2103.00020, §2.4).

Where it differs from a ResNet (He et al. 2016, arXiv:1512.03385): a stem of three convolutions, average pooling before
every strided step (anti-aliasing, Zhang 2019, arXiv:1904.11486), and attention pooling in place of the mean.
"""

from __future__ import annotations

from typing import Any, ClassVar

import flax.linen as nn
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int, Key, Num

from vlp.core import check
from vlp.core.mesh import constrain, logical
from vlp.core.types import KEPT
from vlp.models.convs import Conv, check_whole, pixels, repeat
from vlp.models.layers import BatchNorm, Linear, rematerialised
from vlp.ops.attention import attend
from vlp.ops.params import spread


class ResNet(nn.Module):
    """Stages of bottleneck blocks with batch norm, at 1/4 of the image side and then half of it per stage.

    depths: blocks of each stage. width: channels of the stem; stage i has 4 · 2^i times as many. heads: heads of the
    attention pooling. out: width of its output (0: the last stage's width); the joint space's width together with
    project_image False gives CLIP's projection. momentum: of the running statistics. mean, std: normalise pixels in
    [0, 1]. dtype, remat, scan: as in `layers.BlockConfig`.
    """

    kind: ClassVar[str] = "image"

    depths: tuple[int, ...] = (3, 4, 6, 3)
    width: int = 64
    heads: int = 32
    out: int = 0
    momentum: float = 0.9
    mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    std: tuple[float, ...] = (0.5, 0.5, 0.5)
    dtype: str = "float32"
    remat: str = "none"
    scan: bool = True

    @nn.compact
    def __call__(
        self,
        image: Num[Array, "B R R 3"],
        *,
        keep_ratio: float = 1.0,
        keys: Key[Array, "B"] | None = None,
        kept: Int[Array, "B M"] | None = None,
        layers: bool = False,
    ) -> dict[str, Any]:
        """Encodes whole images.

        Args:
            image: u8, or float in [0, 1].
            keep_ratio: 1; kept: None; layers: False. Nothing else can be had of this tower.
            keys: not None: batch norm uses the batch's statistics and changes the running ones (training).

        Returns:
            tokens [B N D]: the last feature map, row by row. pooled [B E]: of the attention pooling. kept None.

        Raises:
            UserError: an argument that it cannot serve, or an image size that its strides do not divide.
        """
        if not self.depths or min(self.depths) < 1:
            do = "give each stage 1 block or more"
            raise check.error("config.model.image_tower.depths", self.depths, "depths", do)
        stride = 4 * 2 ** (len(self.depths) - 1)
        check_whole(self, keep_ratio, kept, layers, image.shape[1], stride)
        train, norm = keys is not None, {"momentum": self.momentum, "dtype": self.dtype}
        x = pixels(image, self.mean, self.std)
        for i, width in enumerate((self.width // 2, self.width // 2, self.width)):
            conv = Conv(width, 3, 1 if i else 2, 1, bias=False, dtype=self.dtype, name=f"stem{i}")
            x = nn.relu(BatchNorm(**norm, name=f"stem{i}_norm")(conv(x), train=train))
        x = average(x, 2)
        for i, depth in enumerate(self.depths):
            size, name = (self.width * 2**i, self.momentum, self.dtype), f"stage{i}"
            stage = ResNetStage(depth, *size, 2 if i else 1, self.remat, self.scan, name=name)
            x = stage(x, train)
        x = checkpoint_name(x, KEPT)
        tokens = x.reshape(x.shape[0], -1, x.shape[-1])
        pooled = AttentionPool2d(self.heads, self.out, self.dtype, name="pool")(tokens)
        return {"tokens": tokens, "pooled": pooled, "kept": None}


class ResNetStage(nn.Module):
    """A block that changes size and width, and depth − 1 equal ones."""

    depth: int
    width: int
    momentum: float
    dtype: str
    stride: int
    remat: str
    scan: bool

    @nn.compact
    def __call__(self, x: Float[Array, "B R R C"], train: bool) -> Float[Array, "B S S D"]:
        size = self.width, self.momentum, self.dtype
        first = rematerialised(Bottleneck, self.remat, static_argnums=(3,))
        x, _ = first(*size, self.stride, True, name="first")(x, None, train)
        if self.depth > 1:
            num = self.depth - 1
            rest = repeat(Bottleneck, num, remat=self.remat, scan=self.scan, static=(3,))
            x, _ = rest(*size, name="blocks")(x, None, train)
        return x


class Bottleneck(nn.Module):
    """1 × 1, 3 × 3 and 1 × 1 convolution on a residual branch; 4 · width channels.

    stride: of the average pooling before the last convolution. project: the other branch is pooled and projected.
    """

    width: int
    momentum: float
    dtype: str
    stride: int = 1
    project: bool = False

    @nn.compact
    def __call__(
        self, x: Float[Array, "B R R C"], _: None, train: bool
    ) -> tuple[Float[Array, "B S S D"], None]:
        x, wide = checkpoint_name(x, KEPT), 4 * self.width

        def norm(y: Array, name: str, zero: bool = False) -> Array:
            batch_norm = BatchNorm(self.dtype, self.momentum, zero=zero, name=f"{name}_norm")
            return batch_norm(y, train=train)

        def linear(y: Array, width: int, names: tuple[str, str | None], name: str) -> Array:
            return Linear(y.shape[-1:], (width,), names, False, self.dtype, name=name)(y)

        y = nn.relu(norm(linear(x, self.width, ("embed", "mlp"), "conv0"), "conv0"))
        y = Conv(self.width, 3, padding=1, bias=False, dtype=self.dtype, name="conv1")(y)
        y = average(nn.relu(norm(y, "conv1")), self.stride)
        y = norm(linear(y, wide, ("mlp", "embed"), "conv2"), "conv2", zero=True)
        if self.project:
            x = linear(average(x, self.stride), wide, ("embed", None), "project")
            x = norm(x, "project")
        return constrain(nn.relu(x + y), "batch", None, None, None), None


class AttentionPool2d(nn.Module):
    """Attention of the mean token to itself and all tokens, with positions.

    width_out 0: the tokens' width.
    """

    heads: int
    width_out: int = 0
    dtype: str = "float32"

    @nn.compact
    def __call__(self, x: Float[Array, "B N D"]) -> Float[Array, "B E"]:
        num, width = x.shape[1] + 1, x.shape[-1]
        if width % self.heads:
            where, expected = "config.model.image_tower.heads", f"a divisor of {width}"
            raise check.error(where, self.heads, expected, f"set it to {max(1, width // 64)}")
        x = jnp.concatenate([x.mean(axis=1, keepdims=True), x], axis=1).astype(self.dtype)
        init = logical(nn.initializers.normal(width**-0.5), "tokens", "embed")
        x += spread(self.param("pos", init, (num, width)), x.shape, x.dtype)
        head, names = (self.heads, width // self.heads), ("heads", "kv")
        q = Linear((width,), head, ("embed", *names), dtype=self.dtype, name="q")(x[:, :1])
        kv = Linear((width,), (2, *head), ("embed", None, *names), dtype=self.dtype, name="kv")(x)
        y = attend(q, kv[:, :, 0], kv[:, :, 1])
        size = (self.width_out or width,)
        return Linear(head, size, (*names, "embed"), dtype=self.dtype, name="out")(y)[:, 0]


def average(x: Float[Array, "B R R D"], size: int) -> Float[Array, "B S S D"]:
    """The mean of each square of `size` × `size` pixels."""
    if size == 1:
        return x
    num, side, _, width = x.shape
    y = x.reshape(num, side // size, size, side // size, size, width)
    return y.mean(axis=(2, 4))
