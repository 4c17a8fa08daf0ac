"""Opens whatever `config.data.path` holds: our records, tar shards, Parquet, a TFDS dataset,
a CSV, TSV or JSONL table, or a folder of images."""

import os

from vlp.core import check
from vlp.data import reads, records
from vlp.data.sources import fields, files, parquet, tar, tfds

TOKENIZER = records.TOKENIZER


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

    A directory of tars or Parquet files has its splits in sub-directories (train/…) or in the file
    names (train-00000.tar); with neither, it is all "train".
    """
    path, given = os.fspath(path), given or fields.Fields()
    kind, found = find(path, split)
    if kind == "records":
        return records.open_split(path, split)
    beside = f"{path.rstrip('/')}/{TOKENIZER}"
    if kind == "tar":
        return tar.TarSource(found, fields=given, strict=strict, tokenizer=beside)
    if kind == "parquet":
        return parquet.ParquetSource(found, fields=given, tokenizer=beside)
    if kind == "table":
        return files.TableSource(found[0], fields=given, tokenizer=beside)
    if kind == "folder":
        return files.FolderSource(path, fields=given, tokenizer=beside)
    return tfds.TfdsSource(path, split, fields=given, tokenizer=beside)


def find(path: str, split: str = "train") -> tuple[str, list[str]]:
    """Returns ("records", "tfds", "tar", "parquet", "table" or "folder", the files of the split)."""
    if not path:
        records.read_manifest(path)  # says how to get data
    ending = path[path.rfind(".") :]
    if ending in (".tar", ".parquet", *files.TABLES):
        if not reads.exists(path):
            raise check.error(path, "no file", "a shard or a table", "check the path")
        return "table" if ending in files.TABLES else ending[1:], [path]
    entries = reads.listing(path)
    names = {e.rsplit("/", 1)[-1] for e in entries}
    if records.MANIFEST in names:
        return "records", []
    if "dataset_info.json" in names:
        return "tfds", []
    if split in names:
        entries = reads.listing(f"{path.rstrip('/')}/{split}")
    for kind in ("tar", "parquet"):  # img2dataset writes Parquet sidecars beside its tars
        found = [e for e in entries if e.endswith(f".{kind}")]
        named = [f for f in found if f.rsplit("/", 1)[-1].startswith(split)]
        if found and not named and split not in (*names, "train"):
            raise check.error(
                "config.data.split",
                repr(split),
                f"a sub-directory or files of that name in {path}",
                "use 'train' for all files",
            )
        if found:
            return kind, named if split not in names and named else found
    if any(n.startswith("metadata.") and n.endswith(files.TABLES) for n in names):  # imagefolder
        return "table", [e for e in entries if e.endswith(files.TABLES)][:1]
    if any(n.lower().endswith(files.EXTENSIONS) for n in names):
        return "folder", []
    records.read_manifest(path)  # raises, and says how to get data
    raise AssertionError("a manifest that the listing did not show")
