"""CSV, TSV, JSONL and JSON tables with the paths of images, as they are or under gzip.

A table's rows are found by byte offset, so it is never held in memory as a whole. Rows of the same image are one
record. Not here: what is a row of a file (delimited.py), packed tables and JSON (json_tables.py), tables in a store.
"""

import base64
import csv
import dataclasses
import functools
import hashlib
import io
import os
from collections.abc import Iterator
from typing import Any

import numpy as np

from vlp.core import check
from vlp.data import pictures, storage
from vlp.data import tokenizer as tokenizers
from vlp.data.sources import delimited, rows
from vlp.data.sources import fields as fields_lib
from vlp.data.sources.delimited import stem_ending
from vlp.data.sources.json_tables import plain_file

TABLES = (".csv", ".tsv", ".jsonl", ".json")
ENDINGS = (*TABLES, ".csv.gz", ".tsv.gz", ".jsonl.gz", ".json.gz")


def stem(path: str) -> str:
    """Returns the name of a table without its ending ("a/train.csv.gz" → "train"); "" for another ending."""
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
        self._file, self._text, stamp = plain_file(path, split)
        self.real_root = os.path.realpath(root or self._places[-1])
        size = os.path.getsize(self._file)
        facts, arrays = rows.cached(
            "table-index", stamp, size, lambda: delimited.index(self._file, path)
        )
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
            return delimited.json_object(text)
        if self.quoted:
            cells = next(csv.reader(io.StringIO(text, newline="\n"), delimiter=self.separator))
        else:
            cells = delimited.without_end(text.partition("\n")[0]).split(
                self.separator
            )  # empty lines may follow
        if len(cells) != len(self.columns):
            raise ValueError(f"{len(cells)} cells under {len(self.columns)} columns")
        return dict(zip(self.columns, cells))

    def place(self, i: int) -> dict:
        """Returns the place of record i: {row, file, line}; rows count from 0, lines from 1."""
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
        """Returns record i, and the omitted data of its rows."""
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
                raise ValueError(f"the image of {where} is not base64 ({e})") from None
        if isinstance(value, dict) and isinstance(value.get("path"), str):
            value = value["path"]  # as Hugging Face writes it
        if not isinstance(value, str) or not value:
            raise pictures.BadImage("missing", f"{where} names no image", key)
        name = fields_lib.path_text(value, f"the image path of {where}")
        if "://" in name:
            detail = f"{where} has the address {name:.80}: fetch it with img2dataset first"
            raise pictures.BadImage("missing", detail, key)
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
        """Returns the tokenizer in the folder of the table."""
        return tokenizers.load(self._tokenizer)


def _image_digest(number: int, row: dict | None, column: str, directory: str) -> bytes:
    """Equal for rows of the same image; a row without one is like no other."""
    found = fields_lib.value(row, column) if row else None
    if isinstance(found, dict):
        found = found.get("base64") or found.get("path")
    if not isinstance(found, str) or not found:
        return rows.digest(f"row\0{number}".encode())
    return rows.digest(rows.same_path(directory, found))


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
