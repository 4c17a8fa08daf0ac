"""Vision transformer (Dosovitskiy et al. 2021, arXiv:2010.11929) with FLIP's patch dropping."""

from __future__ import annotations

from typing import Any, ClassVar

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key, Num

from vlp.core import check
from vlp.core.mesh import constrain, logical
from vlp.models.heads import MapPool
from vlp.models.layers import BlockConfig, Linear, Norm, Stack, fold, rematerialised
from vlp.ops import masking, posembed
from vlp.ops.params import spread

POOLS = ("none", "cls", "mean", "mean_patches", "map")
POSITIONS = ("learned", "sincos", "sincos_big_vision")


class ViT(nn.Module):
    """Transformer over an image's patches. An `mlp` of 0 means 4 · width.

    pos: positions, "learned", "sincos" or "sincos_big_vision" (fixed; `ops.posembed.sincos_2d`). pool: how an image
    becomes one vector: "cls" (a learned token, put in front after masking), "mean" over all tokens, "mean_patches"
    over all but the CLS (CLIPA), "map" (attention pooling, SigLIP) or "none". cls: adds the token for the other pools
    too; "mean" counts it (FLIP). cls_pos: the CLS has a learned position (CLIP). registers: number of learned tokens
    that take part in the blocks and are not returned (Darcet et al. 2024, arXiv:2309.16588). pre_norm: LayerNorm before
    the blocks (CLIP). pool_first: the image is pooled before the final norm (CLIPA). eps: of the norms. patch_bias:
    CLIP's patch embedding has none. mean, std: pixels in [0, 1] are normalised by them.
    """

    kind: ClassVar[str] = "image"

    patch: int
    width: int
    depth: int
    heads: int
    mlp: int = 0
    pos: str = "learned"
    pool: str = "none"
    cls: bool = False
    cls_pos: bool = False
    registers: int = 0
    pre_norm: bool = False
    pool_first: bool = False
    eps: float = 1e-6
    patch_bias: bool = True
    activation: str = "gelu"
    dropout: float = 0.0
    drop_path: float = 0.0
    mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    std: tuple[float, ...] = (0.5, 0.5, 0.5)
    dtype: str = "float32"
    remat: str = "none"
    scan: bool = True
    attention: str = "auto"

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
        """Encodes images.

        Args:
            image: u8, or float in [0, 1].
            keep_ratio: share of the patches that is kept (FLIP), in (0, 1]. Without keys the image is whole.
            keys: one key per example, for masks and dropout; None: deterministic.
            kept: ids of the patches to keep, in place of a random draw. A patch keeps its position.
            layers: also return every block's output.

        Returns:
            tokens [B N D]: the CLS (if there is one), then the patches; no registers. pooled [B D] or None. kept: the
            ids i32[B M] or None. layers [depth B N D] on request.

        Raises:
            UserError: a wrong field, keep_ratio or image size.
        """
        if self.pool not in POOLS:
            raise check.unknown("model.image.pool", self.pool, POOLS)
        if not 0 < keep_ratio <= 1:
            where, do = "config.objective.keep_ratio", "set it to 1 for whole images, or to 0.5"
            raise check.error(where, keep_ratio, "a fraction in (0, 1]", do)
        patches_BNP = patchify(image, self.patch)
        num = patches_BNP.shape[1]
        pos_ND = constrain(self._positions(num), None, None)
        draw_keys = fold(keys, 0)
        if kept is None and keep_ratio < 1 and draw_keys is not None:
            kept = masking.keep_ids(draw_keys, num, keep_ratio)
        if (
            kept is not None
        ):  # dropping before the linear map equals dropping after it, and costs less
            patches_BNP = jnp.take_along_axis(patches_BNP, kept[..., None], axis=1)
        x = patches_BNP.astype(jnp.float32) / (255.0 if image.dtype == jnp.uint8 else 1.0)
        mean, std = (
            jnp.tile(jnp.asarray(v, jnp.float32), (1, 1, self.patch**2))
            for v in (self.mean, self.std)
        )
        names = ("pixels", "embed")
        embed = Linear(
            x.shape[-1:], (self.width,), names, bias=self.patch_bias, dtype=self.dtype, name="patch"
        )
        x = embed((x - mean) / std)
        x += spread(pos_ND, x.shape, x.dtype) if kept is None else pos_ND[kept].astype(x.dtype)
        x = constrain(self._add_learned(x), "batch", None, None)
        if self.pre_norm:
            x = Norm(self.dtype, self.eps, name="norm_pre")(x)
        config = BlockConfig.of(self)
        stack = Stack(self.depth, config, name="encoder")
        x, collected = stack(x, keys=fold(keys, 1), collect=layers)
        x = x[:, self.registers :]
        norm = Norm(self.dtype, self.eps, name="norm")
        tokens = norm(x)
        if self.pool == "map":
            pool = rematerialised(MapPool, self.remat)
            size = self.heads, config.mlp, self.activation, self.dtype, self.eps
            pooled = pool(*size, name="pool_map")(tokens)
        else:
            pooled = self._pool(x if self.pool_first else tokens)
            pooled = norm(pooled) if self.pool_first and pooled is not None else pooled
        out = {"tokens": tokens, "pooled": pooled, "kept": kept}
        if collected is not None:
            out["layers"] = collected[:, :, self.registers :]
        return out

    def _add_learned(self, x: Float[Array, "B N D"]) -> Float[Array, "B M D"]:
        """Registers and CLS in front of the patches: neither is ever dropped."""
        init = logical(nn.initializers.normal(0.02), None, "embed")
        front = []
        if self.registers:
            front.append(self.param("registers", init, (self.registers, self.width)))
        if self.cls or self.pool == "cls":
            init = logical(nn.initializers.normal(0.02), "embed")
            cls: Any = self.param("cls", init, (self.width,))
            if self.cls_pos:
                cls = cls + self.param("cls_pos", init, (self.width,))
            front.append(cls[None])
        tokens = [spread(f, (x.shape[0], *f.shape), x.dtype) for f in front]
        return jnp.concatenate([*tokens, x], axis=1)

    def _pool(self, x: Float[Array, "B N D"]) -> Float[Array, "B D"] | None:
        if self.pool == "cls":
            return x[:, 0]
        if self.pool == "mean":
            return x.mean(axis=1)
        return x[:, int(self.cls) :].mean(axis=1) if self.pool == "mean_patches" else None

    def _positions(self, num: int) -> Float[Array, "N D"]:
        side = round(num**0.5)
        if self.pos not in POSITIONS:
            raise check.unknown("model.image.pos", self.pos, POSITIONS)
        if self.pos != "learned":
            ends = self.pos == "sincos_big_vision"
            return jnp.asarray(posembed.sincos_2d(side, side, self.width, ends=ends))
        return self.param(
            "pos", logical(nn.initializers.normal(0.02), "tokens", "embed"), (num, self.width)
        )


def patchify(image: Num[Array, "B R R 3"], patch: int) -> Num[Array, "B N P"]:
    """Cuts square patches, row by row; a patch is flattened as (row, column, channel)."""
    size = image.shape[1]
    if size % patch:
        do = f"set it to {max(1, size // patch) * patch}, or the patch to a divisor of it"
        expected = f"a multiple of model.image.patch = {patch}"
        raise check.error("config.data.image_px", size, expected, do)
    grid = image.reshape(image.shape[0], size // patch, patch, size // patch, patch, 3)
    return grid.swapaxes(2, 3).reshape(image.shape[0], (size // patch) ** 2, patch * patch * 3)
