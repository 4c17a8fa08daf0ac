"""What the loader reports of itself: seconds by stage, texts cut, reads, memory, bad records by reason.

A worker measures each batch that it makes (`measured`); the process that reads the batches adds it up (`LoaderStats`).
"""

import collections
import dataclasses
import os

import numpy as np

from vlp.data import storage

BAD, STATS = (
    "_bad",
    "_stats",
)  # names of leaves that workers add to a batch for the process that reads it
STAGES = ("read", "image", "text")  # of making a sample
HEADER = 2  # entries before the seconds: process id, resident memory in MB
COUNTS = ("texts", "texts_truncated", *(f"read_{k}" for k in storage.COUNTS))


@dataclasses.dataclass
class LoaderStats:
    """Sums over all batches that this process has received."""

    seen: int = 0
    bad: collections.Counter = dataclasses.field(default_factory=collections.Counter)
    worst: dict[str, list[str]] = dataclasses.field(default_factory=dict)  # reason → a few keys
    secs: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(len(STAGES)))
    counts: collections.Counter = dataclasses.field(default_factory=collections.Counter)  # `COUNTS`
    rss_mb: dict[int, float] = dataclasses.field(
        default_factory=dict
    )  # by process id, at its last batch

    def add(self, bad_b: np.ndarray, numbers: np.ndarray) -> None:
        """Adds a batch: bad_b u8[b], as a dataset counts them; numbers, from `measured`."""
        pid, rss_mb, *rest = numbers.tolist()
        self.seen += len(bad_b)
        self.rss_mb[int(pid)] = rss_mb
        self.secs += rest[: len(STAGES)]
        self.counts.update(dict(zip(COUNTS, map(int, rest[len(STAGES) :]))))

    def limiting(self) -> str:
        """The stage in which the loader spends most of its time, with its share."""
        share = self.secs / max(self.secs.sum(), 1e-9)
        return f"{STAGES[int(share.argmax())]} {share.max():.0%}"

    def metrics(self) -> dict[str, float]:
        """What was measured, as numbers by name, for the metrics record."""
        total, texts = max(self.secs.sum(), 1e-9), max(self.counts["texts"], 1)
        out = {f"share_{k}": round(float(x / total), 4) for k, x in zip(STAGES, self.secs)}
        out["truncated_frac"] = round(self.counts["texts_truncated"] / texts, 4)
        out |= {k: float(self.counts[k]) for k in COUNTS if k[:5] == "read_" and self.counts[k]}
        workers = [mb for pid, mb in self.rss_mb.items() if pid != os.getpid()]
        return out | ({"worker_rss_mb": round(max(workers), 1)} if workers else {})

    def text(self) -> str:
        """Counts by reason, most first, with examples."""
        return ", ".join(
            f"{reason} {n} ({', '.join(self.worst[reason])})"
            for reason, n in self.bad.most_common()
        )


def measured(secs: np.ndarray, texts: int, cut: int) -> np.ndarray:
    """Returns f64: process id, resident MB, seconds by stage, and `COUNTS` since the last call in this process."""
    new = storage.news()
    counts = [texts, cut, *(new[k] for k in storage.COUNTS)]
    return np.array([os.getpid(), resident_mb(), *secs, *counts], np.float64)


def resident_mb() -> float:
    """Returns the resident memory of this process in MB; 0 if the system does not report it."""
    try:
        with open("/proc/self/statm") as f:
            return int(f.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6
    except OSError:
        return 0.0
