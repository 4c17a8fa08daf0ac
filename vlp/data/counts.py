"""How often each of any number of texts (or byte strings) occurs: exact, in bounded memory.

Items are known by 16 bytes of their BLAKE2b hash, so that two are taken for one with a chance of 2⁻¹²⁸ a pair. What
does not fit into a small table is sorted and written to a temporary file (on the disk of `tempfile.gettempdir()`, 24
bytes an item); the parts are added up in 256 ranges of hashes.
"""

import collections
import hashlib
import math
import tempfile
from collections.abc import Iterable, Iterator

import numpy as np

MAX_TABLE = 2**15  # distinct items in memory
_LONG = 64  # characters: longer texts are hashed at once
_KIND = "S16"  # of a digest: NumPy sorts and compares these as bytes


def digest(item: bytes | str) -> bytes:
    """Returns a 16-byte digest of an item."""
    data = item.encode("utf-8", "surrogatepass") if isinstance(item, str) else item
    return hashlib.blake2b(data, digest_size=16).digest()


def _short(item: bytes | str) -> bytes | str:
    """Returns the key of an item in a table: a short text itself, else its digest."""
    return item if isinstance(item, str) and len(item) <= _LONG else digest(item)


class Counts:
    """Counts items; `add` as many as you like, then read."""

    def __init__(self) -> None:
        self._table: collections.Counter[bytes | str] = collections.Counter()
        self._runs: list[tuple[int, np.ndarray]] = []  # where a run begins, and its 257 cuts
        self._file = tempfile.TemporaryFile()
        self.total = 0

    def add(self, items: Iterable[bytes | str]) -> None:
        """Counts each of the items once more."""
        self._table.update(map(_short, items))
        if len(self._table) > MAX_TABLE:
            self._spill()

    def add_times(self, item: bytes | str, times: int) -> None:
        """Counts an item that many times."""
        self._table[_short(item)] += times
        if len(self._table) > MAX_TABLE:
            self._spill()

    def _spill(self) -> None:
        if not self._table:
            return
        digests = np.array([x if isinstance(x, bytes) else digest(x) for x in self._table], _KIND)
        times = np.fromiter(self._table.values(), np.int64, len(self._table))
        self.total += int(times.sum())
        self._table.clear()
        order = np.argsort(digests)
        digests = digests[order]
        bounds = np.array([bytes([b]) for b in range(256)], _KIND)
        cuts = np.append(np.searchsorted(digests, bounds), len(digests)).astype(np.int32)
        self._runs.append((self._file.seek(0, 2), cuts))
        self._file.write(digests.data)
        self._file.write(times[order].data)

    def parts(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yields (S16[n] sorted digests, i64[n] how often each occurs), range after range of digests."""
        self._spill()
        for number in range(256):
            found = [self._slice(run, number) for run in self._runs]
            if not found or not sum(len(d) for d, _ in found):
                continue
            digests, where = np.unique(np.concatenate([d for d, _ in found]), return_inverse=True)
            times = np.zeros(len(digests), np.int64)
            np.add.at(times, where, np.concatenate([t for _, t in found]))
            yield digests, times

    def _slice(self, run: tuple[int, np.ndarray], number: int) -> tuple[np.ndarray, np.ndarray]:
        at, cuts = run
        low, num, size = int(cuts[number]), int(cuts[number + 1] - cuts[number]), int(cuts[-1])
        self._file.seek(at + 16 * low)
        digests = np.frombuffer(self._file.read(16 * num), _KIND)
        self._file.seek(at + 16 * size + 8 * low)
        return digests, np.frombuffer(self._file.read(8 * num), np.int64)

    def num_distinct(self) -> int:
        """Returns how many different items there were."""
        return sum(len(d) for d, _ in self.parts())

    def num_repeats(self) -> int:
        """Returns how many items came before already."""
        distinct = self.num_distinct()
        return self.total - distinct

    def above(self, limit: int) -> "Members":
        """Returns the items that occur more than `limit` times."""
        return Members(d[t > limit] for d, t in self.parts())

    def most_common(self, num: int) -> "Members | None":
        """Returns the `num` items that occur most often, ties in the order of their digests; None: all."""
        sizes: collections.Counter[int] = collections.Counter()
        for _, times in self.parts():
            values, counts = np.unique(times, return_counts=True)
            sizes.update(dict(zip(values.tolist(), counts.tolist())))
        if sum(sizes.values()) <= num:
            return None
        least = left = 0
        for times in sorted(sizes, reverse=True):
            least, left = times, num
            num -= sizes[times]
            if num <= 0:
                break

        def kept() -> Iterator[np.ndarray]:
            ties = left
            for digests, times in self.parts():
                tied = np.flatnonzero(times == least)
                keep = times > least
                keep[tied[:ties]] = True
                ties -= min(ties, len(tied))
                yield digests[keep]

        return Members(kept())


class Members:
    """A set of items, as sorted digests in a temporary file that is mapped."""

    def __init__(self, parts: Iterable[np.ndarray]):
        self._file, num = tempfile.TemporaryFile(), 0
        for part in parts:  # sorted from part to part
            self._file.write(np.ascontiguousarray(part).data)
            num += len(part)
        self._file.flush()
        self._digests = np.zeros(0, _KIND)
        if num:
            self._digests = np.asarray(np.memmap(self._file, _KIND, "r", shape=(num,)))

    def __len__(self) -> int:
        return len(self._digests)

    def has(self, items: Iterable[bytes | str]) -> np.ndarray:
        """Returns bool[n]: which of the items are in it."""
        found = np.array([digest(x) for x in items], _KIND)
        if not len(self._digests) or not len(found):
            return np.zeros(len(found), bool)
        at = np.minimum(np.searchsorted(self._digests, found), len(self._digests) - 1)
        return self._digests[at] == found


class Histogram:
    """How often each whole number occurs."""

    def __init__(self) -> None:
        self._times: collections.Counter[int] = collections.Counter()

    def add(self, value: int) -> None:
        self._times[value] += 1

    @property
    def num(self) -> int:
        return self._times.total()

    def total(self) -> int:
        """Returns the sum of the numbers."""
        return sum(value * times for value, times in self._times.items())

    def percentiles(self, shares: Iterable[int | float]) -> list[int]:
        """Returns the numbers at these percent of them in their order, between two as
        `numpy.percentile`, rounded down; [] if there are none."""
        if not self._times:
            return []
        values = np.array(sorted(self._times), np.int64)
        ends = np.cumsum([self._times[int(v)] for v in values])
        out = []
        for share in shares:
            place = share / 100 * (int(ends[-1]) - 1)
            low, high = (
                int(values[np.searchsorted(ends, math.floor(place) + up, side="right")])
                for up in (0, place % 1 > 0)
            )
            out.append(int(low + (high - low) * (place % 1)))
        return out
