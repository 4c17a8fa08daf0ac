"""The file manifest.json of a dataset: its splits, their shards, and the size and digest of every file."""

import hashlib
import json
import os
from collections.abc import Mapping

from vlp.core import check
from vlp.data import storage

FORMAT = 1
MANIFEST = "manifest.json"
TOKENIZER = "tokenizer.model"


def write_manifest(
    directory: str, name: str, info: Mapping, splits: Mapping, files: Mapping[str, bytes | None]
) -> dict:
    """Writes the small files (None: it is there already) and the manifest of a dataset; returns the
    manifest as read back."""
    manifest = {
        "format": FORMAT,
        "name": name,
        "info": dict(info),
        "splits": dict(splits),
        "files": {k: _write_file(directory, k, v) for k, v in sorted(files.items())},
    }
    text = json.dumps(manifest, indent=1, ensure_ascii=False, sort_keys=True) + "\n"
    _write_file(directory, MANIFEST, text.encode())
    return json.loads(text)


def _write_file(directory: str, file: str, data: bytes | None) -> dict:
    if data is not None:
        with open(os.path.join(directory, file), "wb") as f:
            f.write(data)
    return file_entry(os.path.join(directory, file))


def file_entry(path: str) -> dict:
    """Returns what the manifest says of a file: its size and digest."""
    return {"bytes": os.path.getsize(path), "sha256": _sha256(path)}


def _sha256(path: str) -> str:
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def read_manifest(path: str | os.PathLike) -> dict:
    """Returns the manifest of the dataset in `path`. Raises: `UserError` (how to get one)."""
    path = os.fspath(path)
    file = os.path.join(path, MANIFEST)
    do = "copy or build the dataset again"
    if not path or not storage.exists(file):
        got, make = f"{path!r} without {MANIFEST}", "make one with `vlp data convert`"
        make += " (the demo's: `vlp data emoji --out DIR`), or correct the path"
        raise check.error("path of the data", got, "a dataset directory", make)
    try:
        manifest = json.loads(storage.whole(file))
        version = manifest.get("format")
    except (ValueError, AttributeError, RecursionError) as e:
        raise check.error(file, f"broken JSON ({e})", "a manifest", do) from None
    if version != FORMAT:
        raise check.error(file, f"format {version!r}", f"format {FORMAT}", do)
    if wrong := _missing(manifest):
        raise check.error(file, wrong, "a whole manifest", do)
    return manifest


_SHARD = {"file": str, "records": int, "bytes": int, "sha256": str}
_SPLIT = {"num_records": int, "keys_sha256": str, "shards": list}


def _missing(manifest: Mapping) -> str:
    """Returns what a manifest lacks, "" if nothing: every field that is read without asking."""

    def first(entry: object, kinds: Mapping[str, type], where: str) -> str:
        if not isinstance(entry, dict):
            return f"{where or 'the top'} = {entry!r:.40}, no object"
        for field, kind in kinds.items():
            if not isinstance(entry.get(field), kind):
                return f"no {kind.__name__} {field!r} in {where or 'it'}"
        name = entry.get("file", "")
        return f"{where}.file {name!r}, a path" if name != os.path.basename(name) else ""

    if wrong := first(manifest, {"splits": dict}, ""):
        return wrong
    if not isinstance(manifest.get("files", {}), dict):
        return "files, which is not an object"
    for name, entry in manifest.get("files", {}).items():
        wrong = f"files {name!r}, a path" if name != os.path.basename(name) else ""
        if wrong := wrong or first(entry, {"bytes": int, "sha256": str}, f"files.{name}"):
            return wrong
    for split, entry in manifest["splits"].items():
        if wrong := first(entry, _SPLIT, f"splits.{split}"):
            return wrong
        if not entry["shards"]:
            return f"no shards in splits.{split}"
        for i, shard in enumerate(entry["shards"]):
            if wrong := first(shard, _SHARD, f"splits.{split}.shards[{i}]"):
                return wrong
        if (held := sum(s["records"] for s in entry["shards"])) != entry["num_records"]:
            return f"splits.{split}.num_records {entry['num_records']} for shards of {held}"
    return ""


def check_file(path: str, entry: Mapping, *, hashed: bool) -> None:
    """Raises a `UserError` if the file is missing or differs from its manifest entry."""
    do = "copy or build the dataset again"
    if not storage.exists(path):
        raise check.error(path, "no file", f"{entry['bytes']} bytes", do)
    if (size := storage.size(path)) != entry["bytes"]:
        raise check.error(path, f"{size} bytes", f"{entry['bytes']} bytes", do)
    if hashed and (digest := _sha256(storage.local_copy(path))) != entry["sha256"]:
        raise check.error(
            path, f"sha256 {digest[:12]}… (changed bytes)", f"{entry['sha256'][:12]}…", do
        )
