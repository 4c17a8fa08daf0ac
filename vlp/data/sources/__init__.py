"""Opens whatever `config.data.path` holds: our records, tar shards, Parquet, a TFDS dataset,
a CSV, TSV or JSONL table, or a folder of images."""

import hashlib
import os
import re
from collections.abc import Iterator, Sequence
from typing import Any

from vlp.core import check
from vlp.data import reads, records
from vlp.data.sources import fields, files, parquet, tar, tfds

TOKENIZER = records.TOKENIZER
SPLITS = ("train", "val", "test", "dev")


def open_data(data) -> records.Source:
    """Opens what the config section `data` names (see `vlp.data.SOURCES`).

    bad_records="error" also refuses tars with anything left out of them.
    """
    return open_path(data.path, data.split, strict=data.bad_records == "error")


def open_path(
    path: str | os.PathLike,
    split: str = "train",
    *,
    strict: bool = False,
    given: fields.Fields | None = None,
) -> records.Source:
    """Opens one split of `path`, after a look at what it holds.

    A directory has its splits in sub-directories (train/…) or in the file names (train-00000.tar,
    train.csv); with neither, it is all "train", as is a single file unless its name says otherwise.
    """
    path, given = os.fspath(path).removeprefix("file://"), given or fields.Fields()
    kind, found = find(path, split)
    if kind == "records":
        return records.open_split(path, split)
    root = os.path.dirname(path) if found == [path] and kind != "folder" else path.rstrip("/")
    beside = f"{root or '.'}/{TOKENIZER}"
    if kind == "tar":
        return tar.TarSource(found, fields=given, strict=strict, tokenizer=beside)
    if kind == "parquet":
        return parquet.ParquetSource(found, fields=given, tokenizer=beside)
    if kind == "table":
        return files.TableSource(found[0], fields=given, tokenizer=beside)
    if kind == "folder":
        return files.FolderSource(found[0], fields=given, tokenizer=beside)
    return tfds.TfdsSource(path, split, fields=given, tokenizer=beside)


def stamp(source: Any) -> str:
    """Returns a digest that changes when a file behind an opened source does, wherever it lies."""
    digest = hashlib.sha256()
    for file in source.inputs():
        try:
            found = reads.stamp(file)
        except OSError:
            found = "missing"
        digest.update(found.encode() + b"\0")
    return digest.hexdigest()


def find(path: str, split: str = "train") -> tuple[str, list[str]]:
    """Returns (kind, where the split is).

    kind: "records" or "tfds" (which know their splits), "tar" or "parquet" (files), "table" (one
    file), "folder" (one directory); the last two are read from a disk only. Raises: `UserError` if
    there is no such split.
    """
    path = path.removeprefix("file://")
    if not path:
        records.read_manifest(path)  # says how to get data
    ending = os.path.splitext(path)[1].lower()
    if ending in (".tar", ".parquet", *files.TABLES) and not os.path.isdir(path):
        if not reads.exists(path):
            raise check.error(path, "no file", "a shard or a table", "check the path")
        if split != "train" and not os.path.basename(path).startswith(split):
            do = f"name it {split}… or give that split as a path of its own"
            raise check.error(f"split {split!r}", f"the one file {path}", "'train'", do)
        if ending in files.TABLES:
            _check_local(path)
        return "table" if ending in files.TABLES else ending[1:], [path]
    entries = reads.listing(path)
    names = {_name(e) for e in entries}
    if records.MANIFEST in names:
        return "records", []
    if "dataset_info.json" in names:
        return "tfds", []
    inner = reads.listing(f"{path.rstrip('/')}/{split}") if split in names else []
    where = f"{path.rstrip('/')}/{split}" if inner else path
    for kind, found in _kinds(where, inner or entries, split):
        named = [f for f in found if kind != "folder" and _name(f).startswith(split)]
        if not inner and not named and split != "train":
            got, do = f"none in {path}", "use 'train' for all files"
            raise check.error(f"split {split!r}", got, "a sub-directory or files of that name", do)
        found = found if inner else named or found
        if kind in ("table", "folder"):
            _check_local(path)
        if kind == "table" and len(found) > 1:
            got = f"{[_name(f) for f in found]} in {where}"
            raise check.error(f"split {split!r}", got, "one table", "give its path")
        return kind, found
    records.read_manifest(path)  # raises, and says how to get data
    raise AssertionError("a manifest that the listing did not show")


def others(path: str, splits: Sequence[str]) -> list[str]:
    """Returns the names of usual splits that `path` seems to hold beside `splits`."""
    path = path.removeprefix("file://")
    names = {_name(e) for e in reads.listing(path)}
    if records.MANIFEST in names:
        return [s for s in records.read_manifest(path)["splits"] if s not in splits]
    seems = lambda split, name: re.match(rf"{split}(idation)?([-_.]|$)", name)
    return [s for s in SPLITS if s not in splits and any(seems(s, n) for n in names)]


def _check_local(path: str) -> None:
    if reads.is_remote(path):
        got, do = "image files in a store", "copy it to a disk, convert it there"
        raise check.error(path, got, "records, tars or Parquet", do)


def _kinds(where: str, entries: list[str], split: str) -> Iterator[tuple[str, list[str]]]:
    """What a directory may be taken for, most telling first, with its files (a folder: itself)."""
    for kind in ("tar", "parquet"):  # img2dataset writes Parquet sidecars beside its tars
        if found := [e for e in entries if e.lower().endswith(f".{kind}") and not os.path.isdir(e)]:
            yield kind, found
    stems = ("metadata", split)  # metadata: Hugging Face's imagefolder
    tables = [e for e in entries if e.lower().endswith(files.TABLES) and not os.path.isdir(e)]
    if found := [e for e in tables if os.path.splitext(_name(e))[0] in stems]:
        yield "table", found
    if any(e.lower().endswith(files.EXTENSIONS) for e in entries):
        yield "folder", [where]


def _name(path: str) -> str:
    return path.rsplit("/", 1)[-1]
