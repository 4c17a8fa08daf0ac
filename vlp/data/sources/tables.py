"""CSV, TSV, JSONL and JSON tables with the paths of images, as they are or under gzip.

A table's rows are found by byte offset, so it is never held in memory as a whole; a .gz is unpacked
and a .json (COCO's annotations, Karpathy's splits, a list of objects) written as JSONL once, into
the cache. Rows of the same image are one record. Not here: tables in a store.
"""

import array
import base64
import csv
import dataclasses
import functools
import gzip
import hashlib
import io
import json
import logging
import os
import re
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import IO, Any

import numpy as np

from vlp.core import check
from vlp.data import image_ops, storage
from vlp.data import tokenizer as tokenizers
from vlp.data.sources import fields as fields_lib
from vlp.data.sources import rows

TABLES = (".csv", ".tsv", ".jsonl", ".json")
ENDINGS = (*TABLES, ".csv.gz", ".tsv.gz", ".jsonl.gz", ".json.gz")
SEPARATORS = (",", "\t", ";", "|")
MAX_COLUMNS = 4096  # of a JSONL, whose keys may be data
csv.field_size_limit(2**27)
# the end of an image's path, or an address, somewhere in a line
_IMAGE_NAME = re.compile(
    r"\.(jpe?g|jfif|png|webp|gif|bmp|tiff?|avif|heic)[\"\s]*([,\t;|]|$)|://", re.I
)
log = logging.getLogger(__name__)


def stem(path: str) -> str:
    """Returns the name of a table without its ending ("a/train.csv.gz" → "train"); "" if it is none."""
    name = os.path.basename(path)
    ending = max((e for e in ENDINGS if name.lower().endswith(e)), key=len, default="")
    return name[: -len(ending)] if ending else ""


class TableSource:
    """The records of one table, first row the header: a `records.Source`, picklable.

    Image paths are relative to the table's directory. `separator` is the most frequent candidate in
    the header; whether quotes are quoting is what the whole file supports. A JSONL's columns are
    the keys of all of its rows.
    """

    def __init__(
        self,
        path: str,
        *,
        fields: fields_lib.Fields = fields_lib.Fields(),
        split: str = "train",
        root: str = "",
        tokenizer: str = "",
    ):
        self.path, self._given, self._split, self._root = path, fields, split, root
        self._tokenizer = tokenizer
        self._places = _image_places(path)
        self._file, self._text, stamp = _plain_file(path, split)
        self.real_root = os.path.realpath(root or self._places[-1])
        size = os.path.getsize(self._file)
        facts, arrays = rows.cached("table-index", stamp, size, lambda: _index(self._file, path))
        self.columns, self.separator, self.quoted = (
            facts[k] for k in ("columns", "separator", "quoted")
        )
        self.how = f"separator={self.separator!r}" if self.separator else ""
        if facts["quotes"]:
            self.how += " quotes=quoting" if self.quoted else " quotes=text"
        self._offsets, self._lines = arrays["offsets"], arrays["lines"]
        self.fields = fields_lib.sniff(self.columns, fields, where=path)
        if not self.fields.image:
            known = f"a column of image paths such as {list(fields_lib.PATH[:3])}"
            do = "name it with --image; download a list of URLs with img2dataset first"
            raise check.error(path, f"columns {self.columns}", known, do)
        self._groups = None if fields.group is False else self._group(f"{stamp}:{size}", size)
        shown = dataclasses.replace(self.fields, off=(), group=None, allow_outside=False)
        digest = f"table:{facts['digest']}:{shown}:{self._groups is not None}"
        self.fingerprint = hashlib.sha256(digest.encode("utf-8", "surrogatepass")).hexdigest()

    def __reduce__(self):
        make = functools.partial(
            TableSource,
            fields=self._given,
            split=self._split,
            root=self._root,
            tokenizer=self._tokenizer,
        )
        return make, (self.path,)

    def _group(self, what: str, size: int) -> rows.Groups | None:
        def build() -> rows.Index:
            where = os.path.abspath(self._places[-1])
            name = self.fields.image
            digests = (_image_digest(i, row, name, where) for i, row in self._rows())
            return {}, rows.group(digests)

        _, found = rows.cached("table-groups", f"{what}:{self.fields.image}", size, build)
        return rows.Groups(found) if found else None

    def _rows(self) -> Iterator[tuple[int, dict | None]]:
        """Yields the number and columns of every row, None for one that does not parse."""
        with open(self._file, "rb") as f:
            f.seek(int(self._offsets[0]))
            for first in range(0, self.num_rows, 65536):
                sizes = np.diff(self._offsets[first : first + 65537]).tolist()
                for i, size in enumerate(sizes, start=first):
                    try:
                        yield i, self._parsed(f.read(size), i)
                    except ValueError:
                        yield i, None

    @property
    def num_rows(self) -> int:
        """Rows of the table; several of one image are one record."""
        return len(self._offsets) - 1

    def __len__(self) -> int:
        return len(self._groups) if self._groups else self.num_rows

    def row(self, i: int) -> dict:
        """Returns the columns of row i. Raises: ValueError if it does not parse."""
        begin, stop = int(self._offsets[i]), int(self._offsets[i + 1])
        return self._parsed(storage.read(self._file, begin, stop - begin), i)

    def _parsed(self, data: bytes, i: int) -> dict:
        text = data.decode("utf-8" if i else "utf-8-sig")  # of a JSONL; a table has a header first
        if not self.separator:
            return _json_object(text)
        if self.quoted:
            cells = next(csv.reader(io.StringIO(text, newline="\n"), delimiter=self.separator))
        else:
            cells = _line(text.partition("\n")[0]).split(self.separator)  # empty lines may follow
        if len(cells) != len(self.columns):
            raise ValueError(f"{len(cells)} cells under {len(self.columns)} columns")
        return dict(zip(self.columns, cells))

    def place(self, i: int) -> dict:
        """Says where record i begins: {row, file, line}, the row from 0 on, the line from 1 on."""
        return self._place(self._row_numbers(i)[0])

    def _place(self, row: int) -> dict:
        line = {"line": int(self._lines[row])} if self._text else {}  # a .json has no line a row
        return {"row": row, "file": os.path.basename(self.path), **line}

    def _row_numbers(self, i: int) -> list[int]:
        if not 0 <= i < len(self):
            raise IndexError(f"record {i} of {len(self)}")
        return self._groups.rows(i) if self._groups else [i]

    def __getitem__(self, i: int) -> dict:
        return self.read(i)[0]

    def read(self, i: int) -> tuple[dict, fields_lib.Notes]:
        """Returns record i, and what of its rows was left out."""
        notes, numbers = fields_lib.Notes(), self._row_numbers(i)
        make = lambda number: self._record(self.row(number), number, notes)
        record = fields_lib.of_rows(numbers, make, self._place, notes)
        record["image"] = self._image(record.pop("image"), self._place(numbers[0]), record["key"])
        return record, notes

    def _record(self, row: dict, number: int, notes: fields_lib.Notes) -> dict:
        """Returns the record of a row, its image as the row has it."""
        strict = bool(self._given.key)
        made = f"{number:09d}"
        key = fields_lib.key(row, self.fields.key, made, strict=strict, notes=notes)
        parts = fields_lib.parts(row, self.fields, self._given, notes)
        return {"key": key, "image": fields_lib.value(row, self.fields.image), **parts}

    def _image(self, value: Any, place: dict, key: str) -> bytes:
        where = f"row {place['row']}" + (f", line {place['line']}" if "line" in place else "")
        if isinstance(value, dict) and isinstance(value.get("base64"), str):
            try:
                return base64.b64decode("".join(value["base64"].split()), validate=True)
            except ValueError as e:  # signs of no base64 are not skipped
                raise ValueError(f"the image of {where} is no base64 ({e})") from None
        if isinstance(value, dict) and isinstance(value.get("path"), str):
            value = value["path"]  # as Hugging Face writes it
        if not isinstance(value, str) or not value:
            raise image_ops.BadImage("missing", f"{where} names no image", key)
        name = fields_lib.path_text(value, f"the image path of {where}")
        if "://" in name:
            detail = f"{where} has the address {name:.80}: fetch it with img2dataset first"
            raise image_ops.BadImage("missing", detail, key)
        return rows.read_file(
            self._beside(name),
            self.real_root,
            where=f"{where}: {name!r}",
            key=key,
            allow_outside=self.fields.allow_outside,
        )

    def _beside(self, name: str) -> str:
        paths = [os.path.join(place, name) for place in self._places]
        return next((p for p in paths[:-1] if os.path.exists(p)), paths[-1])

    def inputs(self) -> Iterator[str]:
        """Yields the paths of all files behind it: the table, then the image of each record."""
        yield self.path
        for i in range(len(self)):
            try:
                found = fields_lib.value(self.row(self._row_numbers(i)[0]), self.fields.image)
                if not isinstance(found, str) or not found or "://" in found:
                    continue
                path = self._beside(fields_lib.path_text(found, "a path"))
                if self.fields.allow_outside or rows.is_inside(path, self.real_root):
                    yield path
            except ValueError:
                continue

    def tokenizer(self) -> tokenizers.Tokenizer:
        """Returns the tokenizer that lies beside the table."""
        return tokenizers.load(self._tokenizer)


def _image_digest(number: int, row: dict | None, column: str, directory: str) -> bytes:
    """Equal for rows of the same image; a row without one is like no other."""
    found = fields_lib.value(row, column) if row else None
    if isinstance(found, dict):
        found = found.get("base64") or found.get("path")
    if not isinstance(found, str) or not found:
        return rows.digest(f"row\0{number}".encode())
    return rows.digest(rows.same_path(directory, found))


def _line(text: str) -> str:
    """A line without its end."""
    return text.removesuffix("\n").removesuffix("\r")


def _json_object(text: str) -> dict:
    found = fields_lib.parsed(text, f"{text:.40}")
    if not isinstance(found, dict):
        raise ValueError(f"no JSON object: {text:.40}")
    return found


# --- what a file holds


def _index(file: str, path: str) -> rows.Index:
    """Returns {columns, separator, quoted, digest} of a table, and where its rows and lines begin.

    offsets: i64[rows + 1], bytes; lines: i64[rows], from 1 on.
    """
    try:
        separator = "" if stem_ending(file) == ".jsonl" else _separator(path, file)
        found = _delimited(file, path, separator) if separator else _jsonl(file, path)
    except (csv.Error, UnicodeDecodeError) as e:
        do = "save it as UTF-8"
        raise check.error(path, e, "UTF-8 text with lines that end in \\n or \\r\\n", do) from None
    facts, offsets, lines = found
    if len(offsets) < 2:
        raise check.error(path, "no rows", "a header and rows", "check the file")
    arrays = {"offsets": np.array(offsets, np.int64), "lines": np.array(lines, np.int64)}
    return facts | {"separator": separator}, arrays


def stem_ending(path: str) -> str:
    """Returns the ending of a table in lower case, of a packed one without its .gz."""
    return os.path.splitext(path.lower().removesuffix(".gz"))[1]


def _separator(path: str, file: str) -> str:
    with open(file, "rb") as f:
        header = f.readline(2**20).decode("utf-8-sig")
    bare = re.sub('"[^"]*"', "", header)
    found = max(SEPARATORS, key=bare.count)
    if "\r" in _line(header):
        got, do = "lines that end in \\r alone", "save it anew"
        raise check.error(path, got, "UTF-8 text with lines that end in \\n or \\r\\n", do)
    return "\t" if stem_ending(path) == ".tsv" and "\t" in bare else found


@dataclasses.dataclass
class _Reading:
    """One way to read a delimited file: where its rows begin, and how well it fits."""

    columns: list[str] = dataclasses.field(default_factory=list)
    offsets: array.array = dataclasses.field(default_factory=lambda: array.array("q"))
    lines: array.array = dataclasses.field(default_factory=lambda: array.array("q"))
    ragged: int = 0  # rows of another number of cells than the header's
    wrong: str = ""  # why it cannot be read so, with the line

    def add(self, cells: int, begin: int, line: int) -> None:
        self.offsets.append(begin)
        self.lines.append(line)
        self.ragged += cells != len(self.columns)


def _delimited(file: str, path: str, separator: str) -> tuple[dict, array.array, array.array]:
    """Reads a CSV or TSV in one pass in two ways, with quoting and without, and takes what fits."""
    quoted, plain = _Reading(), _Reading()
    digest, at, number = hashlib.sha256(), 0, 0
    # lines with a quote, with two in a row, with a cell in quotes, with such a one that has two in it
    marks = {"any": 0, "pairs": 0, "full": 0, "doubled": 0}
    joined = 0  # the first line on which a quoted row goes on to the next
    open_row = [0, 0]  # lines of the quoted row that is being read, and those that name an image
    joins = {"rows": 0, "cells": 0, "unclear": 0}  # what the lines of joined rows look like

    def lines(f: IO[bytes]) -> Iterator[str]:  # for the reader that quotes; counts for the other
        nonlocal at, number
        for data in f:
            text = data.decode("utf-8", "surrogateescape") if at else data.decode("utf-8-sig")
            begin, at, number = at, at + len(data), number + 1
            digest.update(data)
            marks["any"] += '"' in text
            if bare := _line(text):
                if '"' in bare or number > line:
                    open_row[0] += 1
                    open_row[1] += bool(_IMAGE_NAME.search(bare))
                if not plain.columns:
                    plain.columns = bare.split(separator)
                else:
                    plain.add(bare.count(separator) + 1, begin, number)
                    if '"' in bare:
                        full = [c for c in bare.split(separator) if _is_quoted(c)]
                        marks["full"] += bool(full)
                        marks["doubled"] += any('""' in c[1:-1] for c in full)
                        marks["pairs"] += '""' in bare
            yield text

    with open(file, "rb") as f:
        each = lines(f)
        begin, line = 0, 1
        try:
            for cells in csv.reader(each, delimiter=separator, strict=True):
                if not quoted.columns:
                    quoted.columns = cells
                elif cells:
                    if number > line:
                        joined = joined or line
                        joins[_joins(*open_row)] += 1
                    quoted.add(len(cells), begin, line)
                begin, line, open_row[:] = at, number + 1, (0, 0)
        except csv.Error as e:
            reason = "a quote that is never closed" if "unexpected end" in str(e) else str(e)
            quoted.wrong = f"{reason} (the row on line {line})"
            for _ in each:  # the other way goes on
                pass
    use_quotes = _use_quotes(quoted, plain, marks, joins, joined, is_tsv=separator == "\t")
    if isinstance(use_quotes, str):
        if "new-line" in use_quotes:
            raise csv.Error(use_quotes)
        expected = "quotes in pairs around whole cells, or none that quote"
        raise check.error(path, use_quotes, expected, "close or double the quote")
    found = quoted if use_quotes else plain
    found.columns = [c.strip() for c in found.columns]  # "image| comment", as Flickr30k has it
    if twice := sorted({c for c in found.columns if c and found.columns.count(c) > 1}):
        raise check.error(path, f"columns {twice} twice", "one of each name", "rename them")
    found.offsets.append(at)
    facts = {"columns": found.columns, "quoted": use_quotes, "quotes": marks["any"] > 0}
    facts["digest"] = digest.hexdigest()
    return facts, found.offsets, found.lines


def _joins(num_lines: int, num_named: int) -> str:
    """Says what the lines of one quoted row are: "rows" of their own, each with an image, "cells" of
    one row, with one image, or "unclear"."""
    return {num_lines: "rows", 1: "cells"}.get(num_named, "unclear")


def _use_quotes(
    quoted: _Reading,
    plain: _Reading,
    marks: dict[str, int],
    joins: dict[str, int],
    joined: int,
    *,
    is_tsv: bool,
) -> bool | str:
    """Returns whether a file is read with quoting, or why it cannot be told.

    What reads fewer ragged rows is right. Where quotes join lines and both ways read as well, they
    quote if each joined row names one image, and are text if each of its lines does. Where they
    join none, a CSV quotes, a TSV only if it shows that its writer did: a header in quotes, doubled
    quotes, or quotes on every line.
    """
    header = quoted.columns != plain.columns
    num_joined = sum(joins.values())
    if quoted.wrong:
        are_cells = 0 < num_joined == joins["cells"]
        as_text = not (header or are_cells) and (not marks["full"] or (is_tsv and not plain.ragged))
        return False if as_text else quoted.wrong
    if header:
        return True
    if len(quoted.lines) < len(plain.lines):  # quotes join lines
        if quoted.ragged < plain.ragged or (plain.ragged and quoted.ragged > plain.ragged):
            return quoted.ragged < plain.ragged
        if quoted.ragged == plain.ragged and joins["rows"] < num_joined:
            if joins["cells"] == num_joined:
                return True
            return f"a quote that may join whole lines (the row on line {joined})"
        both = marks["pairs" if is_tsv else "full"]
        return f"a quote that joins whole lines (the row on line {joined})" if both else False
    if quoted.ragged != plain.ragged:
        return quoted.ragged < plain.ragged
    return not is_tsv or bool(marks["doubled"]) or marks["full"] == len(plain.lines) > 0


def _is_quoted(cell: str) -> bool:
    """True for what a writer that quotes makes of a cell."""
    inner = cell[1:-1]
    return len(cell) > 1 and cell[0] == cell[-1] == '"' and '"' not in inner.replace('""', "")


def _jsonl(file: str, path: str) -> tuple[dict, array.array, array.array]:
    """Finds the rows of a JSONL and the keys of all of them, in the order in which they come."""
    columns: dict[str, None] = {}
    offsets, numbers = array.array("q"), array.array("q")
    digest, at, first = hashlib.sha256(), 0, ""
    with open(file, "rb") as f:
        for number, data in enumerate(f, start=1):
            digest.update(data)
            if data.strip():
                offsets.append(at)
                numbers.append(number)
                try:
                    text = data.decode("utf-8" if at else "utf-8-sig")
                    first = first or text.strip()
                    found = _json_object(text)
                    if len(columns) < MAX_COLUMNS:
                        columns |= dict.fromkeys(found)
                except ValueError:
                    first = first or repr(data[:60])  # a bad row: says so when it is read
            at += len(data)
    if offsets and not columns:
        raise check.error(path, f"first line {first:.60}", "a JSON object", "check the file")
    offsets.append(at)
    facts = {"columns": list(columns), "quoted": False, "quotes": False}
    facts["digest"] = digest.hexdigest()
    return facts, offsets, numbers


# --- packed tables and JSON


def _plain_file(path: str, split: str) -> tuple[str, bool, str]:
    """Returns the file of plain rows behind a table, whether its lines are the table's, and a stamp."""
    stamp = f"{os.path.abspath(path)}:{storage.stamp(path)}"
    is_json, packed = stem_ending(path) == ".json", path.lower().endswith(".gz")
    if not is_json and not packed:
        return path, True, stamp
    directory = storage.cache_dir("tables")
    stamp += f":{split if is_json else ''}"
    name = hashlib.sha256(f"1:{stamp}".encode("utf-8", "surrogateescape")).hexdigest()[:32]
    target = os.path.join(directory, name + (".jsonl" if is_json else stem_ending(path)))
    if os.path.isfile(target):
        return target, not is_json, stamp
    part = f"{target}.{os.getpid()}.part"
    opened: Callable[..., Any] = gzip.open if packed else open
    try:
        with opened(path, "rb") as f, open(part, "wb") as out:
            if is_json:
                for row in _json_rows(f, path, split):
                    out.write(json.dumps(row).encode() + b"\n")
            else:
                while data := f.read(2**20):
                    out.write(data)
        os.replace(part, target)
    except (gzip.BadGzipFile, EOFError, zlib.error) as e:
        raise check.error(path, f"damaged gzip ({e})", "a whole file", "copy it again") from None
    finally:
        if os.path.exists(part):
            os.remove(part)
    return target, not is_json, stamp


def _json_rows(file: IO[bytes], path: str, split: str) -> Iterator[dict]:
    """Yields the images of a .json with their captions: COCO's, Karpathy's, or a list of objects."""
    expected = "a list of objects, or COCO's images and annotations"
    try:
        found = fields_lib.parsed(file.read(), os.path.basename(path))
    except ValueError as e:
        do = "name it .jsonl if every line is an object of its own"
        raise check.error(path, f"broken JSON ({e!s:.80})", expected, do) from None
    images = found.get("images") if isinstance(found, dict) else found
    if not isinstance(images, list) or not all(isinstance(x, dict) for x in images):
        got = f"keys {sorted(map(str, found))[:10]}" if isinstance(found, dict) else "no objects"
        raise check.error(path, got, expected, "write one row an image")
    if not images:
        raise check.error(path, "0 images", expected, "check the file")
    if any("sentences" in x and "filename" in x for x in images):  # Karpathy's: has its splits
        yield from _karpathy(images, path, split)
        return
    if isinstance(found, list):
        yield from images
        return
    captions: dict[Any, list] = {}
    categories = _objects(found.get("categories"))
    kinds = {c.get("id"): c.get("name") for c in categories if _is_id(c.get("id"))}
    labels: dict[Any, set] = {}
    bad = 0
    for entry in _objects(found.get("annotations")):
        one, kind = entry.get("image_id"), entry.get("category_id")
        if not _is_id(one) or ("caption" not in entry and not _is_id(kind)):
            bad += "caption" in entry or "category_id" in entry
        elif "caption" in entry:
            captions.setdefault(one, []).append(entry["caption"])
        else:
            name = kinds.get(kind)
            labels.setdefault(one, set()).add(name if name and _is_id(name) else kind)
    if bad:
        log.warning("%s: %d annotations left out: an id that is no number or text", path, bad)
    for image in images:
        one, row = image.get("id"), {}
        known = one if _is_id(one) else None  # of no annotation
        if captions:
            row["captions"] = captions.get(known, [])
        if len(labels.get(known, ())) == 1:  # several: no class of the image
            row["label"] = next(iter(labels[known]))
        elif labels and not captions:
            row["label"] = None
        yield {"id": one, "file_name": image.get("file_name"), **row}


def _is_id(found: Any) -> bool:
    return isinstance(found, (str, int, float))


def _objects(found: Any) -> list[dict]:
    return [x for x in found if isinstance(x, dict)] if isinstance(found, list) else []


def _karpathy(images: Sequence[dict], path: str, split: str) -> Iterator[dict]:
    """Yields the images of one split; "restval" belongs to "train"."""
    wanted = {"train": ("train", "restval"), "validation": ("val",)}.get(split, (split,))
    num = 0
    for image in images:
        if image.get("split", split) in wanted:
            num += 1
            name = image.get("filename")  # without one, a row that names no image
            if name:
                name = os.path.join(str(image.get("filepath") or ""), str(name))
            one = next((image[k] for k in ("cocoid", "imgid") if k in image), name)
            yield {
                "id": one,
                "file_name": name,
                "captions": [s.get("raw") for s in _objects(image.get("sentences"))],
            }
    if not num:
        have = sorted({str(x.get("split")) for x in images})
        raise check.error(f"split {split!r}", f"splits {have} in {path}", "one of them", "name it")


def own_splits(path: str) -> list[str]:
    """Returns the names of the splits that a .json in Karpathy's form has; [] for other tables."""
    if stem_ending(path) != ".json":
        return []
    opened: Callable[..., Any] = gzip.open if path.lower().endswith(".gz") else open
    try:
        with opened(path, "rb") as f:
            found = fields_lib.parsed(f.read(), path)
    except (OSError, EOFError, zlib.error, ValueError):
        return []  # whoever reads its rows says what is wrong
    images = _objects(found.get("images") if isinstance(found, dict) else found)
    return sorted({str(x["split"]) for x in images if {"sentences", "filename", "split"} <= set(x)})


def _image_places(path: str) -> list[str]:
    """Returns the directories to which image paths may be relative, the last one for certain.

    COCO keeps train2017/ beside annotations/captions_train2017.json.
    """
    here = os.path.dirname(path) or "."
    if stem_ending(path) != ".json":
        return [here]
    above = os.path.dirname(os.path.abspath(here))
    base = above if os.path.basename(os.path.abspath(here)) == "annotations" else here
    inner = (stem(path).rsplit("_", 1)[-1], "images")
    return [here, *(os.path.join(base, i) for i in inner), base]
