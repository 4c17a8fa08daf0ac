"""Datasets on disk: round trip, determinism, atomic writes, damage named in one line."""

import errno
import json
import os
import pickle
import subprocess
import sys

import numpy as np
import pytest

from vlp.core import check
from vlp.data import records
from vlp.data.config import Data
from vlp.data.dataset import Dataset


def test_round_trip_over_shards(dataset_dir, make_records):
    source = records.open_split(dataset_dir, "train")
    assert isinstance(source, records.Source)
    assert len(source) == 23 and len(source.counts) == 3
    expected = make_records(23)
    assert [source[i] for i in (22, 0, 9, 10, 19, 20)] == [
        expected[i] for i in (22, 0, 9, 10, 19, 20)
    ]
    copy = pickle.loads(pickle.dumps(source))
    assert copy[11] == expected[11] and copy.fingerprint == source.fingerprint
    for i in (-1, 23):
        with pytest.raises(IndexError):
            source[i]


def test_manifest_says_what_is_there(dataset_dir):
    manifest = json.loads((dataset_dir / records.MANIFEST).read_text())
    assert manifest["name"] == "small" and manifest["info"] == {"license": "none"}
    assert manifest["splits"]["train"]["num_records"] == 23
    listed = {s["file"] for e in manifest["splits"].values() for s in e["shards"]}
    assert listed | set(manifest["files"]) | {records.MANIFEST} == set(os.listdir(dataset_dir))
    assert "train-00002-of-00003.arrayrecord" in listed


def test_fingerprints_follow_keys_and_split(dataset_dir, tmp_path, make_records):
    train, val = (records.open_split(dataset_dir, s).fingerprint for s in ("train", "val"))
    rows = make_records(23)
    rows[3]["key"] = "other"
    records.write(tmp_path / "b", {"train": rows}, name="small", info={})
    assert len({train, val, records.open_split(tmp_path / "b", "train").fingerprint}) == 3


def test_writing_is_deterministic_and_repeatable(dataset_dir, tmp_path, caplog, make_records):
    arguments = {"name": "n", "info": {}}
    a = records.write(tmp_path / "a", {"train": make_records(9)}, **arguments)
    b = records.write(tmp_path / "b", {"train": make_records(9)}, **arguments)
    assert a == b
    caplog.set_level("INFO")
    assert records.write(tmp_path / "a", {"train": make_records(9)}, **arguments) == a
    assert "same dataset" in caplog.text
    with pytest.raises(check.UserError, match="another dataset"):
        records.write(tmp_path / "a", {"train": make_records(8)}, **arguments)
    assert len(records.open_split(tmp_path / "a", "train")) == 9
    assert not [f for f in os.listdir(tmp_path) if "tmp-" in f]


def test_a_failed_write_leaves_nothing(tmp_path, make_records):
    def broken():
        yield make_records(1)[0]
        raise RuntimeError("disk")

    with pytest.raises(RuntimeError):
        records.write(tmp_path / "a", {"train": broken()}, name="n", info={})
    assert os.listdir(tmp_path) == []


def test_foreign_directories_and_bad_records_are_refused(tmp_path, make_records):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("x")
    with pytest.raises(check.UserError, match="no manifest.json"):
        records.write(tmp_path / "mine", {"train": make_records(1)}, name="n", info={})
    assert os.listdir(tmp_path / "mine") == ["thesis.tex"]
    for bad in (
        {"key": "a", "image": "text", "captions": []},
        {"key": "a", "image": b"", "captions": []},
    ):
        with pytest.raises(check.UserError, match="record 'a'"):
            records.encode(bad)
    with pytest.raises(check.UserError, match="0 records"):
        records.write(tmp_path / "e", {"train": []}, name="n", info={})


def test_a_whole_record_survives(make_records):
    row = make_records(1)[0] | {
        "boxes": [{"box": [0, 0.25, 0.5, 1.0], "text": "a cat"}],
        "negatives": ["a dog"],
        "embeddings": {"clip": np.arange(6, dtype=np.float16).reshape(2, 3)},
        "label": 7,
    }
    row["captions"][0]["weight"] = 0.5
    back = records.decode(records.encode(row))
    stored, given = back.pop("embeddings")["clip"], row.pop("embeddings")["clip"]
    assert back == row
    assert stored.dtype == given.dtype and np.array_equal(stored, given)


CAPTION = {"text": "t", "source": "s", "lang": "en"}
BAD_FIELDS = {
    "no key": ({"key": None}, "key None"),
    "empty key": ({"key": ""}, "not empty"),
    "no captions": ({"captions": []}, "one or more captions"),
    "text of a number": ({"captions": [CAPTION | {"text": 3}]}, "caption text 3 of type int"),
    "text of bytes": ({"captions": [CAPTION | {"text": b"t"}]}, "type bytes"),
    "no lang": ({"captions": [{"text": "t", "source": "s"}]}, "{text, source, lang}"),
    "typo": ({"captions": [CAPTION | {"wieght": 2}]}, r"caption fields \['wieght'\]"),
    "weight": ({"captions": [CAPTION | {"weight": float("nan")}]}, "caption weight nan"),
    "surrogate": ({"captions": [CAPTION | {"text": "\ud800"}]}, "cannot be stored"),
    "box in pixels": ({"boxes": [{"box": [0, 0, 200, 100], "text": "x"}]}, r"in \[0, 1\]"),
    "negatives": ({"negatives": "dog"}, "a list of strings"),
    "embedding": ({"embeddings": {"clip": [1.0]}}, "float16 or float32"),
    "label": ({"label": 1.5}, "an integer or a string"),
    "extra": ({"mine": object()}, "cannot be stored"),
}


@pytest.mark.parametrize("name", BAD_FIELDS)
def test_bad_fields_are_named_in_one_line(name):
    change, message = BAD_FIELDS[name]
    good = {"key": "a", "image": b"x", "captions": [dict(CAPTION)]}
    records.encode(good)
    with pytest.raises(check.UserError, match=message) as e:
        records.encode(good | change)
    assert "\n" not in str(e.value) and str(e.value).startswith("record ")


def _shard(path):
    return path / "train-00001-of-00003.arrayrecord"


def _truncate(path):
    data = _shard(path).read_bytes()
    _shard(path).write_bytes(data[: len(data) // 2])


def _flip(path):
    data = bytearray(_shard(path).read_bytes())
    data[1000] ^= 1
    _shard(path).write_bytes(data)


def _total(path):
    manifest = json.loads((path / records.MANIFEST).read_text())
    manifest["splits"]["train"]["num_records"] = 99_999
    (path / records.MANIFEST).write_text(json.dumps(manifest))


def _count(path):
    manifest = json.loads((path / records.MANIFEST).read_text())
    manifest["splits"]["train"]["shards"][1]["records"] += 1
    manifest["splits"]["train"]["num_records"] += 1
    (path / records.MANIFEST).write_text(json.dumps(manifest))


def _format(path):
    (path / records.MANIFEST).write_text('{"format": 99}')


def _field(path):
    manifest = json.loads((path / records.MANIFEST).read_text())
    del manifest["splits"]["val"]["shards"][0]["sha256"]
    (path / records.MANIFEST).write_text(json.dumps(manifest))


def _escape(path):
    manifest = json.loads((path / records.MANIFEST).read_text())
    manifest["splits"]["train"]["shards"][0]["file"] = "../other"
    (path / records.MANIFEST).write_text(json.dumps(manifest))


DAMAGE = {
    "truncated": (_truncate, r"00001-of-00003.arrayrecord: got \d+ bytes"),
    "flipped": (_flip, "changed bytes"),
    "missing": (lambda p: _shard(p).unlink(), "no file"),
    "total": (_total, "num_records 99999 for shards of 23"),
    "count": (_count, "got 10 records, expected 11 records"),
    "manifest": (lambda p: (p / records.MANIFEST).unlink(), "vlp data convert"),
    "json": (lambda p: (p / records.MANIFEST).write_text("{"), "broken JSON"),
    "format": (_format, "got format 99"),
    "field": (_field, r"no str 'sha256' in splits.val.shards\[0\]"),
    "splits": (lambda p: (p / records.MANIFEST).write_text('{"format": 1}'), "no dict 'splits'"),
    "escape": (_escape, "'../other', a path"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_named_in_one_line(dataset_dir, name):
    damage, message = DAMAGE[name]
    damage(dataset_dir)
    with pytest.raises(check.UserError, match=message) as e:
        records.open_split(dataset_dir, "train")
    assert "\n" not in str(e.value)


def test_unreadable_shard_with_matching_manifest(dataset_dir):
    _shard(dataset_dir).write_bytes(b"x" * 70000)
    manifest = json.loads((dataset_dir / records.MANIFEST).read_text())
    manifest["splits"]["train"]["shards"][1] |= records.file_entry(str(_shard(dataset_dir)))
    (dataset_dir / records.MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(check.UserError, match="arrayrecord: got"):
        records.open_split(dataset_dir, "train")


def test_missing_path_and_unknown_split(dataset_dir):
    for path in ("", "/nowhere/at/all"):
        with pytest.raises(check.UserError, match="path of the data: got .* without manifest.json"):
            records.open_split(path, "train")
    with pytest.raises(check.UserError, match=r"one of \['train', 'val'\]; did you mean 'train'"):
        records.open_split(dataset_dir, "trian")


def test_tokenizer_is_checked_against_the_manifest(dataset_dir):
    source = records.open_split(dataset_dir, "val")
    assert source.tokenizer().vocab_size > 10
    data = bytearray((dataset_dir / records.TOKENIZER).read_bytes())
    data[50] ^= 1
    (dataset_dir / records.TOKENIZER).write_bytes(data)
    with pytest.raises(check.UserError, match="tokenizer.model: got sha256"):
        source.tokenizer()


FAULTS = """
import os, resource, sys
from vlp.core import check
from vlp.data import records, tokenizer
from vlp.data.config import Data
from vlp.data.dataset import Dataset
path, words = sys.argv[1:]
resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
words = tokenizer.load(words)
before = len(os.listdir("/proc/self/fd"))
sources = [records.open_split(path, "train", hashed=False) for _ in range(3)]
for i in list(range(150)) * 2:
    for source in sources:
        assert source[i]["key"] == f"k{i:04d}"
assert len(os.listdir("/proc/self/fd")) - before <= 16
data = Data(path=path, image_px=8, text_len=8, langs=(), bad_records="replace")
dataset = Dataset(data, sources[0], words)
held = []
try:
    while True:
        held.append(open(path + "/manifest.json"))
except OSError:
    try:
        for _ in range(3):  # the readers give their own handles back; then nothing is left
            dataset.batch_at(0, 150, 0)
            while True:
                try:
                    held.append(open(path + "/manifest.json"))
                except OSError:
                    break
    except check.Failed as e:
        print(e, dict(dataset.loader_stats.bad), sep="\\n")
"""


def test_few_shards_are_open_and_no_handle_left_is_no_fault_of_the_data(
    tmp_path, make_records, small_tokenizer
):
    """150 shards three times under 64 handles; then none is left, and one line says so."""
    path, words = tmp_path / "set", tmp_path / "t.model"
    records.write(path, {"train": make_records(150)}, name="n", info={}, records_per_shard=1)
    words.write_bytes(small_tokenizer.to_bytes())
    done = subprocess.run(
        [sys.executable, "-c", FAULTS, str(path), str(words)],
        capture_output=True, text=True, check=False, cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": ":".join(p for p in sys.path if p)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    message, bad = done.stdout.splitlines()
    assert "Too many open files (this process may hold 64)" in message and "ulimit -n" in message
    assert bad == "{}"


@pytest.mark.parametrize("error", [
    OSError(errno.EMFILE, "x"), OSError(errno.ENOSPC, "x"), OSError(errno.EIO, "x"), MemoryError(),
    RuntimeError("open() failed: Too many open files; opening a"),
])  # fmt: skip
def test_faults_of_the_machine_are_not_charged_to_a_record(make_records, small_tokenizer, error):
    class Failing(list):
        fingerprint = "x"

        def __getitem__(self, i):
            raise error

    data = Data(path="p", bad_records="replace", image_px=8, text_len=8, read_threads=0)
    dataset = Dataset(data, Failing([0]), small_tokenizer)
    with pytest.raises(check.Failed, match=r"record 0 of p: got .*, expected room for more;"):
        dataset.batch_at(0, 1, 0)
