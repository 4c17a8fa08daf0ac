"""Foreign formats as random-access sources, and reads from a store that fails."""

import contextlib
import dataclasses
import decimal
import io
import os
import pathlib
import pickle
import random
import tarfile
import threading
import time

import fsspec
import numpy as np
import pyarrow.parquet
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from helpers import formats, runs
from vlp.core import check, stores
from vlp.data import records, sources, storage
from vlp.data.config import CaptionSource, Data, Part
from vlp.data.dataset import Dataset, open_dataset
from vlp.data.records import read
from vlp.data.sources import fields, img2dataset, tar_index


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("VLP_CACHE", str(tmp_path / "cache"))
    storage.reset()


def same_as(source, pairs):
    got = [source[i] for i in range(len(source))]
    assert [(r["key"], r["image"]) for r in got] == [(r["key"], r["jpg"]) for r in pairs]
    assert [[c["text"] for c in r["captions"]] for r in got] == [[r["caption"]] for r in pairs]
    assert isinstance(source, records.Source)
    copy = pickle.loads(pickle.dumps(source))
    assert copy[len(copy) - 1] == got[-1] and copy.fingerprint == source.fingerprint
    for i in (-1, len(source)):
        with pytest.raises(IndexError):
            source[i]


def test_shards_of_the_webdataset_package(tmp_path):
    webdataset = pytest.importorskip("webdataset")
    pairs = formats.rows(7)
    with webdataset.ShardWriter(
        str(tmp_path / "train-%03d.tar"), maxcount=3, verbose=0, encoder=True
    ) as w:
        for r in pairs:
            w.write({"__key__": r["key"], "jpg": r["jpg"], "txt": r["caption"], "cls": 4})
    source = sources.open_path(tmp_path, strict=True)
    same_as(source, pairs)
    assert source[5]["label"] == 4 and source.counts == {}


def test_img2dataset_layout(tmp_path):
    pairs = formats.rows(9)
    lost = [("x1", "failed_to_download", {"error_message": "HTTP Error 404: Not Found"})]
    formats.img2dataset(tmp_path / "d", 0, pairs[:5], lost)
    formats.img2dataset(tmp_path / "d", 1, pairs[5:], lost)
    source = sources.open_path(tmp_path / "d")
    same_as(source, pairs)
    assert img2dataset.counts(source.files) == {"success": 9, "HTTP Error 404: Not Found": 2}
    (tmp_path / "d" / "00001_stats.json").unlink()
    assert img2dataset.counts(source.files)["unfinished_shards"] == 1


@pytest.mark.parametrize("keep", ["inside a body", "inside a header", "no end mark"])
def test_truncated_tails_are_counted_or_refused(tmp_path, keep):
    pairs = formats.rows(5)
    path = tmp_path / "a.tar"
    formats.tar(path, pairs)
    with tarfile.open(path) as archive:
        last = archive.getmembers()[-2:]
    cut = {
        "inside a body": last[0].offset_data + 100,
        "inside a header": last[1].offset + 200,
        "no end mark": last[1].offset_data + 512,
    }
    path.write_bytes(path.read_bytes()[: cut[keep]])
    source = sources.open_path(path)
    same_as(source, pairs[:4])
    assert source.counts == {"truncated": 1}
    with pytest.raises(check.UserError, match=r"a\.tar: got \{'truncated': 1\} and 4 good"):
        sources.open_path(path, strict=True)


def test_hostile_members_do_no_harm(tmp_path):
    pairs = formats.rows(2)
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as archive:
        formats.add(archive, "../../climb.jpg", b"x")
        formats.add(archive, "/etc/absolute.jpg", b"x")
        link = tarfile.TarInfo("link.jpg")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
        formats.add(archive, "lonely.txt", b"no image")
        formats.add(archive, "silent.jpg", b"no text")
        for r in pairs:
            formats.add(archive, f"{r['key']}.jpg", r["jpg"])
            formats.add(archive, f"{r['key']}.txt", r["caption"].encode())
    before = {p.name for p in tmp_path.parent.iterdir()}
    source = sources.open_path(path)
    same_as(source, pairs)
    assert source.counts == {"unsafe_name": 2, "link": 1, "no_image": 1, "no_text": 1}
    assert {p.name for p in tmp_path.parent.iterdir()} == before


def test_what_is_no_tar_is_named(tmp_path):
    for data in (b"", b"<html>not found</html>" * 100):
        (tmp_path / "a.tar").write_bytes(data)
        with pytest.raises(check.UserError, match=r"a\.tar: got (0 bytes|no tar)"):
            sources.open_path(tmp_path / "a.tar")


def test_the_index_is_built_once_and_again_after_a_change(tmp_path, monkeypatch):
    formats.tar(tmp_path / "a.tar", formats.rows(3))
    built = []
    build = tar_index.build_index
    monkeypatch.setattr(
        tar_index, "build_index", lambda p, *more: built.append(p) or build(p, *more)
    )
    first = sources.open_path(tmp_path / "a.tar")
    assert sources.open_path(tmp_path / "a.tar").fingerprint == first.fingerprint
    assert len(built) == 1
    (file,) = (tmp_path / "cache" / "tar-index").iterdir()
    for damaged in (lambda d: d[:-1], lambda d: d[:100] + b"?" + d[101:], lambda d: b"\0" * len(d)):
        file.write_bytes(damaged(file.read_bytes()))
        assert len(sources.open_path(tmp_path / "a.tar")) == 3
    assert len(built) == 4
    formats.tar(tmp_path / "a.tar", formats.rows(4))
    assert len(sources.open_path(tmp_path / "a.tar")) == 4 and len(built) == 5
    formats.tar(tmp_path / "b.tar", formats.rows(2))
    both = sources.open_path(tmp_path)
    assert len(both) == 6 and len(built) == 6  # only the new one
    assert len(pickle.dumps(both)) < 1000  # where the index lies, not what it holds


def test_parquet_rows_are_read(tmp_path):
    pairs = formats.rows(12)
    formats.parquet(tmp_path / "a.parquet", pairs[:7])
    formats.parquet(tmp_path / "b.parquet", pairs[7:])
    same_as(sources.open_path(tmp_path), pairs)
    with pytest.raises(check.UserError, match="did you mean 'caption'"):
        sources.open_path(tmp_path, given=sources.fields.Fields(captions=("captoin",)))
    (tmp_path / "b.parquet").write_bytes(b"PAR1 not really PAR1")
    with pytest.raises(check.UserError, match=r"b\.parquet: got no Parquet"):
        sources.open_path(tmp_path)


def test_tables_keep_every_character(tmp_path):
    """Separators of other line standards are text; a BOM is none, before a quote or a brace either."""
    texts = ["first\u2028second", "one\x85two", "form\x0cfeed"]
    rows = "".join(f"{t},a.jpg\r\n" for t in texts)
    (tmp_path / "a.csv").write_bytes(f'\ufeff"caption",image\r\n{rows}'.encode())
    table = sources.open_path(tmp_path / "a.csv")
    assert [table.row(i)["caption"] for i in range(3)] == texts
    (tmp_path / "b.jsonl").write_bytes('\ufeff{"image": "a.jpg", "caption": "x"}\n'.encode())
    table = sources.open_path(tmp_path / "b.jsonl")
    assert table.columns == ["image", "caption"] and table.row(0)["caption"] == "x"
    (tmp_path / "c.csv").write_text("image,caption,caption\na.jpg,x,y\n")
    with pytest.raises(check.UserError, match=r"columns \['caption'\] twice"):
        sources.open_path(tmp_path / "c.csv")
    (tmp_path / "d.csv").write_text("image,caption,,\na.jpg,x,,\n")  # as spreadsheets leave them
    assert sources.open_path(tmp_path / "d.csv").row(0)["caption"] == "x"


@pytest.mark.parametrize("data", ["image,caption\ra.jpg,x\r", "image,caption\na.jpg,x\n"])
def test_tables_of_another_encoding_are_refused(tmp_path, data):
    (tmp_path / "a.csv").write_bytes(data.encode("utf-8" if "\r" in data else "utf-16"))
    with pytest.raises(check.UserError, match=r"a\.csv: got .* expected UTF-8 text .* save it"):
        sources.open_path(tmp_path / "a.csv")
    (tmp_path / "b.csv").write_bytes("image,caption\na.jpg,café\nb.jpg,tea\n".encode("latin-1"))
    table = sources.open_path(tmp_path / "b.csv")
    with pytest.raises(ValueError, match="utf-8"):  # `convert` counts it as a bad row
        table.row(0)
    assert table.row(1)["caption"] == "tea"


def test_labels_are_texts_or_whole_numbers():
    label = lambda value: sources.fields.label({"label": value}, "label")
    for value in (1, 1.0, True, np.True_, np.int64(1), decimal.Decimal(1)):
        assert label(value) == {"label": 1}
    assert label("1.7") == label(b"1.7") == {"label": "1.7"}
    for value in ([1], 1.7, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="neither a string nor a whole number"):
            label(value)


def test_tfds_without_tensorflow(tmp_path):
    pairs = formats.rows(6)
    source = sources.open_path(formats.tfds(tmp_path, pairs))
    by_key = {r["key"]: r for r in pairs}
    same_as(source, [by_key[source[i]["key"]] for i in range(6)])
    with pytest.raises(check.UserError, match=r"got 'val', expected one of"):
        sources.open_path(source.path, "val")


def test_a_run_on_tfds_asks_for_no_tensorflow(tmp_path, small_tokenizer, tensorflow_spy):
    """The whole of `vlp train`, with a worker: a TensorFlow that tells of its import is never asked for."""
    path = formats.tfds(tmp_path, formats.rows(6))
    (pathlib.Path(path) / records.TOKENIZER).write_bytes(small_tokenizer.to_bytes())
    data = {"path": path, "image_px": 16, "text_len": 8, "langs": [], "workers": 1}
    argv = runs.arguments(runs.TOY | {"data": data, "steps": 2}, tmp_path / "run")
    process = runs.command(*argv, path=[tensorflow_spy])
    _, err = process.communicate()
    assert process.returncode == 0, err[-2000:]
    assert not (tensorflow_spy / "asked").exists()
    (step,) = (
        r for r in runs.rows(tmp_path / "run") if r.get("step") == 2 and r["kind"] == "train"
    )
    assert step["samples"] == 16


def test_splits_by_directory_and_by_name(tmp_path):
    pairs = formats.rows(6)
    for name, part in (("train-0.tar", pairs[:4]), ("val-0.tar", pairs[4:])):
        formats.tar(tmp_path / name, part)
    assert [len(sources.open_path(tmp_path, s)) for s in ("train", "val")] == [4, 2]
    with pytest.raises(check.UserError, match="split 'test': got none in"):
        sources.open_path(tmp_path, "test")
    (tmp_path / "deep" / "val").mkdir(parents=True)
    formats.tar(tmp_path / "deep" / "val" / "0.tar", pairs[:1])
    assert len(sources.open_path(tmp_path / "deep", "val")) == 1


def test_a_tar_can_be_trained_from(tmp_path, small_tokenizer):
    formats.tar(tmp_path / "a.tar", formats.rows(5))
    (tmp_path / records.TOKENIZER).write_bytes(small_tokenizer.to_bytes())
    data = Data(path=str(tmp_path), langs=(), image_px=16)
    batch = open_dataset(data).batch_at(3, 4, seed=0)
    assert batch["image"].shape == (4, 16, 16, 3) and batch["mask"].all()


class Faulty(MemoryFileSystem):
    """A store in memory whose reads fail, stall and come back short, by a seeded draw."""

    protocol, store, pseudo_dirs = "faulty", {}, [""]
    draws, log, gate = random.Random(0), {"errors": 0, "stalls": 0, "short": 0}, threading.Lock()

    @classmethod
    def _strip_protocol(cls, path):
        return super()._strip_protocol(path.replace("faulty://", "memory://"))

    def cat_file(self, path, start=None, end=None, **kwargs):
        data = super().cat_file(path, start=start, end=end)
        with self.gate:
            draw = self.draws.random()
            kind = ("errors" if draw < 0.05 else "short" if draw < 0.1
                    else "stalls" if draw < 0.12 else "")  # fmt: skip
            if kind:
                self.log[kind] += 1
        if kind == "errors":
            raise OSError("connection reset")
        if kind == "stalls":
            time.sleep(0.6)
        return data[: len(data) // 2] if kind == "short" else data


@pytest.fixture
def faulty(monkeypatch):
    fsspec.register_implementation("faulty", Faulty, clobber=True)
    Faulty.store.clear()
    Faulty.draws = random.Random(0)
    Faulty.log.update(errors=0, stalls=0, short=0)
    policy = stores.Policy(pause_secs=0.001, stall_secs=0.3, block_bytes=2048, cache_blocks=8)
    monkeypatch.setattr(stores, "POLICY", policy)
    return fsspec.filesystem("faulty")


@pytest.mark.parametrize("kind", ["tar", "parquet", "records"])
def test_a_failing_store_gives_the_same_data_and_true_counts(tmp_path, faulty, kind, make_records):
    here = tmp_path / "here"
    if kind == "records":
        records.write(here, {"train": make_records(30)}, name="n", info={}, records_per_shard=9)
    else:
        here.mkdir()
        {"tar": formats.tar, "parquet": formats.parquet}[kind](here / f"a.{kind}", formats.rows(30))
    for file in here.iterdir():
        faulty.pipe_file(f"/bucket/{file.name}", file.read_bytes())
    local, remote = sources.open_path(here), sources.open_path("faulty://bucket")
    order = random.Random(1).sample(range(30), 30)
    assert [remote[i] for i in order] == [local[i] for i in order]
    assert remote.fingerprint == local.fingerprint
    counts = storage.counts()
    assert {k: counts[k] for k in ("errors", "short")} | {"stalls": 0} == Faulty.log | {"stalls": 0}
    assert counts["stalls"] >= Faulty.log["stalls"]  # a starved machine may add some
    assert Faulty.log["errors"] > 0 or kind == "records"


def test_a_run_on_a_failing_store_is_the_same_run(tmp_path, faulty, small_tokenizer):
    """Batches equal to the bit, and every failure counted in what the run tells."""
    formats.tar(tmp_path / "a.tar", formats.rows(30))
    faulty.pipe_file("/bucket/a.tar", (tmp_path / "a.tar").read_bytes())
    read, data = {}, Data(image_px=16, langs=(), read_threads=2)
    for path in (str(tmp_path / "a.tar"), "faulty://bucket/a.tar"):
        storage.reset()
        Faulty.log.update(errors=0, stalls=0, short=0)
        source = sources.open_path(path)
        dataset = Dataset(dataclasses.replace(data, path=path), source, small_tokenizer)
        read[path] = list(dataset.train_iter(start=0, batch=6, num_batches=15, seed=0))
        told = dataset.loader_stats.counts
    for a, b in zip(*read.values(), strict=True):
        for name in a:
            np.testing.assert_array_equal(a[name], b[name])
    assert Faulty.log["errors"] > 0 and Faulty.log["short"] > 0
    assert told["read_errors"] == Faulty.log["errors"] and told["read_short"] == Faulty.log["short"]
    assert told["read_stalls"] >= Faulty.log["stalls"] and told["read_cached"] > 0
    # everything was read through the cache's blocks, each asked for anew once it had been dropped
    assert told["read_bytes"] <= told["read_reads"] * stores.POLICY.block_bytes


def test_few_shards_of_a_store_are_open_and_on_disk(tmp_path, faulty, monkeypatch, make_records):
    records.write(
        tmp_path / "s", {"train": make_records(40)}, name="n", info={}, records_per_shard=4
    )
    for file in (tmp_path / "s").iterdir():
        faulty.pipe_file(f"/bucket/{file.name}", file.read_bytes())
    shard = next(iter((tmp_path / "s").glob("*.arrayrecord"))).stat().st_size
    monkeypatch.setenv("VLP_CACHE_GB", str(4.5 * shard / 1e9))
    monkeypatch.setattr(read, "OPEN_COPIES", 2)
    source = sources.open_path("faulty://bucket")
    for i in random.Random(3).sample(range(40), 40):
        assert source[i]["key"] == f"k{i:04d}"
        assert len(read._COPIES) <= 2
        assert len(list((tmp_path / "cache" / "shards").iterdir())) <= 4
    data = bytearray(faulty.cat("/bucket/train-00003-of-00010.arrayrecord"))
    data[100] ^= 1
    faulty.pipe_file("/bucket/train-00003-of-00010.arrayrecord", bytes(data))
    for file in (tmp_path / "cache" / "shards").iterdir():
        file.unlink()
    with pytest.raises(check.UserError, match="00003-of-00010.*changed bytes"):
        sources.open_path("faulty://bucket")[13]


def test_a_dead_store_and_a_missing_file_are_named(faulty, monkeypatch):
    faulty.pipe_file("/bucket/a.tar", b"x" * 3000)
    monkeypatch.setattr(
        stores,
        "POLICY",
        dataclasses.replace(stores.POLICY, tries=2, patience_secs=0.0, stall_secs=60.0),
    )
    monkeypatch.setattr(Faulty, "cat_file", lambda *_, **__: (_ for _ in ()).throw(OSError("gone")))
    with pytest.raises(
        check.UserError, match=r"a\.tar: got 2 failed requests \(last: OSError gone"
    ):
        storage.whole("faulty://bucket/a.tar")
    with pytest.raises(check.UserError, match="FileNotFoundError"):
        storage.whole("faulty://bucket/none")


def test_shard_copies_stay_within_their_bound(tmp_path, faulty):
    for name in "abc":
        faulty.pipe_file(f"/bucket/{name}", name.encode() * 1000)
    kept = tmp_path / "copies"
    for name in "abca":
        with open(
            storage.local_copy(f"faulty://bucket/{name}", directory=str(kept), limit_bytes=2000),
            "rb",
        ) as f:
            assert f.read() == name.encode() * 1000
        assert sum(p.stat().st_size for p in kept.iterdir()) <= 2000


def test_a_file_behaves_as_files_do(tmp_path):
    (tmp_path / "f").write_bytes(bytes(range(100)))
    file, true = storage.File(str(tmp_path / "f")), io.BytesIO(bytes(range(100)))
    for step in (("seek", 90, 0), ("read", 20), ("seek", -5, 2), ("read",), ("read", 3), ("tell",)):
        assert getattr(file, step[0])(*step[1:]) == getattr(true, step[0])(*step[1:])


def test_a_quote_that_is_never_closed_is_refused(tmp_path):
    """Every line after it would have become its text."""
    (tmp_path / "a.csv").write_text('path,caption\na.jpg,"one"\nb.jpg,"two\nc.jpg,three\n')
    with pytest.raises(check.UserError, match=r"never closed \(the row on line 3\)"):
        sources.open_path(tmp_path / "a.csv")
    (tmp_path / "b.csv").write_text('path,caption\na.jpg,"one\nline"\nb.jpg,an 5" inch\n')
    assert len(sources.open_path(tmp_path / "b.csv")) == 2


def test_capitals_and_separators_within_quotes(tmp_path):
    (tmp_path / "A.CSV").write_text('path;"caption, in English, or not"\na.jpg;x\n')
    given = fields.Fields(captions=("caption, in English, or not",))
    assert sources.open_path(tmp_path / "A.CSV", given=given).separator == ";"


def test_parquet_files_that_differ_or_are_damaged_are_named(tmp_path):
    formats.parquet(tmp_path / "0.parquet", formats.rows(4))
    other = tmp_path / "1.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"key": ["a"], "url": ["b"]}), other)
    with pytest.raises(
        check.UserError, match=r"1\.parquet: got columns .* without \['caption', 'im"
    ):
        sources.open_path(tmp_path)
    formats.parquet(other, formats.rows(4), row_group_size=4)
    data = bytearray(other.read_bytes())
    meta = pyarrow.parquet.ParquetFile(other).metadata.row_group(0)
    columns = (meta.column(k) for k in range(meta.num_columns))
    start = next(
        c.dictionary_page_offset or c.data_page_offset
        for c in columns
        if "bytes" in c.path_in_schema
    )
    data[start : start + 40] = b"\xff" * 40
    other.write_bytes(data)
    source = sources.open_path(tmp_path)
    with pytest.raises(check.UserError, match=r"1\.parquet: got damaged pages"):
        source[5]


def test_names_of_all_kinds(tmp_path):
    """Not UTF-8, a directory that is called like a shard, a link to itself."""
    folder = tmp_path / "b.tar"
    folder.mkdir()
    for name in (b"\xff.jpg", "ü.jpg".encode()):
        with open(os.path.join(os.fsencode(folder), name), "wb") as f:
            f.write(formats.jpeg(0))
    (folder / "loop.jpg").symlink_to("loop.jpg")
    (folder / "ü.txt").write_text("x")
    (folder / "c.tar").mkdir()
    (folder / "D.PARQUET").mkdir()
    source = sources.open_path(folder)
    keys = [source.files[i] for i in range(len(source))]
    assert len(keys) == 3
    records_ = {}
    for i in range(3):
        with contextlib.suppress(ValueError):
            records_[source[i]["key"]] = source[i]["captions"]
    assert {k: len(v) for k, v in records_.items()} == {"\\xff": 0, "ü": 1}
    assert sources.stamp(source) == sources.stamp(sources.open_path(folder))
    (tmp_path / "x").mkdir()
    formats.tar(tmp_path / "x" / "A.TAR", formats.rows(3))
    assert len(sources.open_path(tmp_path / "x")) == 3


def test_a_folder_that_changed_is_other_data(tmp_path):
    for i in range(3):
        (tmp_path / f"{i}.jpg").write_bytes(formats.jpeg(i))
        (tmp_path / f"{i}.txt").write_text("one")
    first = sources.open_path(tmp_path).fingerprint
    assert sources.open_path(tmp_path).fingerprint == first
    (tmp_path / "1.txt").write_text("eno")
    assert sources.open_path(tmp_path).fingerprint != first


def test_stores_and_addresses(tmp_path):
    """file:// is a disk; folders and tables in a store are refused in words that say so."""
    (tmp_path / "0.jpg").write_bytes(formats.jpeg(0))
    (tmp_path / "0.txt").write_text("one")
    (tmp_path / "a.csv").write_text("path,caption\n0.jpg,one\n")
    here = fsspec.filesystem("memory")
    for name in ("0.jpg", "0.txt", "a.csv"):
        here.pipe_file(f"/things/{name}", (tmp_path / name).read_bytes())
    for name in ("", "/a.csv"):
        source = sources.open_path(f"file://{tmp_path}{name}")
        assert [c["text"] for c in source[0]["captions"]] == ["one"]
        assert pickle.loads(pickle.dumps(source)).fingerprint == source.fingerprint
        with pytest.raises(check.UserError, match="got image files in a store, expected records"):
            sources.open_path(f"memory://things{name}")


@pytest.mark.parametrize(
    "text",
    [
        "no JSON",
        "[1]",
        '{"record": "x", "fingerprint": "F"}',
        '{"record": -1, "fingerprint": "F"}',
        "{}",
    ],
)
def test_what_is_no_quarantine_file_is_refused(tmp_path, dataset_dir, text):
    plain = open_dataset(Data(path=str(dataset_dir)))
    (tmp_path / "skip").write_text(text.replace("F", plain.fingerprint))
    with pytest.raises(check.UserError, match="config.data.skip .*skip: got "):
        open_dataset(Data(path=str(dataset_dir), skip=str(tmp_path / "skip")))


def test_parts_of_a_mixture_have_names_of_their_own():
    parts = tuple(Part(name="a", weight=0.5, source="shapes") for _ in range(2))
    with pytest.raises(check.UserError, match="a different name for each part"):
        open_dataset(Data(mixture=parts))


def test_a_mistyped_source_of_captions_is_told(dataset_dir, caplog):
    names = (CaptionSource("none_such", 1.0),)
    open_dataset(Data(path=str(dataset_dir), caption_sources=names))
    assert "got ['none_such'], in none of 23 records looked at" in caplog.text
