"""Accelerators by JAX's device_kind: peak of dense matrix products in mixed precision, and memory."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Chip:
    """flops: dense bfloat16 FLOP/s (float16 on chips without it), two per multiply-add. hbm_bytes: nominal memory."""

    flops: float
    hbm_bytes: int


MAX_SIMULATED = 4096  # simulated devices of a process: each takes memory and threads
GB = 10**9
GiB = 2**30
# By JAX's device_kind. TPUs: cloud.google.com/tpu/docs, system architecture of each version; a v2, v3 or 7x
# device is half a chip. GPUs: NVIDIA's data sheets, dense (half of the figure "with sparsity").
CHIPS = {
    "TPU v2": Chip(22.5e12, 8 * GiB),
    "TPU v3": Chip(61.5e12, 16 * GiB),
    "TPU v4": Chip(275e12, 32 * GiB),
    "TPU v5 lite": Chip(197e12, 16 * GiB),
    "TPU v5e": Chip(197e12, 16 * GiB),
    "TPU v5": Chip(459e12, 95 * GiB),
    "TPU v5p": Chip(459e12, 95 * GiB),
    "TPU v6 lite": Chip(918e12, 32 * GiB),
    "TPU v6e": Chip(918e12, 32 * GiB),
    "TPU7x": Chip(1153.5e12, 96 * GiB),
    "Tesla V100-SXM2-16GB": Chip(125e12, 16 * GiB),
    "Tesla T4": Chip(65e12, 16 * GiB),
    "NVIDIA L4": Chip(121e12, 24 * GB),
    "NVIDIA A100-SXM4-40GB": Chip(312e12, 40 * GB),
    "NVIDIA A100-SXM4-80GB": Chip(312e12, 80 * GB),
    "NVIDIA A100 80GB PCIe": Chip(312e12, 80 * GB),
    "NVIDIA H100 80GB HBM3": Chip(989e12, 80 * GB),
    "NVIDIA H100 PCIe": Chip(756e12, 80 * GB),
    "NVIDIA H200": Chip(989e12, 141 * GB),
    "NVIDIA B200": Chip(2250e12, 180 * GB),
}


def mfu(flops_per_s: float, device_kind: str) -> float | None:
    """Returns the model FLOPs utilisation of one device; None if CHIPS does not have it."""
    chip = CHIPS.get(device_kind)
    return None if chip is None else flops_per_s / chip.flops
