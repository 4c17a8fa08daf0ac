"""The manifest of a checkpoint: a digest of every file, written before the checkpoint counts as saved.

Orbax restores flipped bits without an error and lists a step whose files are missing; the manifest reveals both.
digests.json has the size and xxh3-128 of every file (arrays, their metadata, JSON) and the empty folders. Every process
hashes the files that it wrote, process 0 the others; all of them check in shares. Files of Orbax that are written after
the manifest are foreseen: the commit marker's text, and the metadata of the step without its time of commit.
Manifests of older checkpoints, {name: SHA-256}, are read too.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import xxhash

from vlp.core import paths

FILE = "digests.json"
MARKER = "commit_success.txt"  # by Orbax, after all other files; items have one too
STEP = "_CHECKPOINT_METADATA"  # by Orbax, with the time of commit
UNLISTED = f"{FILE} is missing"  # lost, or the checkpoint is of another program
_PART = "digests.process_{}.json"
_OWNED = re.compile(r"(^|/)(ocdbt\.|array_metadatas/)process_(\d+)(/|$)")
_TEMPORARY = re.compile(r"\.orbax-checkpoint-tmp[^/]*/")  # items lose it when all have written
_LATE = (FILE, MARKER, STEP)  # in the checkpoint's own folder


# ---- writing


def write_part(folder: paths.Path, process: int) -> None:
    """Writes the digests of the files that this process wrote, for `write`. Called before all processes meet."""
    own = [name for name in paths.files(folder) if owner(name) == process]
    found = {_TEMPORARY.sub("/", name): entry for name, entry in _entries(folder, own).items()}
    paths.write(folder / _PART.format(process), _dump(found))


def check_parts(folder: paths.Path, processes: int) -> None:
    """Raises OSError unless every process but the first has written its part: else its files may not be seen here."""
    found = paths.files(folder)
    for process in range(1, processes):
        if _PART.format(process) not in found:
            raise OSError(f"no digests of process {process}: is the workdir shared by all hosts?")


def write(folder: paths.Path) -> None:
    """Writes the manifest, on process 0, when all processes have written their files and parts.

    folder: the checkpoint, under its temporary name.

    Raises:
        OSError: a file that another process wrote is not there.
    """
    found, entries = paths.files(folder), {}
    parts = [n for n in found if re.fullmatch(_PART.format(r"\d+"), n)]
    for part in parts:
        entries |= json.loads(paths.read(folder / part))
    if lost := sorted(entries.keys() - found.keys()):
        raise OSError(f"{lost[0]}, of another process, is not to be seen here")
    rest = [n for n in found if n not in entries and n not in (*_LATE, *parts)]
    entries |= _entries(folder, rest)
    late: dict[str, Any] = {}
    if STEP in found:
        late[STEP] = _hash_step(paths.read(folder / STEP))
    if text := _marker_text(folder, found):
        late[MARKER] = _hash(text.encode())
    value = {
        "format": "xxh3-128",
        "files": dict(sorted(entries.items())),
        "folders": empty_folders(folder),
        "late": late,
    }
    value["self"] = _hash(_dump(value))
    paths.write(folder / FILE, _dump(value))
    for part in parts:
        paths.remove(folder / part)


def owner(name: str) -> int:
    """Returns the number of the process that wrote a file of a checkpoint."""
    found = _OWNED.search(name)
    return int(found.group(3)) if found else 0


def _marker_text(folder: paths.Path, names: Iterable[str]) -> str:
    """Returns the text that Orbax will write into the checkpoint's commit marker, as it does for items; "": unknown."""
    final = folder.parent / folder.name.partition(".")[0]  # without the temporary suffix
    for name in (n for n in names if n.endswith(f"/{MARKER}")):
        text, item = paths.read(folder / name).decode(), os.fspath((folder / name).parent)
        if text.endswith(item):
            return text.removesuffix(item) + os.fspath(final)
    return ""


# ---- checking


def problem(folder: paths.Path, items: Sequence[str]) -> str:
    """Returns what is wrong with a checkpoint's files, or "". Items: subfolders that must be there."""
    manifest, found = opened(folder, items)
    return found or check_files(folder, manifest, manifest)


def opened(folder: paths.Path, items: Sequence[str]) -> tuple[dict[str, Any], str]:
    """Returns {file: what the manifest says of it} and what is wrong with a checkpoint as a whole, or "".

    Reads no array. For a checkpoint that has the commit marker and all items, but no manifest, that is `UNLISTED`.
    """
    for item in items:
        if not paths.is_dir(folder / item):
            return {}, f"{item} is missing"
    try:
        text = paths.read(folder / FILE)
    except FileNotFoundError:
        lost = not paths.is_file(folder / MARKER)
        return {}, f"{FILE} and {MARKER} are missing" if lost else UNLISTED
    try:
        value = _parsed(text)
    except ValueError:
        return {}, f"{FILE} is broken"
    if "format" not in value:
        return {n: str(d) for n, d in value.items()}, ""
    if not paths.is_file(folder / MARKER):
        return {}, f"{MARKER} is missing"  # an unfinished copy, save or deletion
    if not paths.is_remote(folder):  # a store has no empty folders
        for name in value["folders"]:
            if not paths.is_dir(folder / name):
                return {}, f"{name} is missing"
    return value["files"] | value["late"], ""


def unreadable(folder: paths.Path) -> str:
    """Returns what is wrong with a manifest that was just written, or ""."""
    try:
        _parsed(paths.read(folder / FILE))
    except (OSError, ValueError) as e:
        return str(e)
    return ""


def _parsed(text: bytes) -> dict[str, Any]:
    """Returns a manifest; raises ValueError if one of its bytes has changed (those of SHA-256 do not tell)."""
    value = json.loads(text)
    if not isinstance(value, dict):
        raise ValueError("not an object")
    if "format" in value:
        own = value.pop("self", "")
        good = own == _hash(_dump(value)) and text == _dump(value | {"self": own})
        if not good or value["format"] != "xxh3-128":
            raise ValueError("changed")
    return value


def check_files(folder: paths.Path, manifest: Mapping[str, Any], names: Iterable[str]) -> str:
    """Returns what is wrong with the first bad one of the named files, or ""."""
    found = (_check_file(folder / name, name, manifest[name]) for name in names)
    return next(filter(None, found), "")


def shares(manifest: Mapping[str, Any], num: int) -> list[list[str]]:
    """Divides the files of a manifest over processes, about the same number of bytes each."""
    size = lambda name: manifest[name][0] if isinstance(manifest[name], list) else 1
    out, load = [[] for _ in range(num)], [0] * num
    for name in sorted(manifest, key=lambda n: (-size(n), n)):
        i = load.index(min(load))
        out[i].append(name)
        load[i] += size(name)
    return out


def foreign(folder: paths.Path) -> list[str]:
    """Returns the files of a step's folder that its save did not write; [FILE] if it has no manifest at all."""
    try:
        value = json.loads(paths.read(folder / FILE))
        known = value.get("files", value)
    except (OSError, ValueError, AttributeError):
        return [FILE]
    return [
        name
        for name in paths.files(folder)
        if name not in known and name not in _LATE and not name.endswith(f"/{MARKER}")
    ]


def _check_file(path: paths.Path, name: str, entry: Any) -> str:
    try:
        if name == STEP:
            good = _hash_step(paths.read(path)) == entry
        elif name == MARKER:
            good = _hash(paths.read(path)) == entry
        elif isinstance(entry, str):  # SHA-256
            good = _sha256(path) == entry
        else:
            good = paths.size(path) == entry[0] and _hash_file(path) == entry[1]
    except FileNotFoundError:
        return f"{name} is missing"
    except (ValueError, IsADirectoryError):
        good = False
    return "" if good else f"{name} was changed"


def _entries(folder: paths.Path, names: Iterable[str]) -> dict[str, list[Any]]:
    return {n: [paths.size(folder / n), _hash_file(folder / n)] for n in names}


def empty_folders(folder: paths.Path) -> list[str]:
    """Returns the names of empty folders below a folder. A store has none."""
    if paths.is_remote(folder):
        return []
    found = (p for p in folder.glob("**/*") if p.is_dir() and not any(p.iterdir()))
    return sorted(p.relative_to(folder).as_posix() for p in found)


def _hash(data: bytes) -> str:
    return xxhash.xxh3_128_hexdigest(data)


def _hash_file(path: paths.Path) -> str:
    return _digest(path, xxhash.xxh3_128)


def _sha256(path: paths.Path) -> str:
    return _digest(path, hashlib.sha256)


def _digest(path: paths.Path, kind: Callable[[], Any]) -> str:
    if not paths.is_remote(path):
        with open(path, "rb", buffering=0) as f:  # into one small buffer, which stays in the cache
            return hashlib.file_digest(f, kind).hexdigest()
    state = kind()
    for data in paths.chunks(path):
        state.update(data)
    return state.hexdigest()


def _hash_step(text: bytes) -> str:
    """Of Orbax's metadata of a step: all but the time of commit, which is written after the manifest."""
    value = json.loads(text)
    value.pop("commit_timestamp_nsecs", None)
    return _hash(_dump(value))


def _dump(value: Any) -> bytes:
    return (json.dumps(value, indent=1, sort_keys=True) + "\n").encode()
