"""Addresses of workdirs: what is a local path, what is a bucket, and what is refused."""

import importlib.util
import pathlib

import pytest

from helpers import runs
from vlp.core import appended, check, paths, stores

PLAIN = ["runs/a", "a:b", "c:/x".replace("c:/", "./c:/"), "x@2", "gs", "s3/a", "lr[1e-3]"]


@pytest.mark.parametrize("text", PLAIN)
def test_other_texts_are_local_paths(text):
    assert paths.parse("--workdir", text) == pathlib.Path(text).absolute()
    assert paths.parse("--workdir", text, absolute=False) == pathlib.Path(text)


def test_addresses_have_the_api_of_paths():
    path = paths.parse("--workdir", "gs://some-bucket/runs/a b/")
    assert str(path) == "gs://some-bucket/runs/a b" and path.name == "a b"
    assert str(path / "x" / "y.json") == "gs://some-bucket/runs/a b/x/y.json"
    assert paths.is_remote(path) and paths.of(str(path)) == path
    assert str(paths.parse("--workdir", "s3://b.c/d").parent) == "s3://b.c"


REFUSED = {
    "gss://b/run": "did you mean 'gs://'?",
    "gcs://b/run": "did you mean 'gs://'?",
    "s3a://b/run": "did you mean 's3://'?",
    "GS://b/run": "did you mean 'gs://'?",
    " gs://b/run": "did you mean 'gs://'?",
    "gs:/b/run": "did you mean 'gs://'?",
    "gs:b/run": "did you mean 'gs://'?",
    "s3:b": "did you mean 's3://'?",
    "gs:///run": "name the bucket",
    "gs://": "did you mean 'gs://'?",
    "gs://bucket": "name the bucket",
    "gs://bucket/": "name the bucket",
    "gs://Bucket/run": "name the bucket",
    "s3://bucket/a//b": "leave out empty parts",
    "s3://bucket/../b": "leave out empty parts",
    "gs://bucket/lr[1]": "leave out empty parts",
    "gs://bucket/run?x=1": "leave out empty parts",
    "gs://bucket/a#2": "leave out empty parts",
    "az://bucket/run": "for a local folder write ./ before it",
    "file:///tmp/run": "write the path without file://",
    "https://x/run": "for a local folder write ./ before it",
}


@pytest.mark.parametrize("text", REFUSED)
def test_what_is_no_address_is_refused_before_anything_is_written(
    toy, tmp_path, monkeypatch, capsys, text
):
    monkeypatch.chdir(tmp_path)
    argv = runs.arguments(runs.TOY, text, tmp_path / "config.json")
    line = runs.refused(capsys, *argv)
    assert line.startswith(f"vlp: --workdir: got {text!r}, expected ") and REFUSED[text] in line
    assert [p.name for p in tmp_path.iterdir()] == ["config.json"]
    for command in (["eval", "--workdir", text], ["report", text], ["average", "x", "--out", text]):
        assert REFUSED[text] in runs.refused(capsys, *command)


@pytest.mark.parametrize("scheme", stores.SCHEMES)
def test_a_missing_package_is_named_with_its_extra(monkeypatch, scheme):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        check.UserError, match=rf"pip install 'vlp\[{'gcs' if scheme == 'gs' else 's3'}\]'"
    ):
        paths.parse("--workdir", f"{scheme}://bucket/run")


def test_the_environment_decides_where_it_is_set(monkeypatch):
    monkeypatch.setenv("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "true")
    monkeypatch.delenv("EPATH_USE_TF", raising=False)
    stores._prepare.cache_clear()
    stores._prepare()
    assert runs.os.environ["GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT"] == "true"
    assert runs.os.environ["EPATH_USE_TF"] == "false"


def test_files_on_a_disk(tmp_path):
    """The same functions, here: contents, listings, creation by one caller only."""
    paths.write(tmp_path / "a" / "b.json", b"1")
    paths.write(tmp_path / "a" / "b.json", b"22")
    assert paths.read(tmp_path / "a" / "b.json") == b"22"
    assert paths.files(tmp_path) == {"a/b.json": 2}
    assert paths.listing(tmp_path) == [tmp_path / "a"] and paths.listing(tmp_path / "none") == []
    assert paths.create(tmp_path / "c", b"me") and not paths.create(tmp_path / "c", b"me")
    paths.copy(tmp_path / "c", tmp_path / "d" / "e")
    assert b"".join(paths.chunks(tmp_path / "d" / "e", 1)) == b"me"
    paths.remove_tree(tmp_path / "d")
    paths.remove(tmp_path / "c")
    paths.remove(tmp_path / "c")
    assert [p.name for p in paths.listing(tmp_path)] == ["a"]


def test_a_file_that_grows_is_made_by_its_first_line(tmp_path):
    file = appended.Appended(tmp_path / "q.jsonl")
    file.flush()
    assert not (tmp_path / "q.jsonl").exists()
    file.write("a\n")
    assert (tmp_path / "q.jsonl").read_text() == "a\n"  # at once, for a run that is killed
    file.close()
    again = appended.Appended(tmp_path / "q.jsonl")
    again.write("b\n")
    again.close()
    assert appended.read(tmp_path / "q.jsonl") == b"a\nb\n"
    appended.Appended(tmp_path / "q.jsonl", keep=b"a\n").close()
    assert appended.read(tmp_path / "q.jsonl") == b"a\n"
