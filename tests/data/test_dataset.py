"""Batches: equal for any hosts, workers, threads; every record once; resume anywhere."""

import dataclasses
import os
import pickle
import shutil
import subprocess
import sys
import textwrap
import warnings

import numpy as np
import pytest

from vlp.core import check
from vlp.data import order, records, storage
from vlp.data.config import CaptionSource, Data
from vlp.data.dataset import open_dataset
from vlp.data.loader_stats import STAGES, resident_mb

SHAPES = Data(
    source="shapes", num_records=37, image_px=16, captions="uniform", flip=True, jitter=0.2
)


@pytest.fixture(scope="module")
def dataset():
    return open_dataset(SHAPES)


def assert_equal(a, b):
    assert a.keys() == b.keys()
    for k in a:
        np.testing.assert_array_equal(a[k], b[k], err_msg=k)


def joined(parts):
    return {k: np.concatenate([p[k] for p in parts]) for k in parts[0]}


def test_shapes_and_dtypes(dataset):
    batch = dataset.batch_at(0, 8, seed=0)
    kinds = {k: (v.shape, v.dtype.name) for k, v in batch.items()}
    assert kinds == {
        "image": ((8, 16, 16, 3), "uint8"),
        "text": ((8, 16), "int32"),
        "mask": ((8,), "bool"),
        "index": ((8, 2), "uint32"),
        "record": ((8, 2), "uint32"),
    }
    assert batch["mask"].all()
    both = open_dataset(dataclasses.replace(SHAPES, captions="all", num_captions=3))
    assert both.batch_at(0, 4, 0)["text"].shape == (4, 3, 16)


@pytest.mark.parametrize("num_hosts", [1, 2, 3, 4, 6, 8])
@pytest.mark.parametrize("threads", [0, 3])
def test_hosts_and_threads_cannot_change_the_batches(dataset, num_hosts, threads):
    data = dataclasses.replace(SHAPES, read_threads=threads, cache_decoded=threads > 0)
    d = open_dataset(data)
    arguments = {"start": 29, "batch": 24, "num_batches": 3, "seed": 4}
    rows = [[order.host_rows(24, h, num_hosts)] for h in range(num_hosts)]
    hosts = [list(d.train_iter(rows=r, **arguments)) for r in rows]
    for i in range(3):
        assert_equal(joined([h[i] for h in hosts]), dataset.batch_at(29 + 24 * i, 24, 4))


def test_hosts_whose_rows_are_no_neighbours(dataset):
    """As on a folded TPU mesh: blocks of rows here and there, replaced records told for each."""
    data = dataclasses.replace(SHAPES, read_threads=0)
    arguments = {"start": 5, "batch": 8, "num_batches": 2, "seed": 4}
    blocks = [range(0, 2), range(4, 7)]
    found = list(open_dataset(data).train_iter(rows=blocks, **arguments))
    for i, batch in enumerate(found):
        whole = dataset.batch_at(5 + 8 * i, 8, 4)
        assert_equal(batch, {k: x[[0, 1, 4, 5, 6]] for k, x in whole.items()})
    whole = dataset.eval_batch(1, 8)
    (_, batch, *_) = dataset.eval_iter(8, blocks)
    assert_equal(batch, {k: x[[0, 1, 4, 5, 6]] for k, x in whole.items()})


def test_every_record_once_per_epoch(dataset):
    batches = dataset.train_iter(start=0, batch=10, num_batches=37, seed=1)
    ids = order.join_words(np.concatenate([b["record"] for b in batches])).reshape(10, 37)
    np.testing.assert_array_equal(np.sort(ids), np.tile(np.arange(37), (10, 1)))
    assert len({tuple(r) for r in ids}) == 10


def test_resume_at_any_sample_and_any_batch_size(dataset):
    whole = joined(list(dataset.train_iter(start=0, batch=12, num_batches=6, seed=2)))
    for start in (1, 12, 36, 37, 50):
        rest = list(dataset.train_iter(start=start, batch=7, num_batches=3, seed=2))
        assert_equal(joined(rest), {k: v[start : start + 21] for k, v in whole.items()})
    assert order.join_words(whole["index"]).tolist() == list(range(72))


def test_augmentation_differs_by_epoch_and_seed(dataset):
    ids = order.record_ids(0, 74, 37, seed=0)
    second = 37 + int(np.flatnonzero(ids[37:] == ids[0])[0])
    images = [dataset.batch_at(p, 1, s)["image"] for p, s in ((0, 0), (second, 0))]
    assert (images[0] != images[1]).any()
    assert (dataset.batch_at(0, 37, 0)["image"] != dataset.batch_at(0, 37, 1)["image"]).any()


def test_rows_may_be_a_slice(dataset):
    whole = dataset.batch_at(5, 8, 0)
    assert_equal(dataset.batch_at(5, 8, 0, slice(2, 5)), {k: v[2:5] for k, v in whole.items()})
    with pytest.raises(check.UserError, match="rows"):
        dataset.batch_at(5, 8, 0, range(4, 9))


@pytest.mark.parametrize("num_hosts", [1, 2, 4])
def test_evaluation_is_one_padded_pass(dataset, num_hosts):
    rows = [[order.host_rows(16, h, num_hosts)] for h in range(num_hosts)]
    hosts = [list(dataset.eval_iter(16, r)) for r in rows]
    assert {len(h) for h in hosts} == {3} == {dataset.num_eval_batches(16)}
    rows = joined([joined([h[i] for h in hosts]) for i in range(3)])
    assert rows["mask"].tolist() == [True] * 37 + [False] * 11
    ids = order.join_words(rows["record"])
    np.testing.assert_array_equal(ids, np.minimum(np.arange(48), 36))  # padding repeats the last
    first = dataset.record(3)["captions"][0]["text"]
    assert dataset.tokenizer.decode(rows["text"][3]) == first
    assert_equal(rows, joined([dataset.eval_batch(i, 16) for i in range(3)]))


def test_hosts_wholly_in_the_padding_still_yield():
    d = open_dataset(dataclasses.replace(SHAPES, num_records=3))
    batches = list(d.eval_iter(8, [range(6, 8)]))
    assert len(batches) == 1 and not batches[0]["mask"].any() and batches[0]["image"].shape[0] == 2


def test_records_on_disk(dataset_dir, small_tokenizer):
    data = Data(path=str(dataset_dir), image_px=8, cache_decoded=True, langs=())
    d = open_dataset(data)
    assert d.tokenizer == small_tokenizer and d.num_records == 23
    batch = d.batch_at(0, 23, 0)
    ids = order.join_words(batch["record"])
    assert d.keys(ids) == [f"k{i:04d}" for i in ids]
    assert_equal(batch, d.batch_at(0, 23, 0))  # now from the cache
    copy = pickle.loads(pickle.dumps(d))
    assert_equal(batch, copy.batch_at(0, 23, 0))
    assert open_dataset(data, tokenizer=small_tokenizer).tokenizer is small_tokenizer
    assert d.fingerprint == records.open_split(dataset_dir, "train").fingerprint


def test_cache_is_bounded(dataset_dir):
    data = Data(path=str(dataset_dir), image_px=8, cache_decoded=True, cache_mb=1)
    d = open_dataset(data)
    d._reader._cache_left = 5000  # bytes: room for three of these images
    d.batch_at(0, 23, 0)
    assert 1 <= len(d._reader._cache) <= 3 and d._reader._cache_left >= 0


def test_shortened_texts_are_drawn_anew_in_every_epoch():
    """What a row holds is a shortening of its caption: of the stream position, not of the record alone."""
    data = dataclasses.replace(SHAPES, num_records=8, text_len=4, shuffle=False, captions="first")
    whole, data = open_dataset(data), dataclasses.replace(data, shorten="random")
    cut = open_dataset(data)
    epochs = [cut.batch_at(8 * k, 8, seed=0)["text"] for k in range(4)]
    assert any((epochs[0] != other).any() for other in epochs[1:])
    assert_equal(cut.batch_at(8, 8, 0), cut.batch_at(8, 8, 0))
    assert_equal(cut.eval_batch(0, 8), whole.eval_batch(0, 8))  # evaluations truncate


def test_what_batches_tell(dataset_dir):
    """Truncated texts, reads, bytes, seconds and memory, as sums over what was consumed."""
    storage.reset()
    data = Data(
        path=str(dataset_dir), image_px=8, langs=(), text_len=4, captions="all", num_captions=2,
        read_threads=0,
    )  # fmt: skip
    d = open_dataset(data)
    storage.news()  # what opening cost
    batches = list(d.train_iter(start=0, batch=6, num_batches=4, seed=0))
    row, cut = np.empty(4, np.int32), 0
    for i in order.record_ids(0, 24, 23, 0).tolist():
        texts = [c["text"] for c in d.source[i]["captions"]][:2]
        cut += sum(d.tokenizer.encode_into(t, row) for t in texts)
    assert 0 < cut < 48
    assert set(batches[0]) == {"image", "text", "text.mask", "mask", "index", "record"}
    told = d.loader_stats.metrics()
    assert d.loader_stats.counts["texts"] == 48 and d.loader_stats.counts["texts_truncated"] == cut
    assert told["truncated_frac"] == round(cut / 48, 4) and told["read_reads"] == 24
    assert told["read_bytes"] > 24 * 500 and sum(told[f"share_{k}"] for k in STAGES) > 0.999
    assert d.loader_stats.rss_mb.keys() == {os.getpid()} and resident_mb() > 50
    short = dataclasses.replace(data, shorten="random")  # cut before the tokenizer saw it
    d = open_dataset(short)
    list(d.train_iter(start=0, batch=6, num_batches=4, seed=0))
    assert d.loader_stats.counts["texts_truncated"] >= sum(
        len(c["text"].split()) > 2
        for i in order.record_ids(0, 24, 23, 0).tolist()
        for c in d.source[i]["captions"][:2]
    )


EPOCHS = """
import gc
from vlp.data.config import CaptionSource, Data
from vlp.data.dataset import open_dataset
from vlp.data.loader_stats import STAGES, resident_mb
data = Data(source="shapes", num_records=500, image_px=64, captions="uniform", flip=True)
batches = open_dataset(data).train_iter(start=0, batch=50, num_batches=40, seed=0)
for number, _ in enumerate(batches, 1):
    if number % 10 == 0:
        gc.collect()
        print(resident_mb())
"""


def test_memory_stays_flat_over_epochs():
    """In MB after each epoch; its images are 6 MB. In a process of its own, without the type checkers."""
    done = subprocess.run(
        [sys.executable, "-c", EPOCHS],
        capture_output=True,
        text=True,
        check=True,
        env={"PYTHONPATH": ":".join(p for p in sys.path if p)},
    )
    resident = [float(x) for x in done.stdout.split()]
    assert len(resident) == 4 and resident[-1] - resident[0] < 4, resident


def test_blocks_of_slow_media():
    data = dataclasses.replace(SHAPES, shuffle_block=4, shuffle_window=2)
    d = open_dataset(data)
    ids = order.join_words(d.batch_at(0, 37, seed=1)["record"])
    assert sorted(ids) == list(range(37))
    np.testing.assert_array_equal(ids, order.record_ids(0, 37, 37, 1, order.Shuffle(4, 2)))
    with pytest.raises(check.UserError, match="shuffle_block: got 4, expected 0 without shuffle"):
        open_dataset(dataclasses.replace(data, shuffle=False))


def test_bad_images(tmp_path, small_tokenizer, make_records):
    rows = make_records(6)
    rows[2]["image"] = b"<html>"
    records.write(tmp_path / "s", {"train": rows}, name="n", info={})
    data = Data(path=str(tmp_path / "s"), image_px=8)
    with pytest.raises(check.UserError, match="record 2 .*k0002.*: got a bad image"):
        open_dataset(data, small_tokenizer).batch_at(0, 6, 0)
    replacing = dataclasses.replace(data, bad_records="replace")
    batch = open_dataset(replacing, small_tokenizer).batch_at(0, 6, 0)
    expected = order.record_ids(0, 6, 6, 0)
    found = order.join_words(batch["record"])
    assert (found != 2).all() and (found == expected).sum() == 5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"source": "recrods"}, "config.data.source: got 'recrods'.*did you mean 'records'"),
        ({"captions": "al"}, "did you mean 'all'"),
        ({"caption_sources": 2 * (CaptionSource("alt"),)}, "expected names that differ"),
        ({"caption_sources": (CaptionSource("alt", 0.0),)}, "weights above 0"),
        ({"resize": "bicubik"}, "did you mean 'bicubic'"),
        ({"min_area_frac": 0.0}, "config.data.min_area_frac"),
        ({"text_len": 2}, "config.data.text_len"),
        ({"source": "records", "path": ""}, "make one with `vlp data convert`"),
        ({"tokenizer": "/no/such.model"}, "config.data.tokenizer"),
    ],
)
def test_bad_configs_are_told_at_open(change, message):
    with pytest.raises(check.UserError, match=message):
        open_dataset(dataclasses.replace(SHAPES, **change))


def test_rows_outside_of_the_batch_are_refused_before_reading(dataset):
    with pytest.raises(check.UserError, match="a block of 0 … 16"):
        dataset.train_iter(start=0, batch=16, num_batches=1, seed=0, rows=[range(8, 24)])


def test_no_warnings(dataset):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        list(dataset.train_iter(start=0, batch=8, num_batches=2, seed=0))


SCRIPT = """
    import dataclasses, sys
    import numpy as np
    from vlp.data.config import CaptionSource, Data
    from vlp.data.dataset import open_dataset
    from vlp.data.loader_stats import STAGES, resident_mb

    if __name__ == "__main__":  # absl flags never parsed, as in a notebook
        data = Data(source="shapes", num_records=37, image_px=16, captions="uniform")
        alone = list(open_dataset(data).train_iter(start=5, batch=8, num_batches=7, seed=3))
        for workers in (1, 2):
            d = open_dataset(dataclasses.replace(data, workers=workers))
            many = list(d.train_iter(start=5, batch=8, num_batches=7, seed=3))
            assert len(many) == 7
            for a, b in zip(alone, many, strict=True):
                for k in a:
                    assert type(b[k]) is np.ndarray
                    np.testing.assert_array_equal(a[k], b[k])
            told = d.loader_stats.metrics()
            assert len(d.loader_stats.rss_mb) == workers and told["worker_rss_mb"] > 20
            assert d.loader_stats.seen == d.loader_stats.counts["texts"] == 56
        from jax._src import xla_bridge
        assert not xla_bridge.backends_are_initialized()
        print("equal")
"""


def test_workers_in_a_plain_script(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(textwrap.dedent(SCRIPT))
    done = subprocess.run(
        [sys.executable, "-W", "error::UserWarning", str(script)],
        capture_output=True,
        text=True,
        check=False,
        timeout=100,
        env={"PATH": "/usr/bin:/bin", "PYTHONPATH": ":".join(p for p in sys.path if p)},
    )
    assert done.returncode == 0 and done.stdout.strip() == "equal", done.stderr[-2000:]
    assert "Exception ignored" not in done.stderr and "Traceback" not in done.stderr


def test_importing_data_needs_no_jax():
    code = "import sys, vlp.data.dataset, vlp.data.emoji, vlp.cli.data; assert 'jax' not in sys.modules"
    subprocess.run(
        [sys.executable, "-c", code],
        check=True,
        env={"PYTHONPATH": ":".join(p for p in sys.path if p)},
    )


NOTEBOOK = """
import vlp.train.loop, vlp.infer.load
from vlp.data.config import CaptionSource, Data
from vlp.data.dataset import open_dataset
from vlp.data.loader_stats import STAGES, resident_mb
data = Data(source="shapes", num_records=37, image_px=16, workers=1)
batches = open_dataset(data).train_iter(start=0, batch=8, num_batches=3, seed=0)
assert [len(b["image"]) for b in batches] == [8, 8, 8]
print("read")
"""


def test_workers_in_a_notebook_and_no_tensorflow(tensorflow_spy):
    """A main module without a file or guard, as a notebook's; nothing tries to import TensorFlow."""
    done = subprocess.run(
        [sys.executable, "-c", NOTEBOOK],
        capture_output=True,
        text=True,
        check=False,
        timeout=100,
        env={
            "PATH": "/usr/bin:/bin",
            "JAX_PLATFORMS": "cpu",
            "PYTHONPATH": ":".join([str(tensorflow_spy), *(p for p in sys.path if p)]),
        },
    )
    assert done.returncode == 0 and done.stdout.strip() == "read", done.stderr[-2000:]
    assert not (tensorflow_spy / "asked").exists()


def test_groups_are_found_once_and_mapped(dataset_dir, tmp_path, monkeypatch, small_tokenizer):
    """By the values of today: another look at the same keys finds new ones."""
    monkeypatch.setenv("VLP_CACHE", str(tmp_path / "cache"))
    caption = {"text": "x", "source": "a", "lang": "en"}
    rows = [{"key": f"{i}", "image": b"x", "captions": [caption]} for i in range(9)]
    data = Data(path=str(tmp_path / "a"), group_by="base", image_px=8, text_len=8)
    for names, groups in ((["b", "a", "a", "b", "c"], 3), (["b", "a", "b", "b", "b"], 2)):
        for row, name in zip(rows, names):
            row["base"] = name
        shutil.rmtree(tmp_path / "a", ignore_errors=True)
        records.write(tmp_path / "a", {"train": rows[:5]}, name="n", info={"names": names})
        dataset = open_dataset(data, small_tokenizer)
        assert dataset.epoch_len == groups
        with monkeypatch.context() as m:
            m.setattr(records.RecordSource, "__getitem__", lambda *_: {"base": "none is read"})
            copy = pickle.loads(pickle.dumps(dataset))
        np.testing.assert_array_equal(copy.record_ids(0, 20, 1), dataset.record_ids(0, 20, 1))
    records.write(tmp_path / "b", {"train": rows}, name="n", info={})  # four lack the field
    dataset = open_dataset(dataclasses.replace(data, path=str(tmp_path / "b")), small_tokenizer)
    assert dataset.epoch_len == 2 + 4
