"""Finds the byte offsets of the rows of a CSV, TSV or JSONL, and the separator and quoting of a CSV or TSV."""

import array
import csv
import dataclasses
import hashlib
import os
import re
from collections.abc import Iterator
from typing import IO

import numpy as np

from vlp.core import check
from vlp.data.sources import fields as fields_lib
from vlp.data.sources import rows

SEPARATORS = (",", "\t", ";", "|")
MAX_COLUMNS = 4096  # of a JSONL, whose keys may be data
csv.field_size_limit(2**27)
# the end of an image's path, or an address, somewhere in a line
_IMAGE_NAME = re.compile(
    r"\.(jpe?g|jfif|png|webp|gif|bmp|tiff?|avif|heic)[\"\s]*([,\t;|]|$)|://", re.I
)


def without_end(text: str) -> str:
    """A line without its end."""
    return text.removesuffix("\n").removesuffix("\r")


def json_object(text: str) -> dict:
    found = fields_lib.parsed(text, f"{text:.40}")
    if not isinstance(found, dict):
        raise ValueError(f"no JSON object: {text:.40}")
    return found


def index(file: str, path: str) -> rows.Index:
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
    """Returns the extension of a table in lower case, without .gz."""
    return os.path.splitext(path.lower().removesuffix(".gz"))[1]


def _separator(path: str, file: str) -> str:
    with open(file, "rb") as f:
        header = f.readline(2**20).decode("utf-8-sig")
    bare = re.sub('"[^"]*"', "", header)
    found = max(SEPARATORS, key=bare.count)
    if "\r" in without_end(header):
        got, do = "lines that end in \\r without \\n", "save it with \\n"
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
    """Reads a CSV or TSV once, both with quoting and without, and returns the reading that fits."""
    quoted, plain = _Reading(), _Reading()
    digest, at, number = hashlib.sha256(), 0, 0
    # number of lines with a quote, with "", with a quoted cell, with "" in a quoted cell
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
            if bare := without_end(text):
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
    """Classifies the lines of one quoted row: "rows" if each names an image, "cells" if one does, else
    "unclear"."""
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
    """Returns whether a file is read with quoting, or, as text, why both readings are possible.

    The reading with fewer ragged rows wins. If they are equal and quotes join lines: quotes enclose cells if
    each joined row names one image, and are text if each of its lines names one. If quotes join no lines: a CSV
    is quoted; a TSV only with a quoted header, doubled quotes, or quotes on every line.
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
    """Returns whether a cell is in valid quotes."""
    inner = cell[1:-1]
    return len(cell) > 1 and cell[0] == cell[-1] == '"' and '"' not in inner.replace('""', "")


def _jsonl(file: str, path: str) -> tuple[dict, array.array, array.array]:
    """Finds the rows of a JSONL, and all their keys in order of first appearance."""
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
                    found = json_object(text)
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
