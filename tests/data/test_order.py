"""The order law: a bijection per epoch, equal from everywhere, O(window)."""

import collections
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vlp.core import check
from vlp.data import order

GOLDEN = [1, 2, 7, 6, 0, 5, 8, 1]


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 7, 16, 17, 101, 1009, 4096, 10007])
def test_every_epoch_holds_every_record_once(n):
    epochs = order.record_ids(0, 3 * n, n, seed=5).reshape(3, n)
    np.testing.assert_array_equal(np.sort(epochs), np.tile(np.arange(n), (3, 1)))


def test_epochs_and_seeds_differ():
    a, b = order.record_ids(0, 2000, 1000, seed=0).reshape(2, 1000)
    c = order.record_ids(0, 1000, 1000, seed=1)
    for x, y in ((a, b), (a, c), (a, np.arange(1000))):
        assert (x == y).mean() < 0.01


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(1, 300), start=st.integers(0, 2000), count=st.integers(0, 700), seed=st.integers()
)
def test_a_window_is_a_slice_of_the_stream(n, start, count, seed):
    stream = order.record_ids(0, start + count, n, seed)
    np.testing.assert_array_equal(order.record_ids(start, count, n, seed), stream[start:])


def test_positions_look_uniform():
    """Slots of record 0 over the epochs, against chi-square (99.99 %, 15 degrees: 44.3)."""
    stream = order.record_ids(0, 16 * 4000, 16, seed=3).reshape(4000, 16)
    counts = np.bincount(np.argmax(stream == 0, 1), minlength=16)
    assert ((counts - 250) ** 2 / 250).sum() < 44.3


@pytest.mark.parametrize("shuffle", [order.EVENLY, order.Shuffle(10_000, 8)])
def test_seek_costs_the_window_alone(shuffle):
    """Memory tells: a permutation of 10⁹ would take gigabytes. `benchmarks/input.py` tells the time."""
    for n in (10**9, 10**12):
        tracemalloc.start()
        ids = order.record_ids(123_456_789_012_345, 4096, n, 1, shuffle)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert peak < 10**6
        assert len(np.unique(ids)) == 4096 and 0 <= ids.min() and ids.max() < n


@settings(max_examples=80, deadline=None)
@given(
    n=st.integers(1, 300),
    block=st.integers(1, 40),
    window=st.integers(1, 9),
    start=st.integers(0, 900),
    count=st.integers(0, 400),
)
def test_blocks_keep_together_and_lose_nothing(n, block, window, start, count):
    """Each epoch every record once; any part is a slice of the stream; few blocks at a time."""
    shuffle = order.Shuffle(block, window)
    stream = order.record_ids(0, max(3 * n, start + count), n, 5, shuffle)
    np.testing.assert_array_equal(
        order.record_ids(start, count, n, 5, shuffle), stream[start : start + count]
    )
    epochs = stream[: 3 * n].reshape(3, n)
    np.testing.assert_array_equal(np.sort(epochs), np.tile(np.arange(n), (3, 1)))
    size = block * window
    for first in range(
        0, n, size
    ):  # one window: of each of its blocks all records, as runs on a circle
        ids = np.sort(epochs[0, first : first + size])
        gaps = np.count_nonzero(np.diff(np.concatenate([ids, ids[:1] + n])) > 1)
        assert gaps <= window + 1


def test_blocks_are_mixed():
    shuffle, n, size = order.Shuffle(50, 4), 10_007, 200
    epochs = order.record_ids(0, 2 * n, n, 1, shuffle).reshape(2, n)
    first, second = (set(e[:size].tolist()) for e in epochs)
    assert len(first & second) < size / 2  # other blocks come first
    assert abs(np.corrcoef(np.arange(size), epochs[0, :size])[0, 1]) < 0.9
    inside = epochs[0, :size]
    assert (np.diff(inside) == 1).mean() < 0.1  # and their records are mixed
    last = [set(e[-7:].tolist()) for e in epochs]
    assert last[0] != last[1]  # no records are bound to the epoch's end


def test_the_order_of_samples_never_changes():
    """Runs resume by this law: if it changes, every unfinished run changes its data."""
    assert order.record_ids(8, 8, 11, seed=7).tolist() == GOLDEN


def test_unshuffled_is_the_stored_order():
    assert order.record_ids(3, 5, 4, seed=0, shuffle=None).tolist() == [3, 0, 1, 2, 3]


@given(num_hosts=st.integers(1, 8), per_host=st.integers(1, 9))
def test_hosts_partition_the_batch(num_hosts, per_host):
    rows = [order.host_rows(num_hosts * per_host, h, num_hosts) for h in range(num_hosts)]
    assert [r for block in rows for r in block] == list(range(num_hosts * per_host))


def test_uneven_hosts_and_empty_data_are_refused():
    with pytest.raises(check.UserError, match="multiple of 3"):
        order.host_rows(16, 0, 3)
    with pytest.raises(check.UserError, match="host: got 4"):
        order.host_rows(16, 4, 4)
    with pytest.raises(check.UserError, match="at least one"):
        order.record_ids(0, 1, 0, 0)


def test_sample_rng_depends_on_all_three():
    draw = lambda *a: order.sample_rng(*a).random()
    draws = [draw(s, t, p) for s in (0, 1) for t in ("image", "text") for p in (0, 1, 2**40)]
    assert len(set(draws)) == 12
    assert draw(0, "image", 5) == draw(0, "image", 5)


def test_words_round_trip():
    values = np.array([0, 1, 2**32 - 1, 2**32, 2**53 + 1])
    words = order.split_words(values)
    assert words.dtype == np.uint32 and words[3].tolist() == [1, 0]
    np.testing.assert_array_equal(order.join_words(words), values)


def test_groups_visit_each_group_once_an_epoch_and_its_members_in_turn():
    names = ["a"] * 1 + ["b"] * 2 + ["c"] * 5 + ["d"] * 3
    groups = order.Groups.of(names)
    assert groups.num == 4
    epochs = 30  # a multiple of every group's size
    ids = groups.record_ids(0, 4 * epochs, seed=3)
    by_epoch = [[names[i] for i in ids[4 * e : 4 * e + 4]] for e in range(epochs)]
    assert all(sorted(e) == ["a", "b", "c", "d"] for e in by_epoch)
    assert len({tuple(e) for e in by_epoch}) > 1
    counts = collections.Counter(ids.tolist())
    assert {i: counts[i] for i in range(11)} == {
        i: epochs // names.count(names[i]) for i in range(11)
    }
    np.testing.assert_array_equal(groups.record_ids(17, 9, seed=3), ids[17:26])


@given(names=st.lists(st.text(max_size=3).filter(lambda t: t.isprintable()), min_size=1))
def test_groups_are_those_of_numpy(names):
    """The law by which running experiments resume: groups in the order of their names."""
    _, group_n = np.unique(np.asarray(names), return_inverse=True)
    found = order.Groups.of(names)
    np.testing.assert_array_equal(found.members, np.argsort(group_n, kind="stable"))
    np.testing.assert_array_equal(np.diff(found.first), np.bincount(group_n))


def test_a_mixture_of_many_parts_costs_its_slots_alone():
    """A thousand parts: no table of parts by slots (80 MB here), no row of parts for each sample."""
    shares, sizes = (1, 9) * 500 + (2, 18) * 250, (7,) * 1500
    mixture = order.Mixture(sizes, (shares,))
    tracemalloc.start()
    ids, epochs = mixture.record_ids(10**9, 500, 0)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 4e6
    source, number = mixture.places(10**9, 500)
    assert (ids // 7 == source).all() and (epochs == number // 7).all()
    assert (mixture.counts(10**9)[source] <= number).all()


@settings(max_examples=80, deadline=None)
@given(data=st.data())
def test_any_hosts_and_workers_read_the_same_stream(data):
    """Every record once an epoch, equal steps on all hosts, and a resume under another layout.

    Grain gives batch number i to worker i mod workers and merges in order; so is it here, without processes.
    """
    n = data.draw(
        st.sampled_from([1, 2, 3, 5, 7, 13, 31, 97, 101]) | st.integers(1, 120), "records"
    )
    epochs, seed = data.draw(st.integers(1, 4), "epochs"), data.draw(st.integers(0, 9), "seed")

    def read(start, stop):
        """Global batches over a drawn layout: ids of positions start … stop - 1, or a few more."""
        hosts = data.draw(st.integers(1, 8), "hosts")
        workers = data.draw(st.integers(0, 8), "workers")
        batch = hosts * data.draw(st.integers(1, 6), "rows")
        steps = -(-(stop - start) // batch)
        found = {}
        for host in range(hosts):
            rows = order.host_rows(batch, host, hosts)
            for worker in range(max(workers, 1)):
                for i in range(worker, steps, max(workers, 1)):
                    first = start + i * batch + rows.start
                    found[i, host] = order.record_ids(first, len(rows), n, seed)
        assert len(found) == steps * hosts  # as many steps on every host
        return np.concatenate([found[i, h] for i in range(steps) for h in range(hosts)])

    ids = read(0, n * epochs)[: n * epochs]
    np.testing.assert_array_equal(
        np.sort(ids.reshape(epochs, n)), np.tile(np.arange(n), (epochs, 1))
    )
    resume = data.draw(st.integers(0, n * epochs - 1), "resume")
    rest = read(resume, n * epochs)[: n * epochs - resume]
    np.testing.assert_array_equal(rest, ids[resume:])
