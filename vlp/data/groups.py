"""Groups of records by a field (`Data.group_by`): read once, kept in the cache, and mapped."""

from typing import Any

import pyarrow

from vlp.core import check
from vlp.data import index, order, sources


def read(source: Any, field: str) -> order.Groups:
    """Reads a field of every record and groups the records by it.

    Raises: `UserError` if the first record has no such field.
    """
    first = source[0]
    if field not in first:
        known = sorted(k for k, v in first.items() if isinstance(v, str))
        raise check.unknown("config.data.group_by", field, known)

    def found() -> order.Groups:
        names = (_name(source, i, field) for i in range(len(source)))
        chunks = [pyarrow.array(c, pyarrow.large_string()) for c in index.batched(names)]
        return order.Groups.of(pyarrow.chunked_array(chunks))

    def build(path: str) -> None:
        groups = found()
        with index.Writer(path, {"members": "<i8", "first": "<i8"}) as writer:
            writer.add("members", groups.members)
            writer.add("first", groups.first)
            writer.finish({})

    if not hasattr(getattr(source, "source", source), "inputs"):
        return found()
    stamp = f"groups 1:{source.fingerprint}:{field}:{sources.stamp(source)}"
    kept = index.cached("groups", stamp, build)
    return order.Groups(kept["members"], kept["first"])


def _name(source: Any, i: int, field: str) -> str:
    """Names the group of record i; one that is bad or lacks the field is a group of its own, at the end."""
    try:
        value = source[i].get(field)
    except check.UserError:
        raise
    except ValueError:  # a bad image or row: another takes its place when its turn comes
        value = None
    if value is None:
        return f"\U0010ffff{i:020d}"
    return f"{value + 2**63:020d}" if isinstance(value, int) else str(value)
