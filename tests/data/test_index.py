"""Compact indices: what was written is read, by path alone; nobody else's files are trusted."""

import errno
import os
import pickle
import tempfile

import pytest

from vlp.core import check
from vlp.data import index


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("VLP_CACHE", str(tmp_path / "cache"))


def write(path: str, num: int = 5) -> None:
    with index.Writer(path, {"at": "<i8", "kind": "u1"}, lists=("key",)) as writer:
        for begin in range(0, num, 2):
            part = range(begin, min(begin + 2, num))
            writer.add("at", [10**12 * i for i in part])
            writer.add_texts("key", [f"key {i} ü".encode() if i else b"\xff" for i in part])
        writer.finish({"fingerprint": "f", "counts": {"a": 1}})


def test_arrays_come_back_as_they_were_written(tmp_path):
    write(str(tmp_path / "a"))
    found = index.Index(str(tmp_path / "a"))
    assert found["at"].tolist() == [10**12 * i for i in range(5)] and len(found["kind"]) == 0
    assert list(found.texts("key")) == ["\\xff", *(f"key {i} ü" for i in range(1, 5))]
    assert found.meta == {"fingerprint": "f", "counts": {"a": 1}}
    assert os.listdir(tmp_path) == ["a"]
    data = pickle.dumps(found)
    assert len(data) < 200 and pickle.loads(data).text("key", 3) == "key 3 ü"
    assert not found["at"].flags.owndata  # a view of the mapped file …
    with pytest.raises(ValueError):
        found["at"][0] = 1  # … that all processes share
    with index.Writer(str(tmp_path / "b"), {}, lists=("key",)) as writer:
        for _ in range(2):
            writer.add_list("key", found)
        writer.finish({})
    assert list(index.Index(str(tmp_path / "b")).texts("key")) == 2 * list(found.texts("key"))


def test_a_failed_or_killed_build_leaves_nothing(tmp_path):
    class Killed(BaseException):
        pass

    def build(path):
        with index.Writer(path, {"a": "u1"}) as writer:
            writer.add("a", [1])
            raise Killed

    with pytest.raises(Killed):
        index.cached("k", "stamp", build)
    assert os.listdir(tmp_path / "cache" / "k") == []


def test_a_full_disk_is_named(tmp_path):
    def build(path):
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(check.Failed, match=r"cache/k: got No space left .*; free space"):
        index.cached("k", "stamp", build)


@pytest.mark.parametrize("damage", ["cut", "header", "zeros", "pickle", "empty"])
def test_damaged_files_are_built_again(tmp_path, damage):
    built = []
    build = lambda path: built.append(path) or write(path)
    index.cached("k", "stamp", build)
    (file,) = (tmp_path / "cache" / "k").iterdir()
    data = file.read_bytes()
    change = {
        "cut": data[:-1],
        "header": data.replace(b"fingerprint", b"fingerprinT"),
        "zeros": bytes(len(data)),
        "pickle": pickle.dumps({"a": 1}),
        "empty": b"",
    }
    file.write_bytes(change[damage])
    for _ in range(2):
        assert index.cached("k", "stamp", build).text("key", 2) == "key 2 ü"
    assert len(built) == 2
    assert index.cached("k", "another stamp", build) and len(built) == 3


def test_the_cache_is_this_users_alone(tmp_path, monkeypatch):
    os.makedirs(tmp_path / "cache" / "k", mode=0o755)
    os.chmod(tmp_path / "cache" / "k", 0o777)
    assert index.own_dir("k") == str(tmp_path / "cache" / "k")
    assert os.stat(tmp_path / "cache" / "k").st_mode & 0o777 == 0o700
    monkeypatch.setattr(os, "getuid", lambda: 12345)
    with pytest.raises(check.UserError, match=r"k: got a directory of user \d+, expected one of"):
        index.cached("k", "stamp", write)


def test_a_planted_temporary_directory_is_refused(tmp_path, monkeypatch):
    """Where neither VLP_CACHE nor the home can be written, and another was first to make the name."""
    monkeypatch.setenv("VLP_CACHE", "/proc/none")
    monkeypatch.setattr(tempfile, "gettempdir", lambda: str(tmp_path))
    (tmp_path / "theirs").mkdir()
    (tmp_path / f"vlp-{os.getuid()}").symlink_to("theirs")
    with pytest.raises(check.UserError, match=r"vlp-\d+: got something that is not this user's"):
        index.own_dir("k")
