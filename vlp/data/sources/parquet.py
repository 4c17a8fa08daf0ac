"""Random access to Parquet files with images or paths of images.

A read loads a whole row group, and a few groups stay in memory. Files with a few hundred images per group are
fast; convert files with one huge group to records. Rows of the same image
are one record.
"""

import bisect
import collections
import functools
import hashlib
import json
import logging
import os
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from vlp.core import check
from vlp.data import pictures, storage
from vlp.data import tokenizer as tokenizers
from vlp.data.sources import fields as fields_lib
from vlp.data.sources import rows

CACHED_GROUPS = 4
HASHED_BYTES = 10**9  # unasked, images are compared in files up to this size (about 1 s per GB)
log = logging.getLogger(__name__)


def open_file(path: str) -> Any:
    """Returns the pyarrow.parquet.ParquetFile of a local or remote path."""
    import pyarrow
    import pyarrow.parquet

    try:
        return pyarrow.parquet.ParquetFile(storage.File(path))
    except pyarrow.ArrowException as e:
        raise check.error(path, f"no Parquet ({e!s:.80})", "a Parquet file", "remove it") from None


def _readable(path: str, read: Any, *args: Any) -> Any:
    import pyarrow

    try:
        return read(*args)
    except (OSError, pyarrow.ArrowException) as e:
        if fault := check.machine(path, e):
            raise fault from None
        raise check.error(
            path, f"damaged pages ({e!s:.80})", "a whole Parquet file", "copy it again"
        ) from None


def _plain_rows(table: Any, keep: str = "") -> list[dict]:
    """Returns the rows of a table; where a text is not UTF-8, texts as bytes, but for the column `keep`."""
    import pyarrow

    def binary(kind: Any) -> Any:
        if pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind):
            return pyarrow.large_binary()
        if pyarrow.types.is_list(kind):
            return pyarrow.list_(binary(kind.value_type))
        if pyarrow.types.is_struct(kind):
            inner = [kind.field(i) for i in range(kind.num_fields)]
            return pyarrow.struct([f.with_type(binary(f.type)) for f in inner])
        return kind

    try:
        return table.to_pylist()
    except UnicodeDecodeError:
        names = [f if f.name == keep else f.with_type(binary(f.type)) for f in table.schema]
        return table.cast(pyarrow.schema(names)).to_pylist()


def _element(kind: Any) -> Any:
    """Returns the type of the elements of (nested) lists, any other type as it is."""
    import pyarrow

    lists = (pyarrow.types.is_list, pyarrow.types.is_large_list, pyarrow.types.is_fixed_size_list)
    while any(is_list(kind) for is_list in lists):
        kind = kind.value_type
    return kind


def _nested(names: Sequence[str], types: Sequence[Any], before: str = "") -> Iterator[str]:
    """Yields the paths of a schema, top columns included; lists are entered, maps left out."""
    import pyarrow

    for name, kind in zip(names, types):
        kind = _element(kind)
        if pyarrow.types.is_map(kind):
            continue
        yield f"{before}{name}"
        if pyarrow.types.is_struct(kind):
            inner = [kind.field(i) for i in range(kind.num_fields)]
            yield from _nested([f.name for f in inner], [f.type for f in inner], f"{before}{name}.")


class ParquetSource:
    """The records of Parquet files, in the order of `files`: a `records.Source`, picklable.

    root: what paths of images may not lead out of; they are relative to their file's directory.
    """

    def __init__(
        self,
        files: Sequence[str],
        *,
        fields: fields_lib.Fields = fields_lib.Fields(),
        root: str = "",
        tokenizer: str = "",
    ):
        self.files, self._given, self._tokenizer = tuple(files), fields, tokenizer
        self._root = root or os.path.dirname(self.files[0])
        self.real_root = os.path.realpath(self._root)
        opened = [open_file(f) for f in self.files]
        schema = opened[0].schema_arrow
        nested = list(_nested(schema.names, schema.types))
        usable = [n for n in schema.names if n in nested]
        for name in (fields.key, fields.image, fields.lang, fields.label, *fields.captions):
            top = fields_lib.column(schema.names, name) if name else ""
            if top and top not in usable:
                do = "write it as separate columns"
                raise check.error(f"{self.files[0]}: column {name!r}", "a map", "values", do)
        self.fields = fields_lib.sniff(usable, fields, where=self.files[0], nested=nested)
        if not self.fields.image:
            raise check.error(
                self.files[0],
                f"columns {schema.names}",
                "a column of images",
                "name it with --image; download a list of URLs with img2dataset first",
            )
        self._classes = _class_names(schema.metadata, self.fields.label)
        self._row_groups: list[tuple[int, int]] = []  # (file, its row group) by global number
        counts: list[int] = []
        digest = hashlib.sha256(b"parquet\0")
        digest.update(json.dumps(self._classes).encode() if self._classes else b"")
        wanted = sorted(self._names(schema.names))
        self._columns = {
            True: wanted,  # with and without the image's
            False: [n for n in wanted if n != fields_lib.column(schema.names, self.fields.image)],
        }
        for number, (path, file) in enumerate(zip(self.files, opened)):
            names = file.schema_arrow.names
            if missing := sorted(set(wanted) - set(names)):
                got = f"columns {names} without {missing}"
                do = "take it away or give it the columns"
                raise check.error(path, got, f"those of {self.files[0]}", do)
            if twice := sorted({n for n in wanted if names.count(n) > 1}):
                raise check.error(path, f"columns {twice} twice", "one of each", "rename them")
            for group in range(file.num_row_groups):
                self._row_groups.append((number, group))
                counts.append(file.metadata.row_group(group).num_rows)
            if self.fields.key in names:
                for row in _plain_rows(_readable(path, file.read, [self.fields.key])):
                    digest.update(f"{row[self.fields.key]}\0".encode("utf-8", "surrogatepass"))
            else:
                name = path.rsplit("/", 1)[-1]
                digest.update(f"{name}:{storage.size(path)}:{file.metadata.num_rows}\0".encode())
        self._ends = np.cumsum(counts, dtype=np.int64).tolist()
        self._file_ends = np.cumsum([f.metadata.num_rows for f in opened]).tolist()
        self._cache: collections.OrderedDict[tuple, list[dict]] = collections.OrderedDict()
        self._lock = threading.Lock()
        self._groups = self._group() if self.num_rows else None
        digest.update(b"grouped" if self._groups else b"")
        self.fingerprint = digest.hexdigest()

    def __reduce__(self):
        make = functools.partial(
            ParquetSource, fields=self._given, root=self._root, tokenizer=self._tokenizer
        )
        return make, (self.files,)

    def _group(self) -> rows.Groups | None:
        """Compares the images of all rows; reads them once, as the result is kept in the cache."""
        asked, remote = self.fields.group, any(map(storage.is_remote, self.files))
        if asked is False or (asked is None and (remote or self.num_bytes > HASHED_BYTES)):
            return None
        what = f"{[(f, storage.stamp(f)) for f in self.files]}:{self.fields.image}"
        build = lambda: ({}, rows.group(self._image_digests()))
        _, found = rows.cached("parquet-groups", what, self.num_bytes, build)
        return rows.Groups(found) if found else None

    def _image_digests(self) -> Iterator[bytes]:
        if self.num_bytes > HASHED_BYTES:
            gb = self.num_bytes / 1e9
            log.warning("comparing the images of %.1f GB of Parquet (once; --no-group)", gb)
        column = [n for n in self._columns[True] if n not in self._columns[False]]
        number = 0
        for group, (file, inner) in enumerate(self._row_groups):
            path = self.files[file]
            try:
                batches = _readable(path, open_file(path).iter_batches, 64, [inner], column)
                while (batch := _readable(path, next, batches, None)) is not None:
                    for row in batch.to_pylist():
                        image = fields_lib.value(row, self.fields.image)
                        yield _image_digest(image, os.path.dirname(path), number)
                        number += 1
            except ValueError:  # damaged: reading such a row raises
                pass
            while number < self._ends[group]:
                yield _image_digest(None, "", number)
                number += 1

    @property
    def num_rows(self) -> int:
        """Rows of all files; several of one image are one record."""
        return self._ends[-1] if self._ends else 0

    def __len__(self) -> int:
        return len(self._groups) if self._groups else self.num_rows

    @property
    def num_bytes(self) -> int:
        """Bytes of the files."""
        return sum(map(storage.size, self.files))

    def _row_numbers(self, i: int) -> list[int]:
        if not 0 <= i < len(self):
            raise IndexError(f"record {i} of {len(self)}")
        return self._groups.rows(i) if self._groups else [i]

    def place(self, i: int) -> dict:
        """Returns the place of record i: {row, file, row_of_file}; rows count from 0."""
        return self._place(self._row_numbers(i)[0])

    def _place(self, row: int) -> dict:
        file, in_file = self._in_file(row)
        return {"row": row, "file": self.files[file].rsplit("/", 1)[-1], "row_of_file": in_file}

    def __getitem__(self, i: int) -> dict:
        return self.read(i)[0]

    def read(self, i: int) -> tuple[dict, fields_lib.Notes]:
        """Returns record i, and the omitted data of its rows."""
        notes, numbers = fields_lib.Notes(), self._row_numbers(i)
        rows = {number: self._row(number, with_image=number == numbers[0]) for number in numbers}
        image = fields_lib.value(rows[numbers[0]], self.fields.image)

        def make(number: int) -> dict:
            row, key, strict = rows[number], self._made_key(number), bool(self._given.key)
            key = fields_lib.key(row, self.fields.key, key, strict=strict, notes=notes)
            return {"key": key, **fields_lib.parts(row, self.fields, self._given, notes)}

        record = fields_lib.of_rows(numbers, make, self._place, notes)
        return record | {"image": self._bytes(image, numbers[0], record["key"])}, notes

    def _bytes(self, value: Any, row: int, key: str) -> bytes:
        name, data = _image(value)
        if data is not None:
            return data
        file, in_file = self._in_file(row)
        where = f"{self.files[file]} row {in_file}"
        if not name or "://" in name or storage.is_remote(self.files[file]):
            detail = f"{where}: {self.fields.image} {value!r:.40}"
            raise pictures.BadImage("missing", detail, key)
        return rows.read_file(
            os.path.join(os.path.dirname(self.files[file]), fields_lib.path_text(name, where)),
            self.real_root,
            where=f"{where}: {name!r}",
            key=key,
            allow_outside=self.fields.allow_outside,
        )

    def _in_file(self, row: int) -> tuple[int, int]:
        """Returns the number of a row's file and the row's number in it."""
        file = bisect.bisect_right(self._file_ends, row)
        return file, row - (self._file_ends[file - 1] if file else 0)

    def _made_key(self, row: int) -> str:
        file, in_file = self._in_file(row)
        stem = self.files[file].rsplit("/", 1)[-1].removesuffix(".parquet")
        return f"{stem}-{in_file:08d}"

    def _names(self, columns: Sequence[str]) -> set[str]:
        """The columns that are read."""
        fields = self.fields
        asked = (fields.key, fields.image, fields.lang, fields.label, *fields.captions)
        return {fields_lib.column(columns, name) for name in asked if name}

    def _row(self, row: int, *, with_image: bool) -> dict:
        """Returns a row; without its image's column, other rows of a group cost little."""
        group = bisect.bisect_right(self._ends, row)
        with_image = with_image or not self._columns[False]
        found = self._rows(group, with_image)
        return found[row - self._ends[group] + len(found)]

    def _rows(self, group: int, with_image: bool) -> list[dict]:
        for key in ((group, True), (group, with_image)):
            with self._lock:
                if key in self._cache:
                    self._cache.move_to_end(key)
                    return self._cache[key]
        file, number = self._row_groups[group]
        path, columns = self.files[file], self._columns[with_image]
        table = _readable(path, open_file(path).read_row_group, number, columns)
        found = _plain_rows(table, keep=fields_lib.column(columns, self.fields.image))
        for row in found if self._classes else ():
            number = row[self.fields.label]
            known = isinstance(number, int) and 0 <= number < len(self._classes)
            row[self.fields.label] = self._classes[number] if known else None  # -1: not labelled
        with self._lock:
            self._cache[group, with_image] = found
            for kind in (True, False):
                held = [k for k in self._cache if k[1] is kind]
                for old in held[: max(len(held) - CACHED_GROUPS, 0)]:
                    del self._cache[old]
        return found

    def inputs(self) -> Sequence[str]:
        """Returns the paths of all files behind it."""
        return self.files

    def tokenizer(self) -> tokenizers.Tokenizer:
        """Returns the tokenizer in the folder of the files."""
        return tokenizers.load(self._tokenizer)


def _class_names(metadata: dict[bytes, bytes] | None, column: str) -> list[str]:
    """The names of a column's classes, which Hugging Face's datasets keep beside their numbers; [] if it has none."""
    try:
        features = json.loads((metadata or {})[b"huggingface"])["info"]["features"]
        names = features[column]["names"] if features[column]["_type"] == "ClassLabel" else []
    except (KeyError, TypeError, ValueError):
        return []
    return names if isinstance(names, list) and all(isinstance(n, str) for n in names) else []


def _image_digest(value: Any, directory: str, row: int) -> bytes:
    """Equal for the same bytes or, of images that are not embedded, the same path; a row without an
    image is like no other."""
    name, data = _image(value)
    if data is None and name:
        return rows.digest(b"path\0" + rows.same_path(directory, name))
    return rows.digest(f"row\0{row}".encode() if data is None else data)


def _image(value: Any) -> tuple[str, bytes | None]:
    """Returns (path, bytes) of an image as Parquet holds it; "" and None where it has none."""
    if isinstance(value, bytes):
        return "", value
    if isinstance(value, str):
        return value, None
    if not isinstance(value, dict):
        return "", None
    data, name = value.get("bytes"), value.get("path")
    return name if isinstance(name, str) else "", data if isinstance(data, bytes) else None
