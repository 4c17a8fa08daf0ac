"""Opens the dataset at `config.data.path`: our records, tar shards, Parquet, a TFDS dataset,
a CSV, TSV, JSONL or JSON table, or a folder of images."""

import collections
import hashlib
import itertools
import logging
import os
import re
from collections.abc import Iterator, Sequence
from typing import Any

from vlp.core import check
from vlp.data import records, storage
from vlp.data.sources import fields, files, json_tables, parquet, tables, tar, tfds

TOKENIZER = records.TOKENIZER
_NUMBERED = re.compile(r"(.*?)(\d+)((?:\.\w+)+)")  # 00000.tar, shard-12.tar.gz
_PART = re.compile(r"(?:^|(?<=[-_.]))(?P<number>\d+)[-_]of[-_](?P<total>\d+)")
log = logging.getLogger(__name__)
PACKED = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst", ".zip", ".7z", ".rar")


def open_data(data) -> records.Source:
    """Opens what the config section `data` names (see `vlp.data.SOURCES`).

    bad_records="error" also refuses tars with anything left out of them.
    """
    given = fields.Fields(
        group=None if data.group_rows else False, allow_outside=data.allow_outside
    )
    source = open_path(data.path, data.split, strict=data.bad_records == "error", given=given)
    if grouping := grouped(source):
        log.warning("%s: %s (config.data.group_rows, .captions)", data.path, grouping)
    return source


def grouped(source: Any) -> str:
    """Returns how many rows became how many records, as text; "" if the numbers are equal."""
    num_rows = getattr(source, "num_rows", len(source))
    if num_rows == len(source):
        return ""
    return f"{num_rows} rows are {len(source)} images: one record each, with all captions"


def open_path(
    path: str | os.PathLike,
    split: str = "train",
    *,
    strict: bool = False,
    given: fields.Fields | None = None,
) -> records.Source:
    """Opens one split of `path`; the files decide the format.

    Splits are sub-directories (train/…) or parts of file names (train-00000.tar, train.csv); "validation" also
    counts as "val". Without either, all files are "train", as is a single file whose name has no split.
    """
    path, given = os.fspath(path).removeprefix("file://"), given or fields.Fields()
    kind, found = find(path, split)
    if kind == "records":
        there = records.read_manifest(path)["splits"]
        return records.open_split(path, fields.existing(split, there))
    if kind in ("tar", "parquet") and found != [path]:
        _check_whole(found, strict)
    root = os.path.dirname(path) if found == [path] and kind != "folder" else path.rstrip("/")
    beside = f"{root or '.'}/{TOKENIZER}"
    if kind == "tar":
        return tar.TarSource(found, fields=given, strict=strict, tokenizer=beside)
    if kind == "parquet":
        return parquet.ParquetSource(found, fields=given, root=root, tokenizer=beside)
    if kind == "table":
        root = "" if found == [path] else root
        return tables.TableSource(found[0], fields=given, split=split, root=root, tokenizer=beside)
    if kind == "folder":
        return files.FolderSource(found[0], fields=given, root=root, tokenizer=beside)
    return tfds.TfdsSource(path, split, fields=given, tokenizer=beside)


def _check_whole(found: Sequence[str], strict: bool) -> None:
    """Warns of files that are missing, judged by the names of the others (train-00001-of-00003, 00001.tar).

    Raises: `UserError` for names of the first kind, if `strict`.
    """
    there: dict[tuple[str, str], dict[int, str]] = {}
    numbered: dict[tuple[str, str, str, int], set[int]] = {}
    for file in found:
        if match := _PART.search(_name(file)):
            begin, number, total = _name(file)[: match.start("number")], *match.group(1, 2)
            there.setdefault((begin, total), {})[int(number)] = file
        elif match := _NUMBERED.fullmatch(_name(file)):
            begin, number, end = match.groups()
            series = numbered.setdefault((os.path.dirname(file), begin, end, len(number)), set())
            series.add(int(number))
    for (where, begin, end, width), numbers in numbered.items():
        whole = range(min(numbers), max(numbers) + 1)  # how many there should be is not known
        if missing := len(whole) - len(numbers):
            gaps = itertools.islice((n for n in whole if n not in numbers), 4)
            names = ", ".join(f"{begin}{n:0{width}}{end}" for n in gaps)
            more = ", …" if missing > 4 else ""
            log.warning("%s: %d files, without %s%s", where or ".", len(numbers), names, more)
    for (begin, total), parts in there.items():
        count, first = int(total), int(int(total) in parts)  # from 0 on, or from 1 to the total
        missing = count - sum(first <= n < first + count for n in parts)
        if missing <= 0:
            continue
        file = next(iter(parts.values()))
        match = _PART.search(_name(file))
        assert match
        like = f"{{:0{len(match['number'])}}}" + _name(file)[match.end("number") : match.end()]
        gaps = (n for n in range(first, first + count) if n not in parts)
        names = ", ".join(begin + like.format(n) for n in itertools.islice(gaps, 4))
        got = f"{len(parts)} of {count} files, without {names}" + (", …" if missing > 4 else "")
        do = "fetch the missing ones, or read it without strict mode"
        e = check.error(os.path.dirname(file) or ".", got, "all of them", do)
        if strict:
            raise e
        log.warning("%s: %s", os.path.dirname(file) or ".", got)


def stamp(source: Any) -> str:
    """Returns a digest that changes when a file behind an opened source does, wherever it lies."""
    digest = hashlib.sha256()
    for file in source.inputs():
        try:
            found = storage.stamp(file)
        except OSError:
            found = "missing"
        digest.update(found.encode() + b"\0")
    return digest.hexdigest()


def find(path: str, split: str = "train") -> tuple[str, list[str]]:
    """Returns (kind, where the split is).

    kind: "records" or "tfds" (which know their splits), "tar" or "parquet" (files), "table" (one
    file), "folder" (one directory); the last two are read from a disk only. Raises: `UserError` if
    the split is missing or cannot be read.
    """
    path = path.removeprefix("file://")
    if not path:
        records.read_manifest(path)  # says how to get data
    entries = storage.listing(path)
    if not entries and (storage.is_remote(path) or not os.path.isdir(path)):
        return _find_file(path, split)
    names = {_name(e) for e in entries}
    if records.MANIFEST in names:
        return "records", []
    saved = "state.json" in names and any(n.endswith(".arrow") for n in names)
    if saved or "dataset_dict.json" in names:
        got, do = "a Hugging Face dataset saved to disk (Arrow)", "write it by `to_parquet`"
        raise check.error(path, got, "Parquet, tars, a table or images", do)
    if "dataset_info.json" in names:
        return "tfds", []
    for name in fields.names_of(split):
        if inner := _inner(f"{path.rstrip('/')}/{name}") if name in names else []:
            return _in_directory(f"{path.rstrip('/')}/{name}", inner, split, named=True)
    if config := _config(path, entries):
        return find(config, split)
    return _in_directory(path, entries, split, named=False)


def _config(path: str, entries: list[str]) -> str:
    """Returns the directory in `path` that holds the splits, as in Hugging Face's exports (default/train/0000.parquet).

    "" if there is none. Raises: `UserError` if there are several.
    """
    if any(_kind(e) for e in entries):
        return ""
    found = []
    for entry in (e for e in entries if not _name(e).startswith(".") and _is_directory(e)):
        inner = {_name(e): e for e in _inner(entry)}
        splits = [inner[n] for s in fields.SPLITS for n in fields.names_of(s) if n in inner]
        if any(_kind(e) == "parquet" for s in splits if _is_directory(s) for e in _inner(s)):
            found.append(entry)
    if len(found) > 1:
        got = f"splits in each of {[_name(d) for d in found][:8]}"
        raise check.error(path, got, "one directory of them", "give its path")
    return found[0] if found else ""


def unread(kind: str, found: Sequence[str]) -> dict[str, int]:
    """Counts, by ending, unread files in the folder of the tars, Parquet files or table `found`.

    Not counted: files of the same kind (other splits), and img2dataset's reports.
    """
    if kind not in ("tar", "parquet", "table") or not os.path.isfile(found[0]):
        return {}
    where = os.path.dirname(found[0]) or "."
    stems = {os.path.splitext(f)[0] for f in found} | {TOKENIZER, "README"}
    counts: collections.Counter = collections.Counter()
    for file in _inner(where):
        stem, ending = os.path.splitext(_name(file))
        own = stem.removesuffix("_stats")
        if kind == "table" and ending.lower() in files.EXTENSIONS:
            continue  # the table's own images
        beside = os.path.join(where, own) in stems or own in stems or _name(file) == TOKENIZER
        if stem.startswith(".") or beside or _kind(file) == kind or not os.path.isfile(file):
            continue
        counts[files.as_text(ending.lower()) or "no ending"] += 1
    return dict(sorted(counts.items()))


def others(path: str, splits: Sequence[str]) -> list[str]:
    """Returns the usual splits that `path` seems to contain in addition to `splits`."""
    path = path.removeprefix("file://")
    entries = storage.listing(path)
    names = {_name(e) for e in entries}
    if records.MANIFEST in names:
        asked = {n for s in splits for n in fields.names_of(s)}
        return [s for s in records.read_manifest(path)["splits"] if s not in asked]
    if "data" in names:
        names |= {_name(e) for e in _inner(f"{path.rstrip('/')}/data")}
    elif config := _config(path, entries):
        names |= {_name(e) for e in _inner(config)}
    asked = {n for s in splits for n in fields.names_of(s)}
    return [s for s in fields.SPLITS if s not in asked and any(_is_named(n, s) for n in names)]


def tokenizer_file(path: str) -> str:
    """Returns the path that a tokenizer of the data would have."""
    path = path.removeprefix("file://")
    is_file = os.path.isfile(path) or storage.is_remote(path) and bool(_kind(path))
    root = os.path.dirname(path) if is_file else path.rstrip("/")
    return f"{root or '.'}/{TOKENIZER}"


def held(path: str) -> tuple[str, ...]:
    """Returns "train" and whichever other usual splits `path` has."""
    there = others(path, ("train",)) or []
    if os.path.isfile(path) and tables.stem_ending(path) == ".json":
        own = json_tables.own_splits(path)
        there = [s for s in fields.SPLITS if s != "train" and set(fields.names_of(s)) & set(own)]
    splits = ["train"]
    for split in there:
        try:
            find(path, split)
            splits.append(split)
        except check.UserError:
            pass  # files that only sound like it
    return tuple(splits)


def _find_file(path: str, split: str) -> tuple[str, list[str]]:
    """Returns the format of a single file."""
    kind = _kind(path)
    if not storage.exists(path):
        got = "no file" if kind or storage.is_remote(path) else "no such file or directory"
        got = "no regular file" if not storage.is_remote(path) and os.path.exists(path) else got
        raise check.error(path, got, "a directory, a shard or a table", "check the path")
    if not kind:
        got, expected, do = _unread(path)
        raise check.error(path, got, expected, do)
    own_splits = kind == "table" and tables.stem_ending(path) == ".json"  # perhaps: it says so
    if split != "train" and not own_splits and not _is_named(_name(path), split):
        do = f"name it {split}… or give the path of that split"
        raise check.error(f"split {split!r}", f"the one file {path}", "'train'", do)
    if kind == "table":
        _check_local(path)
    return kind, [path]


def _in_directory(
    where: str, entries: list[str], split: str, *, named: bool
) -> tuple[str, list[str]]:
    """Returns the format of a directory, of one split (`named`) or of all."""
    for kind, found in _kinds(where, entries, split):
        if not named:
            found = _of_split(where, kind, found, split)
        if kind in ("table", "folder"):
            _check_local(where)
        if kind == "table" and len(found) > 1:
            got = f"{[_name(f) for f in found]} in {where}"
            raise check.error(f"split {split!r}", got, "one table", "give its path")
        return kind, found
    folders = [e for e in entries if not _name(e).startswith(".") and _is_directory(e)]
    holding = [d for d in folders if any(_kinds(d, _inner(d), split, images=False))]
    data = [d for d in holding if _name(d) == "data"]  # as on the Hugging Face hub
    if len(holding) == 1 or data:
        inner = (data or holding)[0]
        return _in_directory(inner, _inner(inner), split, named=named)
    if holding:
        got = f"shards or tables in {[_name(d) for d in holding][:8]}"
        raise check.error(where, got, "one directory of them", "give its path")
    if folders and not storage.is_remote(where) and files.has_images(where):
        other = [_name(d) for d in folders if any(_is_named(_name(d), s) for s in _rest(split))]
        if not named and (split != "train" or other):
            got = f"none in {where}" + (f", which has {other}" if other else "")
            expected, do = "a sub-directory of that name", "name the split, or give its path"
            raise check.error(f"split {split!r}", got, expected, do)
        return "folder", [where]
    raise _nothing(where, entries)


def _of_split(where: str, kind: str, found: list[str], split: str) -> list[str]:
    """Returns the files whose names contain the split."""
    mine = [f for f in found if kind != "folder" and _is_named(_name(f), split)]
    if starting := [f for f in mine if _is_named(_name(f), split, anywhere=False)]:
        mine = starting
    if mine or kind == "folder" and split == "train":
        return mine or found
    of_others = [f for f in found if any(_is_named(_name(f), s) for s in _rest(split))]
    rest = [f for f in found if f not in of_others]
    if split != "train" or not rest:
        has = f", which has {[_name(f) for f in found][:4]}" if kind != "folder" else ""
        got, do = f"none in {where}{has}", "use 'train' for files without a split's name"
        raise check.error(f"split {split!r}", got, "a sub-directory or files of that name", do)
    return rest


def _rest(split: str) -> list[str]:
    return [s for s in fields.SPLITS if s not in fields.names_of(split)]


def _is_named(name: str, split: str, *, anywhere: bool = True) -> bool:
    """True if a file or directory is called after a split: train-0.tar, captions_val2017.json."""
    begin = "(^|[-_.])" if anywhere else "^"
    return any(
        re.search(rf"{begin}{re.escape(n)}(?![A-Za-z])", name) for n in fields.names_of(split)
    )


def _check_local(path: str) -> None:
    if storage.is_remote(path):
        got, do = "image files in a store", "copy it to a disk first"
        raise check.error(path, got, "records, tars or Parquet", do)


def _kind(path: str) -> str:
    """Returns the format of a file by its extension; "" if unknown."""
    name = path.lower()
    endings = {"tar": (".tar",), "parquet": (".parquet",), "table": tables.ENDINGS}
    return next((k for k, ends in endings.items() if name.endswith(ends)), "")


def _kinds(
    where: str, entries: list[str], split: str, *, images: bool = True
) -> Iterator[tuple[str, list[str]]]:
    """Returns the possible formats of a directory, most specific first, each with its files."""
    local = not storage.is_remote(where)
    # only by name in a store; a FIFO is never opened, since that would block
    entries = [e for e in entries if not _name(e).startswith(".") and (not local or _is_file(e))]
    for kind in ("tar", "parquet"):  # img2dataset writes Parquet sidecars beside tars and folders
        found = [e for e in entries if _kind(e) == kind]
        if kind == "parquet" and local:
            found = [e for e in found if not os.path.isdir(os.path.splitext(e)[0])]
        if found:
            yield kind, found
    has_images = any(e.lower().endswith(files.EXTENSIONS) for e in entries)
    stems = ("metadata", *fields.names_of(split))  # metadata: Hugging Face's imagefolder
    found = [e for e in entries if _kind(e) == "table" and tables.stem(e) in stems]
    if has_images:  # a .json in a folder of images is the text of one
        found = [e for e in found if tables.stem_ending(e) != ".json"]
    if found:
        yield "table", found
    if images and has_images:
        yield "folder", [where]


def _is_file(path: str) -> bool:
    return os.path.isfile(path) or (os.path.islink(path) and not os.path.exists(path))


def _is_directory(path: str) -> bool:
    return os.path.isdir(path) if not storage.is_remote(path) else "." not in _name(path)


def _inner(path: str) -> list[str]:
    try:
        return storage.listing(path)
    except PermissionError:
        return []


def _unread(path: str) -> tuple[str, str, str]:
    """Returns (got, expected, do) for a file that is not a dataset."""
    name = path.lower()
    if packed := next((e for e in PACKED if name.endswith(e)), ""):
        got, expected = (
            f"a packed archive ({packed})",
            "a plain .tar: records are read in any order",
        )
        return got, expected, "unpack it (a .tar.gz: gunzip)"
    ending = os.path.splitext(name)[1]
    expected = f"a directory, .tar, .parquet or one of {list(tables.ENDINGS)}"
    got = "one image" if name.endswith(files.EXTENSIONS) else f"a file ending in {ending!r}"
    return got, expected, "give the directory around it, or write it in one of these"


def _nothing(where: str, entries: list[str]) -> check.UserError:
    """Returns the error for a directory without readable data; it lists the content."""
    found = collections.Counter(
        "directories" if _is_directory(e) else os.path.splitext(e)[1].lower() or "no ending"
        for e in entries
    )
    kinds = ", ".join(f"{n} {k}" for k, n in found.most_common(6)) or "nothing"
    expected = "records, tars, Parquet, images, or a table called metadata or like the split"
    do = "give the path of the file itself, or correct the path"
    if packed := next((e for e in entries if e.lower().endswith(PACKED)), ""):
        do = f"unpack the archives ({_name(packed)}, …) first"
    return check.error(where, f"a directory with {kinds}", expected, do)


def _name(path: str) -> str:
    return path.rstrip("/").rsplit("/", 1)[-1]
