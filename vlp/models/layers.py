"""Layers that the towers share: linear maps, norms, attention, MLP, pre-norm blocks and the scanned stack.

Parameters are float32; `dtype` is the type of the computation; norms and softmax are computed in float32. Randomness
comes from one key per example, given as an argument (None: deterministic), never from flax's own streams.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int, Key

from vlp.core import check
from vlp.core.mesh import constrain, gather, logical
from vlp.core.types import KEPT, SHARE
from vlp.ops import statistics
from vlp.ops.attention import attend
from vlp.ops.norm import batch_norm, layer_norm
from vlp.ops.params import spread

REMAT = {
    "none": None,
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_saveable,
    "dots_no_batch": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}
ACTIVATIONS = {
    "gelu": nn.gelu,
    "gelu_exact": lambda x: nn.gelu(x, approximate=False),
    "quick_gelu": lambda x: x * nn.sigmoid(1.702 * x),  # CLIP's (Hendrycks & Gimpel 2016, §2)
    "relu": nn.relu,
}


def rematerialised(module: Any, remat: str, **kwargs: Any) -> Any:
    """The module class with rematerialisation: `remat` (a name in REMAT) says what the backward pass keeps.

    kwargs: as of `flax.linen.remat`. Raises UserError for an unknown name.
    """
    if remat not in REMAT:
        raise check.unknown("model: remat", remat, REMAT)
    return module if remat == "none" else nn.remat(module, policy=REMAT[remat], **kwargs)


def lecun(fan_in: int) -> Any:
    """Truncated normal with variance 1/fan_in (LeCun et al. 1998)."""
    return nn.initializers.truncated_normal(stddev=fan_in**-0.5 / 0.87962566103423978)


class Linear(nn.Module):
    """x_…i · W_io + b_o over the last `len(shape_in)` axes of x.

    names: the logical axes of the kernel, shape_in first; the bias has those of shape_out.
    """

    shape_in: tuple[int, ...]
    shape_out: tuple[int, ...]
    names: tuple[str | None, ...]
    bias: bool = True
    dtype: str = "float32"

    @nn.compact
    def __call__(self, x: Array) -> Array:
        num_in = len(self.shape_in)
        fan_in = 1
        for n in self.shape_in:
            fan_in *= n
        kernel = self.param(
            "kernel", logical(lecun(fan_in), *self.names), self.shape_in + self.shape_out
        )
        contract = (tuple(range(x.ndim - num_in, x.ndim)), tuple(range(num_in)))
        kernel: Any = gather(jnp.asarray(kernel, self.dtype), self.names)
        # heads × head size as one dimension, as the product may be stored and one head is narrower than a TPU's tile
        merged = (*self.shape_out[:-2], math.prod(self.shape_out[-2:]))
        kernel = kernel.reshape(*self.shape_in, *merged)
        y = jax.lax.dot_general(x.astype(self.dtype), kernel, (contract, ((), ())))
        y = y.reshape(*y.shape[: -len(merged)], *self.shape_out)
        if self.bias:
            init = logical(nn.initializers.zeros, *self.names[num_in:])
            bias = self.param("bias", init, self.shape_out)
            y += spread(bias, y.shape, y.dtype)
        return y


class Norm(nn.Module):
    """LayerNorm in float32 (Ba et al. 2016), returned in the compute type."""

    dtype: str = "float32"
    eps: float = 1e-6

    @nn.compact
    def __call__(self, x: Float[Array, "*b D"]) -> Float[Array, "*b D"]:
        scale = self.param("scale", logical(nn.initializers.ones, "embed"), (x.shape[-1],))
        bias = self.param("bias", logical(nn.initializers.zeros, "embed"), (x.shape[-1],))
        x = x.astype(jnp.promote_types(x.dtype, self.dtype))
        y: Any = layer_norm(x, jnp.asarray(scale), jnp.asarray(bias), self.eps)
        return y.astype(self.dtype)


class BatchNorm(nn.Module):
    """Batch normalisation over all axes but the last (Ioffe & Szegedy 2015, arXiv:1502.03167).

    In training the mean and variance are those of the global batch, over the whole mesh; with micro-batches, of each
    micro-batch. Running ones, r ← momentum · r + (1 − momentum) · batch's, are used in evaluation and in teachers.
    zero: the scale starts at 0, so that a residual branch does too (Goyal et al. 2017, arXiv:1706.02677, §5.1).
    """

    dtype: str = "float32"
    momentum: float = 0.9
    eps: float = 1e-5
    zero: bool = False

    @nn.compact
    def __call__(self, x: Float[Array, "*b D"], *, train: bool) -> Float[Array, "*b D"]:
        ones, zeros = nn.initializers.ones, nn.initializers.zeros

        def vector(name: str, init: Any) -> Array:
            return jnp.asarray(self.param(name, logical(init, "embed"), (x.shape[-1],)))

        scale, bias = vector("scale", zeros if self.zero else ones), vector("bias", zeros)
        slots = {"stat_mean": vector("stat_mean", zeros), "stat_var": vector("stat_var", ones)}
        share = jnp.asarray(self.param(SHARE, logical(ones), ()))
        x = x.astype(jnp.promote_types(x.dtype, self.dtype))
        if not train:
            rate = scale * jax.lax.rsqrt(slots["stat_var"] + self.eps)
            shift = bias - slots["stat_mean"] * rate
            wide = jnp.promote_types(x.dtype, jnp.float32)
            y = x.astype(wide) * spread(rate, x.shape, wide) + spread(shift, x.shape, wide)
            return y.astype(self.dtype)
        out: Any = batch_norm(x, scale, bias, self.eps)
        y, mean, var = out
        found = {"stat_mean": mean, "stat_var": var}
        changes = {k: (1 - self.momentum) * (found[k] - slots[k]) for k in slots}
        return statistics.record(y, slots, share, changes).astype(self.dtype)


class AuxiliaryLoss(nn.Module):
    """Adds weight · loss to what is trained, from inside of a tower (a router's balance of its experts).

    In training the step's metrics have the loss under this module's path, without the weight; the logged `loss` is
    without it. The value is the mean over micro-batches, passes and the layers of a stack.
    """

    weight: float

    @nn.compact
    def __call__(
        self, x: Float[Array, "*b"], loss: Float[Array, ""], *, train: bool
    ) -> Float[Array, "*b"]:
        """Returns x; in evaluation and in teachers the loss does nothing."""
        value = jnp.asarray(self.param(statistics.VALUE, logical(nn.initializers.zeros), ()))
        share = jnp.asarray(self.param(SHARE, logical(nn.initializers.ones), ()))
        if not train:
            return x
        loss = loss.astype(jnp.float32)
        x = statistics.attach(x, loss, self.weight * share)
        change = {statistics.VALUE: loss - value}
        return statistics.record(x, {statistics.VALUE: value}, share, change)


class Attention(nn.Module):
    """Multi-head attention from x to `kv` (to x itself if None).

    heads: their number, a divisor of width. width: of the result, and of all heads together. kernel: a name in
    `ops.attention.KERNELS`.
    """

    heads: int
    width: int
    dtype: str = "float32"
    kernel: str = "auto"

    @nn.compact
    def __call__(
        self,
        x_BTD: Float[Array, "#B T D"],
        kv_BSC: Float[Array, "B S C"] | None = None,
        mask_BTS: Bool[Array, "#B T S"] | None = None,
        causal: bool = False,
    ) -> Float[Array, "B T E"]:
        """Attends.

        Args:
            x_BTD: where the queries come from; a batch of 1 serves every example of `kv_BSC`.
            kv_BSC: where the keys and values come from.
            mask_BTS: True where query t may look at key s.
            causal: query t looks at keys 0..t alone.
        """
        if self.width % self.heads:
            do = f"set width to {max(1, self.width // self.heads) * self.heads}, or heads to a divisor"
            expected = f"a multiple of heads = {self.heads}"
            raise check.error("model: width", self.width, expected, do)
        head = (self.heads, self.width // self.heads)
        names = ("heads", "kv")
        width_x = x_BTD.shape[-1]
        if kv_BSC is None:
            qkv = Linear(
                (width_x,), (3, *head), ("embed", None, *names), dtype=self.dtype, name="qkv"
            )(x_BTD)
            q, k, v = qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2]
        else:
            q = Linear((width_x,), head, ("embed", *names), dtype=self.dtype, name="q")(x_BTD)
            width_kv = kv_BSC.shape[-1]
            kv = Linear(
                (width_kv,), (2, *head), ("embed", None, *names), dtype=self.dtype, name="kv"
            )(kv_BSC)
            k, v = kv[:, :, 0], kv[:, :, 1]
            q = spread(q, (k.shape[0], *q.shape[1:]), q.dtype)
        q, k, v = (constrain(a, "batch", None, "heads", None) for a in (q, k, v))
        y = attend(q, k, v, mask_BTS, causal=causal, kernel=self.kernel)
        return Linear(head, (self.width,), (*names, "embed"), dtype=self.dtype, name="out")(y)


class Mlp(nn.Module):
    """Two linear maps with an activation between them."""

    hidden: int
    activation: str = "gelu"
    dtype: str = "float32"

    @nn.compact
    def __call__(self, x: Float[Array, "*b D"]) -> Float[Array, "*b D"]:
        if self.activation not in ACTIVATIONS:
            raise check.unknown("model: activation", self.activation, ACTIVATIONS)
        width = x.shape[-1]
        y = Linear((width,), (self.hidden,), ("embed", "mlp"), dtype=self.dtype, name="up")(x)
        y = ACTIVATIONS[self.activation](y)
        return Linear((self.hidden,), (width,), ("mlp", "embed"), dtype=self.dtype, name="down")(y)


def fold(keys_B: Key[Array, "B"] | None, number: int | Int[Array, ""]) -> Key[Array, "B"] | None:
    """Keys for another draw, one per example. None stays None."""
    return None if keys_B is None else jax.vmap(lambda k: jax.random.fold_in(k, number))(keys_B)


def drop(
    x: Float[Array, "B *s"],
    keys_B: Key[Array, "B"] | None,
    rate: float | Float[Array, ""],
    *,
    path: bool = False,
) -> Float[Array, "B *s"]:
    """Dropout (Srivastava et al. 2014), drawn from one key per example.

    Args:
        x: what is dropped; what is kept is divided by 1 − rate.
        keys_B: None: x is returned as it is.
        rate: share that is dropped, in [0, 1).
        path: an example's x is kept or dropped as a whole: drop path (Huang et al. 2016, arXiv:1603.09382).
    """
    if keys_B is None or (isinstance(rate, float | int) and rate == 0):
        return x
    shape = (1,) * (x.ndim - 1) if path else x.shape[1:]
    kept = jax.vmap(lambda k: jax.random.bernoulli(k, 1.0 - rate, shape))(keys_B)
    return jnp.where(kept, x / jnp.asarray(1.0 - rate, x.dtype), jnp.zeros((), x.dtype))


@dataclasses.dataclass(frozen=True)
class BlockConfig:
    """What the blocks of one stack have in common.

    width: of the tokens. heads: of the attention, a divisor of `width`. mlp: width of the MLP's hidden layer.
    activation: a name in ACTIVATIONS. dropout, drop_path: rates in [0, 1). dtype: type of the computation.
    attention: a kernel in `ops.attention.KERNELS`. remat: what the backward pass keeps of a block, a name in REMAT.
    eps: of the norms. norm_context: a norm of what the cross-attention reads. mlp_self: a block with cross-attention
    has an MLP after its self-attention too (both: OpenCLIP's CoCa).
    scan: False unrolls the loop over blocks; the parameters stay the same.
    """

    width: int
    heads: int
    mlp: int
    activation: str = "gelu"
    dropout: float = 0.0
    drop_path: float = 0.0
    dtype: str = "float32"
    attention: str = "auto"
    remat: str = "none"
    scan: bool = True
    eps: float = 1e-6
    norm_context: bool = False
    mlp_self: bool = False

    @classmethod
    def of(cls, tower: Any, **changes: Any) -> BlockConfig:
        """The block fields of a tower, with `changes`. An `mlp` of 0 means 4 · width."""
        names = [f.name for f in dataclasses.fields(cls) if hasattr(tower, f.name)]
        values = {name: getattr(tower, name) for name in names} | changes
        return cls(**values | {"mlp": values["mlp"] or 4 * values["width"]})


class Block(nn.Module):
    """Pre-norm transformer block: self-attention, cross-attention if `context` is given, MLP."""

    config: BlockConfig

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B T D"],
        layer: Int[Array, ""],
        context: Float[Array, "B S C"] | None,
        mask: Bool[Array, "#B T T"] | None,
        keys: Key[Array, "B"] | None,
        causal: bool,
        collect: bool,
    ) -> tuple[Float[Array, "B T D"], Float[Array, "B T D"] | None]:
        c = self.config
        x = checkpoint_name(x, KEPT)
        keys = fold(keys, layer) if c.dropout or c.drop_path else None

        def add(x: Array, y: Array, number: int) -> Array:
            y = drop(y, fold(keys, 2 * number), c.dropout)
            y = drop(y, fold(keys, 2 * number + 1), c.drop_path, path=True)
            return constrain(x + y, "batch", None, None)

        attention = lambda name: Attention(c.heads, c.width, c.dtype, c.attention, name=name)
        norm = lambda name, x: Norm(c.dtype, c.eps, name=name)(x)
        mlp = lambda name, x: Mlp(c.mlp, c.activation, c.dtype, name=name)(x)
        y = norm("norm_self", x)
        x = add(x, attention("self")(y, mask_BTS=mask, causal=causal), 0)
        if context is not None:
            if c.mlp_self:
                x = add(x, mlp("mlp_self", norm("norm_mlp_self", x)), 3)
            context = norm("norm_context", context) if c.norm_context else context
            x = add(x, attention("cross")(norm("norm_cross", x), context), 1)
        x = add(x, mlp("mlp", norm("norm_mlp", x)), 2)
        return x, x if collect else None


class Stack(nn.Module):
    """`depth` blocks under one scan: one block is compiled, and its parameters have a leading axis of layers."""

    depth: int
    config: BlockConfig

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B T D"],
        *,
        context: Float[Array, "B S C"] | None = None,
        mask: Bool[Array, "#B T T"] | None = None,
        keys: Key[Array, "B"] | None = None,
        causal: bool = False,
        collect: bool = False,
    ) -> tuple[Float[Array, "B T D"], Float[Array, "N B T D"] | None]:
        """Runs the blocks.

        Args:
            x: the tokens.
            context: what the blocks' cross-attention reads; None: the blocks have no cross-attention.
            mask: True where token t may attend to token s.
            keys: one key per example for dropout and drop path; None: deterministic.
            causal: token t attends only to tokens 0..t.
            collect: also return the output of every block.

        Returns:
            The last block's output, and the outputs of all blocks (or None).
        """
        c = self.config
        block = rematerialised(Block, c.remat, prevent_cse=not c.scan, static_argnums=(6, 7))
        every: Any = nn.broadcast
        scanned = nn.scan(
            block,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=(0, every, every, every, every, every),  # pyright: ignore  # typed as one int
            length=self.depth,
            unroll=1 if c.scan else self.depth,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )
        x, collected = scanned(c, name="blocks")(
            x.astype(c.dtype), jnp.arange(self.depth), context, mask, keys, causal, collect
        )
        return checkpoint_name(x, KEPT), collected
