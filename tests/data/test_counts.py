"""Counts of any size: equal to Python's own, whatever fits into memory."""

import collections
import random

import numpy as np
import pytest

from vlp.data import counts


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(counts, "MAX_TABLE", 50)


def drawn(num: int) -> list[str]:
    rng = random.Random(0)
    return [f"{'long ' * 20 * (i % 2)}{int(rng.expovariate(0.01))}" for i in range(num)]


def test_counts_are_exact_through_many_runs(small):
    items = drawn(3000)
    true, found = collections.Counter(items), counts.Counts()
    for k in range(0, 3000, 7):
        found.add(items[k : k + 7])
    found.add_times(b"bytes", 4)
    true[b"bytes"] += 4
    assert len(found._runs) > 20
    assert found.num_distinct() == len(true) and found.num_repeats() == true.total() - len(true)
    assert found.total == true.total()
    all_parts = list(found.parts())
    digests = np.concatenate([d for d, _ in all_parts])
    assert (np.sort(digests) == digests).all() and len(np.unique(digests)) == len(digests)
    by_digest = dict(zip(digests.tolist(), np.concatenate([t for _, t in all_parts]).tolist()))
    assert by_digest == {counts.digest(k).rstrip(b"\0"): n for k, n in true.items()}
    for limit in (0, 3, 30, 10_000):
        members = found.above(limit)
        assert members.has(list(true)).tolist() == [n > limit for n in true.values()]
        assert not members.has(["never seen"])[0]


def test_the_most_common_are_as_many_as_asked_for(small):
    items = drawn(2000)
    true, found = collections.Counter(items), counts.Counts()
    found.add(items)
    for num in (1, 10, len(true) // 2, len(true) - 1):
        kept = found.most_common(num)
        assert len(kept) == num
        mine = [n for n, is_in in zip(true.values(), kept.has(list(true))) if is_in]
        assert sorted(mine) == sorted(n for _, n in true.most_common(num))
    assert found.most_common(len(true)) is None


def test_nothing_is_counted_too():
    found = counts.Counts()
    assert (found.num_distinct(), found.num_repeats(), found.most_common(3)) == (0, 0, None)
    assert not found.above(0).has(["x"])[0] and found.above(0).has([]).shape == (0,)


@pytest.mark.parametrize("num", [1, 2, 3, 10, 997])
def test_percentiles_are_numpys(num):
    values = np.random.default_rng(num).integers(0, 50, num).tolist()
    found = counts.Histogram()
    for value in values:
        found.add(value)
    shares = [0, 25, 50, 75, 90, 100]
    assert found.percentiles(shares) == [int(x) for x in np.percentile(values, shares)]
    assert (found.num, found.total()) == (num, sum(values))
    assert counts.Histogram().percentiles(shares) == []
