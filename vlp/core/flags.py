"""Flags of the whole process that would change the numbers of a run: pinned, refused or recorded.

They come from the shell (JAX_ENABLE_X64=1, XLA_FLAGS) or from code (`jax.config.update` in a config or a plugin). A
run's numbers depend on its config only.
"""

from __future__ import annotations

import logging
import os
import re
from typing import Any

from vlp.core import check

log = logging.getLogger(__name__)
# These values override environment variables and jax.config.
PINNED: dict[str, Any] = {
    "jax_enable_x64": False,
    "jax_default_matmul_precision": None,
    "jax_default_prng_impl": "threefry2x32",
    "jax_threefry_partitionable": True,
    "jax_random_seed_offset": 0,
    "jax_high_dynamic_range_gumbel": False,
    "jax_numpy_dtype_promotion": "standard",
    "jax_softmax_custom_jvp": False,
    "jax_allow_f16_reductions": True,
    "jax_disable_jit": False,  # without it a step needs the memory of all its intermediate arrays
    # A NaN or infinity in any operation would end the run, also where a mask hides it. The loss is checked anyway.
    "jax_debug_nans": False,
    "jax_debug_infs": False,
    "jax_no_execution": False,  # nothing would be computed
    "jax_no_tracing": False,
}
_FAST = r"(?i)--xla_\w*fast_(math|min_max)(=(true|1))?(?=\s|$)"
# Not JAX's, but recorded: they may change the numbers.
_OTHER = ("XLA_FLAGS", "LIBTPU_INIT_ARGS", "NVIDIA_TF32_OVERRIDE", "TF_CUDNN_DETERMINISTIC")
# Differ between the processes of a run, or change no number.
_OWN = (
    "JAX_PROCESS_", "JAX_NUM_PROCESSES", "JAX_COORDINATOR_", "JAX_LOCAL_", "JAX_SLICE_", "JAX_PARTITION_INDEX",
    "JAX_COMPILATION_CACHE", "JAX_PERSISTENT_CACHE", "JAX_DUMP_", "JAX_LOG", "JAX_TRACEBACK", "JAX_CUDA_VISIBLE",
    "JAX_ROCM_VISIBLE", "JAX_CROSS_HOST_", "JAX_DEBUG_LOG", "JAX_EXPLAIN_",
)  # fmt: skip


def pin() -> None:
    """Sets the flags of `PINNED`, and warns about each that had another value.

    Raises:
        UserError: XLA_FLAGS turns on fast math, which may ignore NaN and reorder sums.
    """
    import jax

    for name, value in PINNED.items():
        found = getattr(jax.config, name, value)
        if found != value:
            text = "%s=%s is ignored (it stays %s): the numbers of a run depend only on its config"
            log.warning(text, name.upper(), found, value)
            jax.config.update(name, value)
    if fast := re.search(_FAST, os.environ.get("XLA_FLAGS", "")):
        raise check.error("XLA_FLAGS", fast.group(), "no fast math", "remove it from XLA_FLAGS")


def recorded() -> dict[str, str]:
    """Returns the flags of the shell that may change numbers, by name."""
    env = sorted(os.environ.items())
    return {k: v for k, v in env if k.startswith("JAX_") or k in _OTHER}


def common() -> dict[str, str]:
    """Returns those that all processes of a run must share: with others they would compile other programs."""
    found = {k: v for k, v in recorded().items() if not k.startswith(_OWN)}
    found = {k: v for k, v in found.items() if k.lower() not in PINNED}
    strip = lambda text: " ".join(re.sub(r"--xla_dump_\S+", "", text).split())
    return {k: strip(v) for k, v in found.items() if strip(v)}
