"""ConvNeXt image tower (Liu et al. 2022, arXiv:2201.03545)."""

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
from vlp.models.layers import Mlp, Norm, drop, fold
from vlp.ops.params import spread


class ConvNeXt(nn.Module):
    """Four stages (or as many as `depths` has) of blocks; the first sees a fourth of the side, each next one half.

    depths, widths: blocks and channels of each stage. drop_path: rate of the last block; it rises from 0 at the first.
    layer_scale: start of the factor of each channel of a residual branch. mean, std: pixels in [0, 1] are normalised
    by them. dtype, remat, scan: as of `layers.BlockConfig`.
    """

    kind: ClassVar[str] = "image"

    depths: tuple[int, ...] = (3, 3, 9, 3)
    widths: tuple[int, ...] = (96, 192, 384, 768)
    activation: str = "gelu_exact"
    drop_path: float = 0.0
    layer_scale: float = 1e-6
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
            keys: one key per example for drop path; None: deterministic.

        Returns:
            tokens [B N D]: the last feature map, row by row, normalised. pooled [B D]: its mean, normalised. kept None.

        Raises:
            UserError: an argument that it cannot serve, or an image size that its strides do not divide.
        """
        check_stages(self.depths, self.widths)
        stride = 4 * 2 ** (len(self.depths) - 1)
        check_whole(self, keep_ratio, kept, layers, image.shape[1], stride)
        keys = fold(keys, 1) if self.drop_path else None
        rates = jnp.linspace(0.0, self.drop_path, sum(self.depths))
        x = Conv(self.widths[0], 4, 4, dtype=self.dtype, name="stem")(
            pixels(image, self.mean, self.std)
        )
        x = Norm(self.dtype, name="stem_norm")(x)
        for i, (depth, width) in enumerate(zip(self.depths, self.widths)):
            if i:
                x = Norm(self.dtype, name=f"down{i}_norm")(x)
                x = Conv(width, 2, 2, dtype=self.dtype, name=f"down{i}")(x)
            start = sum(self.depths[:i])
            numbers = jnp.arange(start, start + depth), rates[start : start + depth]
            x = ConvNeXtStage(
                self.activation,
                self.layer_scale,
                self.dtype,
                self.remat,
                self.scan,
                name=f"stage{i}",
            )(x, numbers, keys)
        x = checkpoint_name(x, KEPT)
        norm = Norm(self.dtype, name="norm")
        tokens = x.reshape(x.shape[0], -1, x.shape[-1])
        return {"tokens": norm(tokens), "pooled": norm(tokens.mean(axis=1)), "kept": None}


class ConvNeXtStage(nn.Module):
    """Equal blocks in a row. numbers: of each block in the tower, and each block's rate of drop path."""

    activation: str
    layer_scale: float
    dtype: str
    remat: str
    scan: bool

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B R R D"],
        numbers: tuple[Int[Array, "N"], Float[Array, "N"]],
        keys: Key[Array, "B"] | None,
    ) -> Float[Array, "B R R D"]:
        blocks = repeat(ConvNeXtBlock, len(numbers[0]), remat=self.remat, scan=self.scan)
        blocks = blocks(self.activation, self.layer_scale, self.dtype, name="blocks")
        return blocks(x, numbers, keys)[0]


class ConvNeXtBlock(nn.Module):
    """7 × 7 depthwise convolution, norm and MLP, on a residual branch with a factor for each channel."""

    activation: str
    layer_scale: float
    dtype: str

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B R R D"],
        number_rate: tuple[Int[Array, ""], Float[Array, ""]],
        keys: Key[Array, "B"] | None,
    ) -> tuple[Float[Array, "B R R D"], None]:
        """number_rate: this block's number in the tower, and its rate of drop path."""
        x, (number, rate), width = checkpoint_name(x, KEPT), number_rate, x.shape[-1]
        y = Conv(width, 7, padding=3, depthwise=True, dtype=self.dtype, name="conv")(x)
        y = Norm(self.dtype, name="norm")(y)
        y = Mlp(4 * width, self.activation, self.dtype, name="mlp")(y)
        init = logical(nn.initializers.constant(self.layer_scale), "embed")
        y *= spread(self.param("layer_scale", init, (width,)), y.shape, y.dtype)
        y = drop(y, fold(keys, number), rate, path=True)
        return constrain(x + y, "batch", None, None, None), None


def check_stages(depths: tuple[int, ...], widths: tuple[int, ...]) -> None:
    """Raises UserError unless there is a positive depth and a positive width for each stage."""
    if not depths or len(depths) != len(widths) or min(depths + widths) < 1:
        got = f"depths {depths}, widths {widths}"
        do = "give as many depths as widths, each 1 or more"
        raise check.error("config.model.image_tower", got, "a depth and a width per stage", do)
