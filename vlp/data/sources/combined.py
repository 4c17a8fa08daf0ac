"""Sources made of other sources: a concatenation, and a source without the records of a quarantine file."""

import hashlib
import json
from collections.abc import Iterable
from typing import Any

import numpy as np

from vlp.core import appended, check, paths
from vlp.data import order
from vlp.data import tokenizer as tokenizers


class Concatenated:
    """The records of several sources, one after the other."""

    def __init__(self, parts: tuple):
        self.parts = parts
        self.sizes = tuple(len(p) for p in parts)
        self._ends = np.cumsum(self.sizes)
        text = ":".join(p.fingerprint for p in parts)
        self.fingerprint = hashlib.sha256(f"mixture:{text}".encode()).hexdigest()

    def __reduce__(self):
        return Concatenated, (self.parts,)

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, i: int) -> dict:
        k = int(np.searchsorted(self._ends, i, side="right"))
        return self.parts[k][int(i - self._ends[k] + self.sizes[k])]

    @property
    def num_bytes(self) -> int | None:
        """Encoded bytes, where every source knows them."""
        known = [n for p in self.parts if (n := getattr(p, "num_bytes", None)) is not None]
        return sum(known) if len(known) == len(self.parts) else None

    def tokenizer(self) -> tokenizers.Tokenizer:
        """Returns the tokenizer that all sources bring."""
        first, *others = (p.tokenizer() for p in self.parts)
        if any(o != first for o in others):
            got, do = "mixtures of sources with other tokenizers", "set config.data.tokenizer"
            raise check.error("config.data.mixture", got, "one tokenizer", do)
        return first


class Without:
    """A source without the records `skipped` (sorted ids)."""

    def __init__(self, source: Any, skipped: np.ndarray):
        self.source, self.skipped = source, skipped
        text = f"{source.fingerprint}:{skipped.tolist()}"
        self.fingerprint = hashlib.sha256(text.encode()).hexdigest()

    def __reduce__(self):
        return Without, (self.source, self.skipped)

    def __len__(self) -> int:
        return len(self.source) - len(self.skipped)

    def __getitem__(self, i: int) -> dict:
        if not 0 <= i < len(self):
            raise IndexError(f"record {i} of {len(self)}")
        return self.source[int(order.skipping(np.array([i]), self.skipped)[0])]

    def inputs(self) -> Iterable[str]:
        """Returns the paths of all files behind it."""
        return self.source.inputs()

    @property
    def num_bytes(self) -> int | None:
        """Encoded bytes of the whole source, where it knows them."""
        return getattr(self.source, "num_bytes", None)

    def tokenizer(self) -> tokenizers.Tokenizer:
        """Returns the source's tokenizer."""
        return self.source.tokenizer()


def without(source: Any, path: str) -> Without:
    """Returns the source without the records that a quarantine file lists for it.

    Raises: `UserError` if there is no such file, or it lists none of this source's.
    """
    if not paths.is_file(path):
        raise check.error(
            "config.data.skip",
            f"{path!r}, which is not a file",
            "a quarantine file",
            "name a run's quarantine_0.jsonl, or write ''",
        )
    try:
        lines = appended.read(paths.of(path)).decode().splitlines()
        rows = [json.loads(line) for line in lines if line.strip()]
        mine = sorted({int(r["record"]) for r in rows if r["fingerprint"] == source.fingerprint})
    except (ValueError, TypeError, KeyError) as e:
        got, do = f"{type(e).__name__} ({e!s:.60})", "give a run's quarantine_0.jsonl"
        expected = "lines with the fields record and fingerprint"
        raise check.error(f"config.data.skip {path}", got, expected, do) from None
    if not mine or mine[0] < 0 or mine[-1] >= len(source):
        got, do = f"no line of {len(rows)} about this data", "use the file of a run on this data"
        raise check.error(f"config.data.skip {path}", got, f"data {source.fingerprint[:12]}", do)
    return Without(source, np.array(mine, np.int64))
