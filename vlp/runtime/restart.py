"""Which settings must be equal at every start of a run, and which may change."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from vlp.core.config import plain

# FREE may change between two starts of a run: the numbers do not depend on them (a fingerprint identifies the data).
# LOCAL may also differ between the processes of a run. A "*" stands for every entry of a list or a section.
_READING = (
    "workers",
    "read_threads",
    "prefetch",
    "cache_decoded",
    "cache_mb",
    "path",
    "mixture.*.path",
)
LOCAL = tuple(f"{where}.{key}" for where in ("data", "streams.*.data") for key in _READING)
FREE = (
    "mesh", "evals", "eval_params", "log_every_steps", "save_every_steps", "keep_checkpoints", "keep",
    "micro_batches", "micro_remat", "platform", "hang_secs", "grace_secs", "max_nonfinite_steps", "spike", "sinks",
    "plugins", *LOCAL,
)  # fmt: skip


def extendable(config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the config that an extended run must keep: `fixed` without the last stage's length."""
    out = fixed(config)
    patches = out.get("stages") or []
    has_length = lambda patch: bool({"steps", "samples"} & patch.keys())
    own = (
        [out] if all(map(has_length, patches[:-1])) else []
    )  # no other stage uses the base's length
    for section in (*own, *patches[-1:]):
        for key in ("steps", "samples"):
            section.pop(key, None)
    return out


def fixed(config: Mapping[str, Any], free: Sequence[str] = FREE) -> dict[str, Any]:
    """Returns a config without its free keys: by default, what determines the numbers and every start must repeat."""
    out = plain(config)
    for section in (out, *out.get("stages", [])):
        for path in free:
            _pop(section, path.split("."))
    return out


def _pop(node: Any, path: Sequence[str]) -> None:
    """Removes what lies at a path of names, if it is there."""
    name, *rest = path
    if isinstance(node, list):
        node = dict(enumerate(node))
    if not isinstance(node, dict):
        return
    if not rest:
        node.pop(name, None)
    for inner in [*node.values()] if name == "*" else [node.get(name)]:
        if rest:
            _pop(inner, rest)
