"""The law of the data order: which record stands at which place of the endless training stream.

Position p of the stream lies in epoch p // n, slot p % n; its record is a bijection of [0, n) keyed
by (seed, epoch). Everything is index arithmetic: no permutation array, no iterator state. A run
therefore resumes from one integer, and hosts, workers and threads cannot change what is read. Not
here: reading records (samples.py).
"""

import dataclasses
import fractions
import functools
import hashlib
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from vlp.core import check

_MASK = (1 << 64) - 1
_GOLDEN = (
    0x9E3779B97F4A7C15  # 2^64 / golden ratio: the increment of splitmix64 (Steele et al. 2014)
)
_NUM_ROUNDS = 8  # Luby & Rackoff need 4 for large blocks; more help the tiny ones


def _mix(x: np.ndarray) -> np.ndarray:
    """The finaliser of splitmix64 (Steele et al. 2014): u64 array → u64 array."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _hash(seed: int, values: np.ndarray) -> np.ndarray:
    """A 64-bit hash of (seed, value) for every value."""
    seed_1 = np.array([(seed * _GOLDEN + _GOLDEN) & _MASK], np.uint64)
    return _mix(_mix(seed_1) ^ ((values.astype(np.uint64) + np.uint64(1)) * np.uint64(_GOLDEN)))


def _feistel(x: np.ndarray, key: np.ndarray, half_bits: int) -> np.ndarray:
    """A balanced Feistel network: a bijection of [0, 4^half_bits), one key per element."""
    shift, mask = np.uint64(half_bits), np.uint64((1 << half_bits) - 1)
    left, right = x >> shift, x & mask
    for r in range(_NUM_ROUNDS):
        mixed = _mix(right ^ (key + np.uint64((r + 1) * _GOLDEN & _MASK)))
        left, right = right, left ^ (mixed & mask)
    return (left << shift) | right


@dataclasses.dataclass(frozen=True)
class Shuffle:
    """How an epoch is mixed. block = 0: every record for itself, evenly over the epoch.

    block > 0, for media where a jump costs much: `block` consecutive records stay near each other.
    The blocks come in random order, and the records of `window` blocks at a time are mixed, so a
    reader that holds window + 1 blocks reads each about once. Where blocks begin differs by epoch.
    """

    block: int = 0
    window: int = 8

    @staticmethod
    def of(data) -> "Shuffle | None":
        """What the config section `data` asks for; None = the stored order."""
        return Shuffle(data.shuffle_block, data.shuffle_window) if data.shuffle else None


EVENLY = Shuffle()


def record_ids(
    start: int, count: int, num_records: int, seed: int, shuffle: Shuffle | None = EVENLY
) -> np.ndarray:
    """Returns i64[count], the records at stream positions start … start + count - 1, in O(count).

    The window may straddle any number of epochs; each epoch holds every record exactly once.
    Without `shuffle` the records come in their stored order.
    """
    if num_records < 1:
        raise check.error("data", "0 records", "at least one", "choose another split")
    if start < 0 or count < 0:
        raise check.error(
            "data",
            f"window ({start}, {count})",
            "start, count >= 0",
            "pass a position and a number from 0 on",
        )
    position = np.arange(start, start + count, dtype=np.int64)
    epoch, slot = np.divmod(position, num_records)
    if shuffle is None:
        return slot
    key = _hash(seed, epoch)
    if shuffle.block:
        return _in_blocks(slot, num_records, key, shuffle)
    return _permuted(slot, num_records, key)


def _permuted(x: np.ndarray, n: int, key: np.ndarray) -> np.ndarray:
    """A bijection of [0, n), one key per element: i64 → i64."""
    half_bits = max(2, ((n - 1).bit_length() + 1) // 2)
    ids = _feistel(x.astype(np.uint64), key, half_bits)
    # Cycle walking (Black & Rogaway 2002): the domain is at most 4 n (16 if n is tiny).
    while (outside := np.flatnonzero(ids >= np.uint64(n))).size:
        ids[outside] = _feistel(ids[outside], key[outside], half_bits)
    return ids.astype(np.int64)


def _in_blocks(slot: np.ndarray, n: int, key: np.ndarray, shuffle: Shuffle) -> np.ndarray:
    """The record at each slot of an epoch: windows mixed within, then blocks, then a rotation."""
    block, size = shuffle.block, shuffle.block * shuffle.window
    window, mixed = slot // size, np.empty_like(slot)
    last = window == (n - 1) // size
    for here, sides in ((~last, size), (last, n - (n - 1) // size * size)):
        own_key = _mix(
            key[here] + window[here].astype(np.uint64) * np.uint64(_GOLDEN) + np.uint64(1)
        )
        mixed[here] = window[here] * size + _permuted(slot[here] % size, sides, own_key)
    number, inside = np.divmod(mixed, block)
    whole = number < n // block  # the rest, a shorter block, stays at the epoch's end …
    number[whole] = _permuted(number[whole], max(n // block, 1), key[whole])
    turn = (_mix(key ^ np.uint64(_GOLDEN)) % np.uint64(n)).astype(np.int64)
    return (number * block + inside + turn) % n  # … but other records are in it in every epoch


@dataclasses.dataclass(frozen=True, eq=False)
class Groups:
    """Records that are forms of one thing: members i64[n] lists record ids group by group, group g
    at first[g] … first[g + 1] - 1."""

    members: np.ndarray
    first: np.ndarray

    @staticmethod
    def of(names: Sequence[str] | Any) -> "Groups":
        """Groups records by name, groups in the order of their names; `names[i]` (of a list, or of an
        Arrow array of strings, which is compact) is the group of record i."""
        import pyarrow  # here, because only this asks for it
        from pyarrow import compute

        found: Any = names
        if not isinstance(names, pyarrow.Array | pyarrow.ChunkedArray):
            found = pyarrow.array(names, pyarrow.large_string())
        order = compute.call_function("sort_indices", [found])  # a stable sort
        members = order.to_numpy().astype(np.int64)
        sizes = found.take(order).value_counts().field("counts").to_numpy()
        return Groups(members, np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)]))

    @property
    def num(self) -> int:
        return len(self.first) - 1

    def record_ids(
        self, start: int, count: int, seed: int, shuffle: Shuffle | None = EVENLY
    ) -> np.ndarray:
        """As `record_ids`, but an epoch visits every group once, and a group's members in turn.

        After as many epochs as a group has members, each of them was read once. So a large group
        does not crowd out the small ones, and forms of one thing meet in a batch only where it
        straddles two epochs.
        """
        group = record_ids(start, count, self.num, seed, shuffle)
        epoch = np.arange(start, start + count, dtype=np.int64) // self.num
        size = np.diff(self.first)[group]
        turn = (_hash(seed, group) % size.astype(np.uint64)).astype(np.int64) + epoch
        return self.members[self.first[group] + turn % size]


@dataclasses.dataclass(frozen=True, eq=False)
class Mixture:
    """Several sources read in turn, by whole-number shares: an exact, endless interleave.

    At every prefix of the stream each source's count is within 1 of its share (Tijdeman 1980, "The
    chairman assignment problem"), and within a source the epochs are as in `record_ids`. From the
    k-th of `starts` on (positions in the stream) the k-th of `shares` holds; earlier samples do not
    affect the new shares. `given`: how many samples each source gave before the first of `starts`;
    `orders`: what is added to the seed for the order of each.
    """

    sizes: tuple[int, ...]  # records of each source; ids of the mixture run through them in order
    shares: tuple[tuple[int, ...], ...]
    starts: tuple[int, ...] = (0,)
    given: tuple[int, ...] = ()  # () = none
    orders: tuple[int, ...] = ()  # () = 0, 1, …

    @functools.cached_property
    def _periods(self) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """Per phase: the source at each slot of a period, how many of its slots came before, and how
        many each source has in a period."""
        out = []
        for shares in self.shares:
            slots = interleave(shares)
            per_period = np.bincount(slots, minlength=len(shares))
            by_source = np.argsort(slots, kind="stable")
            rank = np.empty_like(slots)
            rank[by_source] = np.arange(len(slots)) - np.repeat(
                np.cumsum(per_period) - per_period, per_period
            )
            out.append((slots, rank, per_period))
        return out

    def counts(self, position: int) -> np.ndarray:
        """Returns i64[K]: how many of the samples before `position` each source gave."""
        total = np.array(self.given or [0] * len(self.sizes), np.int64)
        for phase, start in enumerate(self.starts):
            end = self.starts[phase + 1] if phase + 1 < len(self.starts) else position
            slots, _, per_period = self._periods[phase]
            whole, rest = divmod(max(min(end, position) - start, 0), len(slots))
            total += whole * per_period
            total += np.bincount(slots[:rest], minlength=len(total))
        return total

    def places(self, start: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns i64[count] twice: the source at each stream position, and its sample number there."""
        position = np.arange(start, start + count, dtype=np.int64)
        phase_b = np.searchsorted(self.starts, position, side="right") - 1
        source, number = np.empty_like(position), np.empty_like(position)
        for phase in np.unique(phase_b):
            here = phase_b == phase
            slots, rank, per_period = self._periods[phase]
            period, slot = np.divmod(position[here] - self.starts[phase], len(slots))
            source[here] = found = slots[slot]
            before = self.counts(self.starts[phase])[found] + period * per_period[found]
            number[here] = before + rank[slot]
        return source, number

    def record_ids(
        self, start: int, count: int, seed: int, shuffle: Shuffle | None = EVENLY
    ) -> tuple[np.ndarray, np.ndarray]:
        """Returns i64[count] twice: the records at stream positions from `start` on, and their epochs."""
        source_b, number_b = self.places(start, count)
        sizes = np.asarray(self.sizes, np.int64)
        first, ids = np.cumsum(sizes) - sizes, np.empty_like(number_b)
        for k in np.unique(source_b).tolist():
            here = np.flatnonzero(source_b == k)
            low = int(number_b[here[0]])  # its numbers are consecutive: a window of its own stream
            own = seed + (self.orders[k] if self.orders else k)
            ids[here] = first[k] + record_ids(low, here.size, self.sizes[k], own, shuffle)
        return ids, number_b // sizes[source_b]


def interleave(shares: Sequence[int]) -> np.ndarray:
    """Returns i64[sum of shares]: one period in which source k stands shares[k] times, evenly.

    Tijdeman's rule: of the sources that a further place would not put too far ahead, the one whose
    share runs out first. At every prefix n: |count_k - n · shares[k] / sum| < 1.
    """
    w, total, count = np.asarray(shares, np.int64), int(sum(shares)), np.zeros(len(shares))
    if len(shares) == 1:
        return np.zeros(total, np.int64)
    slack = 1 / (2 * len(shares) - 2)
    rate, out = w / total, np.empty(total, np.int64)
    for n in range(total):
        lag = (n + 1) * rate - count
        ready = lag >= slack - 1e-9
        due = np.where(ready, (1 - slack - lag) / np.maximum(rate, 1e-300), np.inf)
        out[n] = int(np.argmin(due))
        count[out[n]] += 1
    return out


MAX_PERIOD = 100_000  # places of an interleave's period: `interleave` lays them out one by one


def whole_shares(weights: Sequence[float], where: str) -> tuple[int, ...]:
    """Returns weights as whole numbers in the same proportions: (0.7, 0.3) → (7, 3).

    Weights of few decimals are met exactly. Others (0.7 and 1 − 0.7, say) get the shares of the shortest period, of
    at most 100,000 places, in which none is further than 1e-6 from its part of the whole, or, where many weights
    allow no such period, of the one that is nearest (5e-6 at most). A weight above 0 has at least one place.
    Depends on the weights alone. Raises: `UserError` for weights that are negative, not finite or all 0.
    """
    good = bool(weights) and all(math.isfinite(w) and w >= 0 for w in weights) and max(weights) > 0
    if not good:
        raise check.error(
            where, list(weights), "weights >= 0, finite, not all 0", "correct the weights"
        )
    parts = [fractions.Fraction(str(w)) for w in weights]
    scale = math.lcm(*(f.denominator for f in parts))
    whole = [int(f * scale) for f in parts]
    whole = [w // math.gcd(*whole) for w in whole]
    return tuple(whole) if sum(whole) <= MAX_PERIOD else _nearest_shares(parts)


def _nearest_shares(parts: Sequence[fractions.Fraction]) -> tuple[int, ...]:
    """The shares of the shortest period that are within 1e-6 of the parts, or the nearest ones of any period."""
    total = sum(parts)
    part_K = np.array([float(p / total) for p in parts])
    period_N = np.arange(1, MAX_PERIOD + 1)
    least_K = np.array([float(p > 0) for p in parts])
    shares_NK = np.maximum(np.rint(np.outer(period_N, part_K)), least_K)
    error_N = np.abs(shares_NK / shares_NK.sum(1, keepdims=True) - part_K).max(1)
    error_N[shares_NK.sum(1) > MAX_PERIOD] = np.inf
    near = np.flatnonzero(error_N <= 1e-6)
    best = near[0] if near.size else np.argmin(error_N)
    shares = [int(w) for w in shares_NK[best]]
    return tuple(w // math.gcd(*shares) for w in shares)


def substitute(position: int, attempt: int, first: int, count: int, seed: int) -> int:
    """Returns which of records first … first + count - 1 stands in for a bad one at a position."""
    mixed = _hash(seed, np.array([position], np.uint64))
    return first + int(_hash(attempt, mixed)[0] % np.uint64(count))


def skipping(ids: np.ndarray, skipped: np.ndarray) -> np.ndarray:
    """Maps ids of the records that are left to ids of all, `skipped` (sorted, distinct) left out."""
    return ids + np.searchsorted(skipped - np.arange(len(skipped)), ids, side="right")


def host_rows(batch: int, host: int, num_hosts: int) -> range:
    """Returns the rows of the global batch that this host reads: equal, contiguous blocks."""
    if num_hosts < 1 or batch % num_hosts:
        raise check.error(
            "batch",
            f"{batch} rows for {num_hosts} hosts",
            f"a multiple of {num_hosts}",
            "set config.batch to a multiple of it",
        )
    if not 0 <= host < num_hosts:
        raise check.error("host", host, f"0 … {num_hosts - 1}", "check the process index")
    rows = batch // num_hosts
    return range(host * rows, (host + 1) * rows)


@functools.lru_cache(maxsize=64)
def _stream_key(seed: int, stream: str) -> int:
    text = f"{seed & _MASK}:{stream}".encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little")


class _Key(np.random.bit_generator.ISeedSequence):
    """Hands Philox its key, which by its own argument `key` would first ask the system for entropy."""

    def __init__(self, words: np.ndarray):
        self._words = words

    def generate_state(self, n_words: int, dtype: Any = np.uint64) -> np.ndarray:
        return self._words


def sample_rng(seed: int, stream: str, position: int) -> np.random.Generator:
    """Returns a generator that depends on (seed, stream, position) alone.

    Philox is keyed rather than seeded: two positions or streams never share a sequence by accident
    of hashing.
    """
    key_2 = np.array([_stream_key(seed, stream), position], np.uint64)
    key: Any = _Key(key_2)  # the stubs know of SeedSequence only
    return np.random.Generator(np.random.Philox(key))


def split_words(values: np.ndarray) -> np.ndarray:
    """i64[b] → u32[b, 2]: (high, low) 32-bit words, since jax has no 64-bit integers by default."""
    values = np.asarray(values).astype(np.uint64)
    return np.stack([values >> np.uint64(32), values & np.uint64(0xFFFFFFFF)], -1).astype(np.uint32)


def join_words(words: np.ndarray) -> np.ndarray:
    """u32[b, 2] → i64[b]: the inverse of `split_words`."""
    words = np.asarray(words).astype(np.int64)
    return (words[..., 0] << 32) | words[..., 1]
