"""Opens whatever `config.data.path` holds: our records, tar shards, Parquet or a TFDS dataset."""

import os

from vlp.core import check
from vlp.data import reads, records
from vlp.data.sources import fields, parquet, tar, tfds

TOKENIZER = records.TOKENIZER


def open_data(data) -> records.Source:
    """Opens what the config section `data` names (see `vlp.data.SOURCES`).

    bad_images="error" also refuses tars with anything left out of them.
    """
    return open_path(data.path, data.split, strict=data.bad_images == "error")


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
    kind, files = find(path, split)
    if kind == "records":
        return records.open_split(path, split)
    beside = f"{path.rstrip('/')}/{TOKENIZER}"
    if kind == "tar":
        return tar.TarSource(files, fields=given, strict=strict, tokenizer=beside)
    if kind == "parquet":
        return parquet.ParquetSource(files, fields=given, tokenizer=beside)
    return tfds.TfdsSource(path, split, fields=given, tokenizer=beside)


def find(path: str, split: str = "train") -> tuple[str, list[str]]:
    """Returns ("records" | "tfds" | "tar" | "parquet", the files of the split)."""
    if not path:
        records.read_manifest(path)  # says how to get data
    if path.endswith((".tar", ".parquet")):
        if not reads.exists(path):
            raise check.error(path, "no file", "a shard", "check the path")
        return path.rsplit(".", 1)[1], [path]
    entries = reads.listing(path)
    names = {e.rsplit("/", 1)[-1] for e in entries}
    if records.MANIFEST in names:
        return "records", []
    if "dataset_info.json" in names:
        return "tfds", []
    if split in names:
        entries = reads.listing(f"{path.rstrip('/')}/{split}")
    for kind in ("tar", "parquet"):  # img2dataset writes Parquet sidecars beside its tars
        files = [e for e in entries if e.endswith(f".{kind}")]
        ours = [f for f in files if f.rsplit("/", 1)[-1].startswith(split)]
        if files and not ours and split not in (*names, "train"):
            raise check.error(
                "config.data.split",
                repr(split),
                f"a sub-directory or files of that name in {path}",
                "use 'train' for all files",
            )
        if files:
            return kind, ours if split not in names and ours else files
    records.read_manifest(path)  # raises, and says how to get data
    raise AssertionError("a manifest that the listing did not show")
