"""Writes datasets of records. A directory is published whole or not at all."""

import hashlib
import itertools
import logging
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping

from array_record.python import array_record_module as array_record  # pyright: ignore  # compiled, without stubs

from vlp.core import check, interrupt
from vlp.data.records.format import encode
from vlp.data.records.manifest import MANIFEST, file_entry, read_manifest, write_manifest

_WRITER = "group_size:1"  # one record per chunk: random access reads nothing else
log = logging.getLogger(__name__)


def write(
    out_dir: str | os.PathLike,
    splits: Mapping[str, Iterable[dict]],
    *,
    name: str,
    info: Mapping,
    records_per_shard: int = 65536,
    files: Mapping[str, bytes] | None = None,
) -> dict:
    """Writes a dataset and returns its manifest; the same input gives the same bytes.

    `files` are further small files of the dataset (its tokenizer). Everything is written to a
    temporary sibling and renamed at the end, so that `out_dir` is never half a dataset. If the very
    same dataset is already there, it is left alone (and logged). Raises: `UserError` if `out_dir`
    holds anything else.
    """
    refuse_foreign(os.fspath(out_dir))
    out_dir = os.path.abspath(os.fspath(out_dir))
    parent = os.path.dirname(out_dir)
    os.makedirs(parent, exist_ok=True)
    temporary = tempfile.mkdtemp(prefix=f".{os.path.basename(out_dir)}.tmp-", dir=parent)
    with interrupt.removing(temporary):
        written = {
            split: _write_split(temporary, split, records, records_per_shard)
            for split, records in splits.items()
        }
        manifest = write_manifest(temporary, name, info, written, files or {})
        if os.path.isdir(out_dir) and os.listdir(out_dir):
            if read_manifest(out_dir) != manifest:
                raise check.error(
                    out_dir,
                    "another dataset there already",
                    "an empty or new directory",
                    "choose another or remove it yourself",
                )
            log.info("%s: the same dataset is already there; left as it is", out_dir)
            return manifest
        os.chmod(temporary, 0o755)  # mkdtemp makes it private
        os.replace(temporary, out_dir)
        return manifest


def write_shard(path: str, records: Iterable[dict]) -> None:
    """Writes one ArrayRecord file."""
    writer = array_record.ArrayRecordWriter(path, _WRITER)
    try:
        for record in records:
            writer.write(encode(record))
    finally:
        writer.close()


def refuse_foreign(out_dir: str) -> None:
    """Raises at once, before any work, if `out_dir` holds something that is no dataset."""
    if not out_dir:
        raise check.error("--out", repr(out_dir), "a directory", "name one")
    if "://" in out_dir:
        do = "write to a disk, then copy it there (gsutil, aws s3, rclone)"
        raise check.error("--out", out_dir, "a directory on a disk", do)
    if os.path.exists(out_dir) and not os.path.isdir(out_dir):
        raise check.error(out_dir, "a file", "a directory", "choose another --out")
    if not os.path.isdir(out_dir) or not os.listdir(out_dir):
        check.output_dir("--out", out_dir)
    if os.path.isdir(out_dir) and os.listdir(out_dir) and MANIFEST not in os.listdir(out_dir):
        raise check.error(
            out_dir,
            f"a directory with {len(os.listdir(out_dir))} entries and no {MANIFEST}",
            "an empty or new directory",
            "choose another --out",
        )


def _write_split(directory: str, split: str, records: Iterable[dict], per_shard: int) -> dict:
    """Writes the shards of one split and returns its entry of the manifest."""
    keys, shards, total = hashlib.sha256(), [], 0
    records = iter(records)

    def shard(first: dict) -> Iterator[dict]:
        """Passes on one shard's records, and counts them."""
        nonlocal total
        for record in itertools.chain([first], itertools.islice(records, per_shard - 1)):
            yield record
            keys.update(record["key"].encode() + b"\0")
            total += 1

    for first in records:
        path, before = os.path.join(directory, f"{split}-{len(shards):05d}.part"), total
        write_shard(path, shard(first))
        shards.append((path, total - before))
    if not total:
        raise check.error(f"split {split!r}", "0 records", "at least one", "drop or fill the split")
    entries = []
    for i, (path, count) in enumerate(shards):
        file = f"{split}-{i:05d}-of-{len(shards):05d}.arrayrecord"
        os.replace(path, os.path.join(directory, file))
        entries.append(
            {"file": file, "records": count, **file_entry(os.path.join(directory, file))}
        )
    return {"num_records": total, "keys_sha256": keys.hexdigest(), "shards": entries}
