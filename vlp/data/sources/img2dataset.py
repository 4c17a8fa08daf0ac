"""Reads img2dataset's reports: how many rows were fetched, and which ones failed."""

import collections
import os
import re
from collections.abc import Iterator, Sequence

from vlp.data import storage
from vlp.data.sources import fields as fields_lib
from vlp.data.sources import parquet


def counts(files: Sequence[str]) -> dict[str, int]:
    """Sums img2dataset's `_stats.json` beside the tars: rows by status, and tars without one.

    {"success": …, "<cause of failure>": …, "unfinished_shards": …}; {} if it wrote none of them.
    """
    out: collections.Counter = collections.Counter()
    beside = set().union(*(storage.listing(os.path.dirname(f)) for f in {*files}))
    stats = {f: f"{f.removesuffix('.tar')}_stats.json" for f in files}
    if not any(s in beside for s in stats.values()):
        return {}
    for file in stats.values():
        if file not in beside:
            out["unfinished_shards"] += 1
            continue
        try:
            found = fields_lib.parsed(storage.whole(file), file)
        except ValueError:
            found = None
        tallied = found.get("status_dict", {}) if isinstance(found, dict) else None
        if isinstance(tallied, dict) and all(type(n) is int and n >= 0 for n in tallied.values()):
            for cause, num in tallied.items():
                out[_cause(cause)] += num
        else:
            out["unfinished_shards"] += 1
    return dict(out)


def failures(files: Sequence[str], key: str = "") -> Iterator[dict]:
    """Yields {key, reason} of every row that img2dataset could not fetch, from its Parquet.

    key: a column that it was asked to keep (`save_additional_columns`); "" = its own numbers.
    """
    key = key or "key"
    for file in files:
        sidecar = f"{file.removesuffix('.tar')}.parquet"
        if not storage.exists(sidecar):
            continue
        table = parquet.open_file(sidecar)
        if {key, "status", "error_message"} <= set(table.schema_arrow.names):
            for r in table.read([key, "status", "error_message"]).to_pylist():
                if r["status"] != "success":
                    reason = _cause(str(r["error_message"] or r["status"]))
                    yield {"key": str(r[key]), "reason": reason}


def _cause(message: str) -> str:
    """Returns one line without byte counts, so that all truncated downloads have the same cause."""
    line = " ".join(message.split())[:80]
    return re.sub(r"\d+ bytes read, \d+ more", "n bytes read, m more", line)
