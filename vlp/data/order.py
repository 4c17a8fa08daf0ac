"""The law of the data order: which record stands at which place of the endless training stream.

Position p of the stream lies in epoch p // n, slot p % n; its record is a bijection of [0, n) keyed
by (seed, epoch). Everything is index arithmetic: no permutation array, no iterator state. A run
therefore resumes from one integer, and hosts, workers and threads cannot change what is read. Not
here: reading records (loader.py).
"""

import dataclasses
import functools
import hashlib
from collections.abc import Sequence

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


def record_ids(
    start: int, count: int, num_records: int, seed: int, shuffle: bool = True
) -> np.ndarray:
    """Returns i64[count], the records at stream positions start … start + count - 1, in O(count).

    The window may straddle any number of epochs; each epoch holds every record exactly once.
    Without `shuffle` the records come in their stored order.
    """
    if num_records < 1:
        raise check.error("data", "0 records", "at least one", "choose another split")
    if start < 0 or count < 0:
        raise check.error(
            "data", f"window ({start}, {count})", "start, count >= 0", "check the step"
        )
    position = np.arange(start, start + count, dtype=np.int64)
    epoch, slot = np.divmod(position, num_records)
    if not shuffle:
        return slot
    half_bits = max(2, ((num_records - 1).bit_length() + 1) // 2)
    key, n = _hash(seed, epoch), np.uint64(num_records)
    ids = _feistel(slot.astype(np.uint64), key, half_bits)
    # Cycle walking (Black & Rogaway 2002): the domain is at most 4 n (16 if n is tiny).
    while (outside := np.flatnonzero(ids >= n)).size:
        ids[outside] = _feistel(ids[outside], key[outside], half_bits)
    return ids.astype(np.int64)


@dataclasses.dataclass(frozen=True, eq=False)
class Groups:
    """Records that are forms of one thing: members i64[n] lists record ids group by group, group g
    at first[g] … first[g + 1] - 1."""

    members: np.ndarray
    first: np.ndarray

    @staticmethod
    def of(names: Sequence[str]) -> "Groups":
        """Groups records by name; `names[i]` is the group of record i."""
        _, group_n = np.unique(np.asarray(names), return_inverse=True)
        sizes = np.bincount(group_n)
        return Groups(np.argsort(group_n, kind="stable"), np.concatenate([[0], np.cumsum(sizes)]))

    @property
    def num(self) -> int:
        return len(self.first) - 1

    def record_ids(self, start: int, count: int, seed: int, shuffle: bool = True) -> np.ndarray:
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


def host_rows(batch: int, host: int, num_hosts: int) -> range:
    """Returns the rows of the global batch that this host reads: equal, contiguous blocks."""
    if num_hosts < 1 or batch % num_hosts:
        raise check.error(
            "batch",
            f"{batch} rows for {num_hosts} hosts",
            f"a multiple of {num_hosts}",
            "change config.batch or the number of hosts",
        )
    if not 0 <= host < num_hosts:
        raise check.error("host", host, f"0 … {num_hosts - 1}", "check the process index")
    rows = batch // num_hosts
    return range(host * rows, (host + 1) * rows)


@functools.lru_cache(maxsize=64)
def _stream_key(seed: int, stream: str) -> int:
    text = f"{seed & _MASK}:{stream}".encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little")


def sample_rng(seed: int, stream: str, position: int) -> np.random.Generator:
    """Returns a generator that depends on (seed, stream, position) alone.

    Philox is keyed rather than seeded: two positions or streams never share a sequence by accident
    of hashing.
    """
    key_2 = np.array([_stream_key(seed, stream), position], np.uint64)
    return np.random.Generator(np.random.Philox(key=key_2))


def split_words(values: np.ndarray) -> np.ndarray:
    """i64[b] → u32[b, 2]: (high, low) 32-bit words, since jax has no 64-bit integers by default."""
    values = np.asarray(values).astype(np.uint64)
    return np.stack([values >> np.uint64(32), values & np.uint64(0xFFFFFFFF)], -1).astype(np.uint32)


def join_words(words: np.ndarray) -> np.ndarray:
    """u32[b, 2] → i64[b]: the inverse of `split_words`."""
    words = np.asarray(words).astype(np.int64)
    return (words[..., 0] << 32) | words[..., 1]
