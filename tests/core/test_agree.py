"""Decisions of several processes, played by threads with a key-value store in memory."""

import concurrent.futures
import threading
import time

import jax
import pytest

from vlp.core import agree, check


class Store:
    """What JAX's coordinator offers."""

    def __init__(self):
        self.values, self.changed = {}, threading.Condition()

    def key_value_set(self, key, value):
        with self.changed:
            if key in self.values:
                raise jax.errors.JaxRuntimeError("ALREADY_EXISTS")
            self.values[key] = value
            self.changed.notify_all()

    def blocking_key_value_get(self, key, milliseconds):
        with self.changed:
            if not self.changed.wait_for(lambda: key in self.values, milliseconds / 1000):
                raise jax.errors.JaxRuntimeError("DEADLINE_EXCEEDED")
            return self.values[key]

    def key_value_dir_get(self, folder):
        with self.changed:
            return [(k, v) for k, v in self.values.items() if k.startswith(folder + "/")]


@pytest.fixture
def processes(monkeypatch):
    """processes(f, of=3, here=range(3)) → what f(process) returns or raises in each process that is here."""
    local, store = threading.local(), Store()
    monkeypatch.setattr(agree, "client", lambda: store)
    monkeypatch.setattr(jax, "process_index", lambda: local.index)

    def run(f, of=3, here=None):
        monkeypatch.setattr(jax, "process_count", lambda: of)
        counts = {i: agree.collections.Counter() for i in range(of)}
        monkeypatch.setattr(agree, "_asked", Each(counts))

        def one(index):
            local.index = index
            try:
                return f(index)
            except check.UserError as e:
                return str(e)

        with concurrent.futures.ThreadPoolExecutor(of) as pool:
            return list(pool.map(one, range(of) if here is None else here))

    class Each:
        def __init__(self, counts):
            self.counts = counts

        def __getitem__(self, name):
            return self.counts[local.index][name]

        def __setitem__(self, name, value):
            self.counts[local.index][name] = value

    return run


def test_all_get_the_judgement_of_process_0(processes):
    def decide(i):
        first = agree.decide("largest", i * 10, max)
        time.sleep(0.05 * i)
        return first, agree.decide("largest", -i, max), agree.share("token", f"of {i}")

    assert processes(decide) == [(20, 0, "of 0")] * 3


def test_who_does_not_come_is_named_to_all(processes):
    told = processes(lambda i: agree.decide("data", i, max, 0.3), of=6, here=(0, 1, 4))
    assert (
        told
        == [
            "data: got no answer from process 2-3, 5 within 0 s, expected all; look at its output and "
            "start all processes again"
        ]
        * 3
    )


def test_a_missing_process_0_is_named(processes, monkeypatch):
    real = Store.blocking_key_value_get
    monkeypatch.setattr(Store, "blocking_key_value_get", lambda s, key, ms: real(s, key, 200))
    told = processes(lambda i: agree.share("data", i, 0.2), here=(1, 2))
    assert all("data: got no answer from process 0 within" in t for t in told)


def test_the_first_announcement_of_a_kind_stays(processes):
    processes(lambda i: agree.announce("stop", f"of {i}"), of=1)
    processes(lambda i: agree.announce("stop", "later"), of=1)
    processes(lambda i: agree.announce("failed", "data"), of=1)
    assert agree.announced() == {"stop": "of 0", "failed": "data"}


def test_a_run_of_one_process_decides_alone():
    assert agree.decide("largest", 3, max) == 3
    assert agree.share("token", "a") == "a" and agree.announced() == {}
    agree.announce("stop", "SIGTERM")


def test_numbers_are_written_as_ranges():
    assert agree.numbers([1, 3, 4, 5, 9, 10]) == "1, 3-5, 9-10"
