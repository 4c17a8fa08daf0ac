"""Mixtures and caption policies: exact shares at every prefix, functions of the stream position alone."""

import collections
import dataclasses
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vlp.core import check
from vlp.data import order
from vlp.data.config import Data, Part, Reweight
from vlp.data.dataset import Dataset, open_dataset, start_plan
from vlp.data.loader_stats import LoaderStats

PARTS = (
    Part("a", weight=0.5, num_records=13),
    Part("b", weight=0.3, num_records=7, split="val"),
    Part("c", weight=0.2, num_records=29, split="test"),
)
DATA = Data(source="shapes", image_px=8, mixture=PARTS, langs=(), read_threads=0)


@settings(max_examples=60, deadline=None)
@given(shares=st.lists(st.integers(0, 60), min_size=1, max_size=6).filter(sum))
def test_counts_are_within_one_of_the_share_at_every_prefix(shares):
    slots = order.interleave(shares)
    counts = np.cumsum(slots[:, None] == np.arange(len(shares)), 0)
    target = np.arange(1, len(slots) + 1)[:, None] * np.array(shares) / sum(shares)
    assert abs(counts - target).max() < 1
    assert counts[-1].tolist() == shares


@settings(max_examples=60, deadline=None)
@given(
    start=st.integers(0, 4000),
    count=st.integers(1, 300),
    seed=st.integers(0, 5),
    change=st.booleans(),
)
def test_any_window_is_a_slice_of_the_stream(start, count, seed, change):
    shares, starts = (((5, 3, 2), (1, 0, 6)), (0, 1234)) if change else (((5, 3, 2),), (0,))
    mixture = order.Mixture((13, 7, 29), shares, starts)
    ids, epochs = mixture.record_ids(0, start + count, seed)
    window = mixture.record_ids(start, count, seed)
    np.testing.assert_array_equal(window[0], ids[start:])
    np.testing.assert_array_equal(window[1], epochs[start:])
    source = np.searchsorted([13, 20, 49], ids, side="right")
    np.testing.assert_array_equal(mixture.counts(start), np.bincount(source[:start], minlength=3))
    for k, (first, size) in enumerate(((0, 13), (13, 7), (20, 29))):  # each in epochs of its own
        own = ids[source == k] - first
        whole = own[: len(own) // size * size].reshape(-1, size)
        np.testing.assert_array_equal(np.sort(whole), np.tile(np.arange(size), (len(whole), 1)))
        np.testing.assert_array_equal(epochs[source == k], np.arange(len(own)) // size)


def test_a_seek_far_into_a_large_mixture():
    mixture = order.Mixture((10**9, 10**12), ((999, 1), (1, 1)), (0, 10**10))
    ids, epochs = mixture.record_ids(10**14, 1000, 1)
    assert (ids >= 10**9).sum() == 500 and epochs.max() > 10**4


def test_a_mixed_dataset_counts_and_resumes():
    dataset = open_dataset(dataclasses.replace(DATA, reweight=(Reweight(60, (0.0, 1.0, 1.0)),)))
    assert dataset.num_records == 49
    batches = list(dataset.train_iter(start=0, batch=20, num_batches=5, seed=2))
    ids = np.concatenate([order.join_words(b["record"]) for b in batches])
    counts = collections.Counter(np.searchsorted([13, 20, 49], ids, side="right").tolist())
    assert dataset.source_counts(100) == {"a": counts[0], "b": counts[1], "c": counts[2]}
    assert dataset.source_counts(60) == {"a": 30, "b": 18, "c": 12} and counts[0] == 30
    rest = list(dataset.train_iter(start=37, batch=9, num_batches=7, seed=2))
    for name in rest[0]:
        whole = np.concatenate([b[name] for b in batches])
        np.testing.assert_array_equal(np.concatenate([b[name] for b in rest]), whole[37:])
    keys = {dataset.source[i]["key"] for i in range(49)}
    assert len(keys) == 49  # every part is read, and from its own split


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mixture": (Part("a", weight=-1.0),)}, "weights >= 0"),
        ({"mixture": (Part("a", weight=float("inf")),)}, "finite"),
        ({"mixture": (Part("a", weight=float("nan")),)}, "finite"),
        ({"mixture": (Part("a", weight=0.0),)}, "not all 0"),
        ({"mixture": (), "reweight": (Reweight(1, (1.0,)),)}, "a mixture beside it"),
        ({"reweight": (Reweight(9, (1.0,)),)}, "config.data.reweight.0.weights"),
        ({"reweight": (Reweight(0, (1.0, 1.0, 1.0)),)}, "over 0"),
        ({"mixture": (Part("a", source="shape"),)}, "did you mean 'shapes'"),
    ],
)
def test_bad_mixtures_are_told_at_open(change, message):
    with pytest.raises(check.UserError, match=message):
        open_dataset(dataclasses.replace(DATA, **change))


@given(st.lists(st.floats(0, 1e6, allow_subnormal=False), min_size=1, max_size=8).filter(any))
@settings(deadline=None, max_examples=40)
def test_mixtures_take_any_weights(weights):
    shares = order.whole_shares(weights, "here")
    assert shares == order.whole_shares(weights, "here") and sum(shares) <= 100_000
    assert [s > 0 for s in shares] == [w > 0 for w in weights]
    for share, weight in zip(shares, weights):
        small = len(weights) / 100_000 if min(w for w in weights if w) < 1e-5 * sum(weights) else 0
        assert abs(share / sum(shares) - weight / sum(weights)) <= 5e-6 + small


def test_weights_of_many_digits():
    """(Exact where they have few: what is trained keeps its order.)"""
    assert (
        order.whole_shares((0.7, 0.3), "here")
        == order.whole_shares((0.7, 1 - 0.7), "here")
        == (7, 3)
    )
    assert order.whole_shares((0.33337, 0.66663), "here") == (33337, 66663)
    assert order.whole_shares((1 / 3, 2 / 3, 1e-300), "here")[2] == 1
    assert order.whole_shares((1e308, 1e308), "here") == (1, 1)
    for weights in ((math.pi, math.e), (math.pi, math.e, 2**0.5, 3**0.5)):
        shares = order.whole_shares(weights, "here")
        for share, weight in zip(shares, weights):
            assert abs(share / sum(shares) - weight / sum(weights)) <= 1e-6


class Captioned:
    """Twenty records with captions of weights 1, 2 and 5."""

    fingerprint = "captioned"

    def __len__(self):
        return 20

    def __getitem__(self, i):
        words = (("red", 1.0), ("green", 2.0), ("blue", 5.0))
        captions = [{"text": t, "lang": "en", "source": "x", "weight": w} for t, w in words]
        image = np.zeros((4, 4, 3), np.uint8)
        return {"key": f"k{i}", "image": image, "captions": captions}


@pytest.mark.parametrize(("policy", "share"), [("uniform", (1, 1, 1)), ("weighted", (1, 2, 5))])
def test_caption_policies(small_tokenizer, policy, share):
    data = Data(captions=policy, image_px=4, text_len=8, read_threads=0)
    dataset = Dataset(data, Captioned(), small_tokenizer)
    batches = list(dataset.train_iter(start=0, batch=200, num_batches=15, seed=1))
    texts = [small_tokenizer.decode(row) for b in batches for row in b["text"]]
    expected = 3000 * np.array(share) / sum(share)
    found = np.array([texts.count(t) for t in ("red", "green", "blue")])
    assert ((found - expected) ** 2 / expected).sum() < 18.4  # chi-square, 2 degrees, 99.99 %
    again = list(dataset.train_iter(start=333, batch=37, num_batches=4, seed=1))  # after a resume
    assert [small_tokenizer.decode(row) for b in again for row in b["text"]] == texts[333:481]
    # A function of (epoch, key): in stored order the same record has the same caption of its epoch.
    stored = Dataset(dataclasses.replace(data, shuffle=False), Captioned(), small_tokenizer)
    ordered = [small_tokenizer.decode(row) for row in stored.batch_at(20, 20, 1)["text"]]
    ids = order.record_ids(20, 20, 20, 1)
    assert [ordered[i] for i in ids] == texts[20:40]


def test_all_captions_of_a_record_come_together(small_tokenizer):
    data = Data(captions="all", num_captions=4, image_px=4, text_len=8)
    rows = Dataset(data, Captioned(), small_tokenizer).batch_at(0, 3, 0)["text"]
    texts = [[small_tokenizer.decode(text) for text in row] for row in rows]
    assert texts == [["red", "green", "blue", ""]] * 3


def test_the_start_plan(small_tokenizer):
    data = Data(image_px=100, text_len=8, workers=2, prefetch=3, read_threads=1)
    dataset = Dataset(data, Captioned(), small_tokenizer)
    text = start_plan(dataset, batch=16, samples=50, num_hosts=4)
    assert text == (
        "20 records; 50 samples = 2.50 epochs; 4 of 16 rows on each of 4 hosts; "
        "texts lower-cased, padded with 0 or cut (truncate, eos kept) to 8; "
        "at most 1 MB of batches ahead"
    )
    cached = dataclasses.replace(data, cache_decoded=True, cache_mb=7, path="memory://x")
    text = start_plan(Dataset(cached, Captioned(), small_tokenizer), batch=16, samples=50)
    assert "7 MB of decoded images a process, 268 MB of blocks, 50.0 GB of shards in" in text


def test_the_limiting_stage_is_named(small_tokenizer):
    tally = LoaderStats()
    tally.secs[:] = 1.0, 8.0, 1.0
    assert tally.limiting() == "image 80%"
    data = Data(image_px=4, text_len=8, read_threads=0)
    dataset = Dataset(data, Captioned(), small_tokenizer)
    list(dataset.train_iter(start=0, batch=10, num_batches=2, seed=0))
    assert (dataset.loader_stats.secs > 0).all() and dataset.loader_stats.seen == 20
