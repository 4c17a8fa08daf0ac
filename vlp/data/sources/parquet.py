"""Parquet files with embedded images as random access.

The unit of reading is a row group, of which a few stay in memory: files with row groups of some
hundred images read well, files with one huge group are better converted (`vlp data convert`).
"""

import bisect
import collections
import functools
import hashlib
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np

from vlp.core import check
from vlp.data import image_ops, reads
from vlp.data import tokenizer as tokenizers
from vlp.data.sources import fields as fields_lib

CACHED_GROUPS = 4


def open_file(path: str) -> Any:
    """Returns the pyarrow.parquet.ParquetFile of a local or remote path."""
    import pyarrow
    import pyarrow.parquet

    try:
        return pyarrow.parquet.ParquetFile(reads.File(path))
    except pyarrow.ArrowException as e:
        raise check.error(path, f"no Parquet ({e!s:.80})", "a Parquet file", "remove it") from None


def _readable(path: str, read: Any, *args: Any) -> Any:
    import pyarrow

    try:
        return read(*args)
    except (OSError, pyarrow.ArrowException) as e:
        raise check.error(
            path, f"damaged pages ({e!s:.80})", "a whole Parquet file", "copy it again"
        ) from None


class ParquetSource:
    """The rows of Parquet files, in the order of `files`: a `records.Source`, picklable."""

    def __init__(
        self,
        files: Sequence[str],
        *,
        fields: fields_lib.Fields = fields_lib.Fields(),
        tokenizer: str = "",
    ):
        self.files, self._given, self._tokenizer = tuple(files), fields, tokenizer
        opened = [open_file(f) for f in self.files]
        self.fields = fields_lib.sniff(
            opened[0].schema_arrow.names, fields, where=f"{self.files[0]}"
        )
        if not self.fields.image:
            raise check.error(
                self.files[0],
                f"columns {opened[0].schema_arrow.names}",
                "a column of images",
                "name it with --image",
            )
        self._groups: list[tuple[int, int]] = []  # (file, its row group) by global number
        counts: list[int] = []
        digest = hashlib.sha256(b"parquet\0")
        wanted = {n for n in self._names() if n}
        for number, (path, file) in enumerate(zip(self.files, opened)):
            if missing := sorted(wanted - set(file.schema_arrow.names)):
                got = f"columns {file.schema_arrow.names} without {missing}"
                do = "take it away or give it the columns"
                raise check.error(path, got, f"those of {self.files[0]}", do)
            for group in range(file.num_row_groups):
                self._groups.append((number, group))
                counts.append(file.metadata.row_group(group).num_rows)
            if self.fields.key:
                for value in _readable(path, file.read, [self.fields.key]).column(0).to_pylist():
                    digest.update(f"{value}\0".encode())
            else:
                name = path.rsplit("/", 1)[-1]
                digest.update(f"{name}:{reads.size(path)}:{file.metadata.num_rows}\0".encode())
        self.fingerprint = digest.hexdigest()
        self._ends = np.cumsum(counts, dtype=np.int64).tolist()
        self._cache: collections.OrderedDict[int, list[dict]] = collections.OrderedDict()
        self._lock = threading.Lock()

    def __reduce__(self):
        make = functools.partial(ParquetSource, fields=self._given, tokenizer=self._tokenizer)
        return make, (self.files,)

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    @property
    def num_bytes(self) -> int:
        """Bytes of the files."""
        return sum(map(reads.size, self.files))

    def __getitem__(self, i: int) -> dict:
        if not 0 <= i < len(self):
            raise IndexError(f"record {i} of {len(self)}")
        group = bisect.bisect_right(self._ends, i)
        rows = self._rows(group)
        local = i - self._ends[group] + len(rows)
        row, fields = rows[local], self.fields
        key = str(row[fields.key]) if fields.key else self._made_key(group, local)
        image = row[fields.image]
        image = image.get("bytes") if isinstance(image, dict) else image
        if not isinstance(image, bytes):
            where = f"{self.files[self._groups[group][0]]} row {local} of row group {group}"
            raise image_ops.BadImage("missing", f"{where}: {fields.image} {image!r:.40}", key)
        return {
            "key": key,
            "image": image,
            "captions": fields_lib.captions(row, fields.captions, fields.lang, fields.default_lang),
            **fields_lib.label(row, fields.label),
        }

    def _made_key(self, group: int, local: int) -> str:
        file, _ = self._groups[group]
        first = next(g for g, (f, _) in enumerate(self._groups) if f == file)
        before = self._ends[group - 1] if group else 0
        start = self._ends[first - 1] if first else 0
        stem = self.files[file].rsplit("/", 1)[-1].removesuffix(".parquet")
        return f"{stem}-{before - start + local:08d}"

    def _names(self) -> tuple[str, ...]:
        fields = self.fields
        return (fields.key, fields.image, fields.lang, fields.label, *fields.captions)

    def _rows(self, group: int) -> list[dict]:
        with self._lock:
            if group in self._cache:
                self._cache.move_to_end(group)
                return self._cache[group]
        file, number = self._groups[group]
        columns, path = [n for n in self._names() if n], self.files[file]
        rows = _readable(path, open_file(path).read_row_group, number, columns).to_pylist()
        with self._lock:
            self._cache[group] = rows
            while len(self._cache) > CACHED_GROUPS:
                self._cache.popitem(last=False)
        return rows

    def inputs(self) -> Sequence[str]:
        """Returns the paths of all files behind it."""
        return self.files

    def tokenizer(self) -> tokenizers.Tokenizer:
        """Returns the tokenizer that lies beside the files."""
        return tokenizers.load(self._tokenizer)
