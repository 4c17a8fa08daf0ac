"""Images as files: a folder with texts beside them, or a CSV, TSV or JSONL table with their paths.

A table's rows are found by byte offset, so it is never held in memory as a whole. An image that is
not there is a `BadImage`, like one that cannot be decoded. Not here: remote folders.
"""

import base64
import csv
import functools
import hashlib
import io
import json
import os
import re
from collections.abc import Iterable, Iterator

import numpy as np

from vlp.core import check
from vlp.data import image_ops, reads
from vlp.data import tokenizer as tokenizers
from vlp.data.sources import fields as fields_lib

TABLES = (".csv", ".tsv", ".jsonl")
EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff")
SEPARATORS = (",", "\t", ";", "|")
csv.field_size_limit(2**27)


class TableSource:
    """The rows of one table, first row the header: a `records.Source`, picklable.

    Image paths are relative to the table's directory. `separator` is the most frequent candidate in
    the header.
    """

    def __init__(
        self, path: str, *, fields: fields_lib.Fields = fields_lib.Fields(), tokenizer: str = ""
    ):
        self.path, self._given, self._tokenizer = path, fields, tokenizer
        self.separator = "" if path.lower().endswith(".jsonl") else _separator(path)
        try:
            self._offsets, self.columns, digest = _row_offsets(path, self.separator)
        except (csv.Error, UnicodeDecodeError) as e:
            wanted = "UTF-8 text with lines that end in \\n or \\r\\n"
            raise check.error(path, e, wanted, "convert it") from None
        self.fields = fields_lib.sniff(self.columns, fields, where=path)
        if not self.fields.image:
            known = f"a column of image paths such as {list(fields_lib.PATH[:3])}"
            do = "name it with --image; download a list of URLs with img2dataset first"
            raise check.error(path, f"columns {self.columns}", known, do)
        self.fingerprint = hashlib.sha256(f"table:{digest}:{self.fields}".encode()).hexdigest()

    def __reduce__(self):
        make = functools.partial(TableSource, fields=self._given, tokenizer=self._tokenizer)
        return make, (self.path,)

    def __len__(self) -> int:
        return len(self._offsets) - 1

    def row(self, i: int) -> dict:
        """Returns the columns of row i. Raises: ValueError if it does not parse."""
        begin, stop = self._offsets[i], self._offsets[i + 1]
        text = reads.read(self.path, int(begin), int(stop - begin)).decode("utf-8-sig")
        if not self.separator:
            row = json.loads(text)
            if not isinstance(row, dict):
                raise ValueError(f"no JSON object: {text:.40}")
            return row
        cells = next(csv.reader(io.StringIO(text, newline="\n"), delimiter=self.separator))
        if len(cells) != len(self.columns):
            raise ValueError(f"{len(cells)} cells under {len(self.columns)} columns")
        return dict(zip(self.columns, cells))

    def __getitem__(self, i: int) -> dict:
        if not 0 <= i < len(self):
            raise IndexError(f"record {i} of {len(self)}")
        row, fields = self.row(i), self.fields
        key = row.get(fields.key) if fields.key else None
        key = str(key) if key is not None else f"{i:09d}"
        value = row.get(fields.image)
        if isinstance(value, dict) and isinstance(value.get("base64"), str):
            image = base64.b64decode(value["base64"])
        elif not isinstance(value, str) or not value:
            raise image_ops.BadImage("missing", f"row {i} names no image", key)
        else:
            image = _image_file(self._beside(value), key)
        return {
            "key": key,
            "image": image,
            "captions": fields_lib.captions(row, fields.captions, fields.lang, fields.default_lang),
            **fields_lib.label(row, fields.label),
        }

    def _beside(self, name: str) -> str:
        return os.path.join(os.path.dirname(self.path), name)

    def inputs(self) -> Iterator[str]:
        """Yields the paths of all files behind it: the table, then the image of each row."""
        yield self.path
        for i in range(len(self)):
            try:
                value = self.row(i).get(self.fields.image)
            except ValueError:
                continue
            if isinstance(value, str) and value:
                yield self._beside(value)

    def tokenizer(self) -> tokenizers.Tokenizer:
        """Returns the tokenizer that lies beside the table."""
        return tokenizers.load(self._tokenizer)


class FolderSource:
    """The images under a folder in path order, each with a .txt or .json beside it.

    The key is the path without its ending; the fingerprint covers names, texts and the images'
    sizes. A .json counts with its caption fields. A text that is not UTF-8, or a .json that does
    not parse, is a bad row (ValueError).
    """

    def __init__(
        self,
        path: str,
        *,
        fields: fields_lib.Fields = fields_lib.Fields(),
        tokenizer: str = "",
        found: tuple[list[str], str] = ([], ""),
    ):
        self.path, self.fields, self._tokenizer = path, fields, tokenizer
        self.files, self.fingerprint = found
        if self.files:  # in a worker, by another process
            return
        self.files = sorted(_images_under(path))
        if not self.files:
            raise check.error(
                path, "no image", f"files ending in {list(EXTENSIONS)}", "check the path"
            )
        digest = hashlib.sha256(b"folder\0")
        for name, (image, *texts) in zip(self.files, _triples(self.inputs())):
            size = os.path.getsize(image) if os.path.isfile(image) else -1
            digest.update(os.fsencode(name) + f"\0{size}\0".encode())
            for text in filter(os.path.isfile, texts):
                with open(text, "rb") as f:
                    digest.update(hashlib.sha256(f.read()).digest())
        self.fingerprint = digest.hexdigest()

    def __reduce__(self):
        found = (self.files, self.fingerprint)
        make = functools.partial(
            FolderSource, fields=self.fields, tokenizer=self._tokenizer, found=found
        )
        return make, (self.path,)

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, i: int) -> dict:
        if not 0 <= i < len(self):
            raise IndexError(f"record {i} of {len(self)}")
        stem = os.path.join(self.path, os.path.splitext(self.files[i])[0])
        row: dict = {}
        if os.path.isfile(f"{stem}.json"):
            with open(f"{stem}.json", encoding="utf-8-sig") as f:
                found = json.load(f)
            row |= found if isinstance(found, dict) else {}
        if os.path.isfile(f"{stem}.txt"):
            with open(f"{stem}.txt", encoding="utf-8-sig") as f:
                row = {"txt": f.read()} | row
        key = _text(os.path.splitext(self.files[i])[0].replace(os.sep, "/"))
        fields, names = self.fields, self.fields.captions or ("txt", *fields_lib.CAPTION)
        return {
            "key": key,
            "image": _image_file(os.path.join(self.path, self.files[i]), key),
            "captions": fields_lib.captions(row, names, fields.lang, fields.default_lang),
            **fields_lib.label(row, fields.label),
        }

    def inputs(self) -> Iterator[str]:
        """Yields the paths of all files behind it, and of those that may come to an image's side."""
        for file in self.files:
            stem = os.path.join(self.path, os.path.splitext(file)[0])
            yield from (os.path.join(self.path, file), f"{stem}.json", f"{stem}.txt")

    def tokenizer(self) -> tokenizers.Tokenizer:
        """Returns the tokenizer that lies in the folder."""
        return tokenizers.load(self._tokenizer)


def _triples(paths: Iterable[str]) -> Iterator[tuple[str, ...]]:
    paths = iter(paths)
    return zip(paths, paths, paths)


def _text(name: str) -> str:
    """A file name as text: bytes that are not UTF-8 as \\xff."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def _image_file(path: str, key: str) -> bytes:
    try:
        with open(path, "rb") as f:
            data = f.read()
    except OSError as e:
        raise image_ops.BadImage("missing", f"{path} ({type(e).__name__})", key) from None
    reads.note(len(data))
    return data


def _images_under(path: str) -> Iterator[str]:
    for directory, folders, files in os.walk(path):
        folders[:] = sorted(f for f in folders if not f.startswith("."))
        for file in files:
            if file.lower().endswith(EXTENSIONS):
                yield os.path.relpath(os.path.join(directory, file), path)


def _separator(path: str) -> str:
    with open(path, encoding="utf-8-sig", errors="replace") as f:
        header = f.readline()
    return max(SEPARATORS, key=re.sub('"[^"]*"', "", header).count)


def _row_offsets(path: str, separator: str) -> tuple[np.ndarray, list[str], str]:
    """Returns i64[rows + 1] byte offsets of the rows, the columns, and a digest of the bytes."""
    digest = hashlib.sha256()
    at = 0

    def lines() -> Iterator[str]:
        nonlocal at
        with open(path, "rb") as f:
            for line in f:
                text = line.decode("utf-8-sig", "replace" if at else "strict")
                at += len(line)
                digest.update(line)
                yield text

    offsets, columns = [], []
    if separator:
        begin = 0
        for cells in csv.reader(lines(), delimiter=separator):
            if not columns:
                columns = cells
                if twice := sorted({c for c in cells if c and cells.count(c) > 1}):
                    raise check.error(
                        path, f"columns {twice} twice", "one of each name", "rename them"
                    )
            elif cells:
                offsets.append(begin)
            begin = at
        if offsets:
            _check_closed(path, separator, offsets[-1])
    else:
        begin = 0
        for line in lines():
            if line.strip():
                offsets.append(begin)
                if not columns:
                    first = _json_object(path, line)
                    columns = list(first)
            begin = at
    if not offsets:
        raise check.error(path, "no rows", "a header and rows", "check the file")
    return np.array([*offsets, at], np.int64), columns, digest.hexdigest()


def _check_closed(path: str, separator: str, begin: int) -> None:
    """Refuses a last row whose quote is never closed: every line after it has become its text."""
    with open(path, "rb") as f:
        f.seek(begin)
        text = f.read().decode("utf-8-sig", "replace")
    try:
        list(csv.reader(io.StringIO(text, newline="\n"), delimiter=separator, strict=True))
    except csv.Error as e:
        if "unexpected end" in str(e):
            got = f"a quote that is never closed after {text.splitlines()[0]:.60}"
            raise check.error(path, got, "quotes in pairs", "close or double it") from None


def _json_object(path: str, line: str) -> dict:
    try:
        found = json.loads(line)
        if isinstance(found, dict):
            return found
    except ValueError:
        pass
    raise check.error(path, f"first line {line.strip():.60}", "a JSON object", "check the file")
