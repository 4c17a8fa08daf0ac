"""What two starts of one run must agree on, and what may differ between them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from vlp.core.config import plain

# What may change between two starts of one run: the numbers do not depend on it (data is known by its fingerprint).
# LOCAL: what may also differ between the processes of one run.
LOCAL = (
    "data.workers",
    "data.read_threads",
    "data.prefetch",
    "data.cache_decoded",
    "data.cache_mb",
    "data.path",
)
FREE = ("mesh", "log_every_steps", "save_every_steps", "keep_checkpoints", "micro_batches", "micro_remat", "platform",
        "hang_secs", "sinks", "plugins", *LOCAL)  # fmt: skip


def extendable(config: Mapping[str, Any]) -> dict[str, Any]:
    """What a run must agree on even if it is extended: `fixed`, less evaluators and the last stage's length."""
    out = fixed(config, (*FREE, "evals"))
    patches = out.get("stages") or []
    has_length = lambda patch: bool({"steps", "samples"} & patch.keys())
    own = [out] if all(map(has_length, patches[:-1])) else []  # the base's is no other stage's
    for section in (*own, *patches[-1:]):
        for key in ("steps", "samples"):
            section.pop(key, None)
    return out


def fixed(config: Mapping[str, Any], free: Sequence[str] = FREE) -> dict[str, Any]:
    """A config without its free keys. By default: what determines the numbers, a workdir's run must agree on."""
    out = plain(config)
    for section in (out, *out.get("stages", [])):
        for path in free:
            node: Any = section
            *parents, last = path.split(".")
            for part in parents:
                node = node.get(part, {})
            node.pop(last, None)
    return out
