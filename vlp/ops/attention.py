"""Scaled dot-product attention. Softmax is computed in float32.

XLA makes the whole matrix of logits; JAX's fused kernels (Splash on TPUs, cuDNN on GPUs) do not.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float

from vlp.core import check
from vlp.core import mesh as meshes

KERNELS = ("auto", "xla", "splash", "cudnn")
SPLASH_FROM = 256  # queries and keys, from which "auto" takes Splash on a TPU: docs/attention.md
BLOCK = 1024  # largest block of queries or keys in Splash
LANES = 128


def attend(
    q_BTHK: Float[Array, "B T H K"],
    k_BSHK: Float[Array, "B S H K"],
    v_BSHK: Float[Array, "B S H K"],
    mask_BTS: Bool[Array, "#B T S"] | None = None,
    *,
    causal: bool = False,
    kernel: str = "auto",
) -> Float[Array, "B T H K"]:
    """Attention over S keys for T queries (Vaswani et al. 2017, arXiv:1706.03762, eq. 1).

    Args:
        q_BTHK, k_BSHK, v_BSHK: queries, keys and values of each head.
        mask_BTS: True where query t may look at key s. It may be given beside `causal`.
        causal: query t looks at keys 0..t alone.
        kernel: a name in KERNELS. It changes memory and time, and the result by rounding alone. Fused kernels take no
            mask.

    Raises:
        UserError: a kernel that does not run on these devices, in this type or with a mask.
    """
    kind = _kind(kernel, mask_BTS is not None, min(q_BTHK.shape[1], k_BSHK.shape[1]), q_BTHK.dtype)
    mask = None if mask_BTS is None else mask_BTS[:, None]
    if kind == "splash":
        return _splash(q_BTHK, k_BSHK, v_BSHK, causal)
    if kind == "xla" and (_platform() == "cpu" or q_BTHK.dtype == jnp.float64):
        return _heads_first(q_BTHK, k_BSHK, v_BSHK, mask, causal)
    fused = "cudnn" if kind == "cudnn" else None
    return jax.nn.dot_product_attention(
        q_BTHK, k_BSHK, v_BSHK, mask=mask, is_causal=causal, implementation=fused
    )


def _kind(kernel: str, masked: bool, length: int, dtype: jnp.dtype) -> str:
    """The kernel for this call: "xla", "splash" or "cudnn". length: of queries or keys, whichever are fewer."""
    where = "model: attention"
    if kernel not in KERNELS:
        raise check.unknown(where, kernel, KERNELS)
    platform = _platform()
    half = dtype in (jnp.bfloat16, jnp.float16)
    if kernel == "auto":
        pays = platform == "tpu" and length >= SPLASH_FROM and dtype == jnp.bfloat16
        return "splash" if pays and not masked else "xla"
    if kernel != "xla" and masked:
        raise check.error(where, f"{kernel!r} with a mask", "'xla' or 'auto'", "write 'auto'")
    if kernel == "cudnn" and (platform not in ("gpu", "cuda") or not half):
        got = f"'cudnn' for {dtype} on {platform}"
        raise check.error(where, got, "half precision on a GPU", "write 'auto' or 'xla'")
    if kernel == "splash" and (platform not in ("tpu", "cpu") or dtype == jnp.float64):
        got = f"'splash' for {dtype} on {platform}"
        raise check.error(where, got, "a TPU, or a CPU's slow imitation", "write 'auto' or 'xla'")
    return kernel


def _splash(q_BTHK: Array, k_BSHK: Array, v_BSHK: Array, causal: bool) -> Array:
    """JAX's Splash kernel (flash attention, Dao et al. 2022, arXiv:2205.14135) on every device's examples and heads."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return _splash_of_one(q_BTHK, k_BSHK, v_BSHK, causal)
    names = ("batch", None, "heads", None)
    specs: list[PartitionSpec] = [meshes.spec(names, x.shape, mesh) for x in (q_BTHK, k_BSHK)]
    one = lambda q, k, v: _splash_of_one(q, k, v, causal)
    over = jax.shard_map(
        one, in_specs=(specs[0], specs[1], specs[1]), out_specs=specs[0], check_vma=False
    )
    return over(q_BTHK, k_BSHK, v_BSHK)


def _splash_of_one(q_BTHK: Array, k_BSHK: Array, v_BSHK: Array, causal: bool) -> Array:
    # imported where it is used: Pallas takes a third of a second
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    _, num_q, num_heads, size = q_BTHK.shape
    num_k = k_BSHK.shape[1]
    (full_q, block_q), (full_k, block_k) = _blocks(num_q), _blocks(num_k)
    at_once = (
        full_k == block_k
    )  # else the fused backward pass would hold a partial d_q for every block
    blocks = splash.BlockSizes(
        block_q=block_q, block_kv=block_k, block_q_dkv=block_q, block_kv_dkv=block_k,
        block_q_dq=None if at_once else block_q, block_kv_dq=None if at_once else block_k,
        use_fused_bwd_kernel=at_once,
    )  # fmt: skip
    shape = (full_q, full_k)
    mask = splash.CausalMask(shape) if causal else splash.FullMask(shape)
    kernel = splash.make_splash_mha(
        splash.MultiHeadMask([mask] * num_heads), block_sizes=blocks, head_shards=1,
        q_seq_shards=1, interpret=_platform() == "cpu",
    )  # fmt: skip
    segments = None
    if (full_q, full_k) != (num_q, num_k):  # padding attends only to itself
        added = [jnp.arange(full) >= num for full, num in ((full_q, num_q), (full_k, num_k))]
        segments = splash.SegmentIds(*(a.astype(jnp.int32) for a in added))

    def lead_heads(x_BTHK: Array, full: int) -> Array:
        pad = ((0, 0), (0, full - x_BTHK.shape[1]), (0, 0), (0, 0))
        return jnp.pad(x_BTHK, pad).transpose(0, 2, 1, 3)

    q_BHTK = lead_heads(q_BTHK * jnp.asarray(size**-0.5, q_BTHK.dtype), full_q)
    every = jax.vmap(lambda q, k, v: kernel(q, k, v, segment_ids=segments))
    out_BHTK: Any = every(q_BHTK, lead_heads(k_BSHK, full_k), lead_heads(v_BSHK, full_k))
    return out_BHTK.transpose(0, 2, 1, 3)[:, :num_q]


def _platform() -> str:
    """The platform of the mesh's devices, which need not exist (a plan); without a mesh, of this machine's."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.default_backend() if device is None else device.platform


def _blocks(num: int) -> tuple[int, int]:
    """The number of rows padded to whole blocks, and the size of a block: a multiple of LANES, BLOCK at most."""
    turns = math.ceil(num / BLOCK)
    block = math.ceil(num / turns / LANES) * LANES
    return turns * block, block


def _heads_first(
    q_BTHK: Array, k_BSHK: Array, v_BSHK: Array, mask: Array | None, causal: bool
) -> Array:
    """As jax.nn.dot_product_attention, with heads before tokens, the order in which XLA's CPU backend multiplies.

    On CPUs the transposes that JAX's function leaves to the compiler move single numbers and take as long as the
    products; these move whole rows. In float64 JAX's function would round the logits to float32.
    """
    wide = jnp.promote_types(q_BTHK.dtype, jnp.float32)
    q_BHTK, k_BHSK, v_BHSK = (x.swapaxes(1, 2) for x in (q_BTHK, k_BSHK, v_BSHK))
    batch, size = ((0, 1), (0, 1)), q_BTHK.shape[-1]
    logits_BHTS = jax.lax.dot_general(
        q_BHTK, k_BHSK, (((3,), (3,)), batch), preferred_element_type=wide
    )
    logits_BHTS *= jnp.asarray(size**-0.5, wide)
    seen = mask
    if causal:
        below = jnp.tril(jnp.ones(logits_BHTS.shape[2:], bool))[None, None]
        seen = below if seen is None else seen & below
    if seen is not None:
        logits_BHTS = jnp.where(seen, logits_BHTS, -0.7 * jnp.finfo(wide).max)
    weights_BHTS = jax.nn.softmax(logits_BHTS, axis=-1).astype(q_BTHK.dtype)
    return jax.lax.dot_general(weights_BHTS, v_BHSK, (((3,), (2,)), batch)).swapaxes(1, 2)
