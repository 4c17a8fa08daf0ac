"""WebDataset and img2dataset tar shards as random access, through an index built once per file.

A sample is a run of members that share the path up to the first dot of the file name; what follows
the dot is the member's name. Nothing is ever extracted, and a name is never used as a path. Not here: headers
(tar_members.py), the index (tar_index.py), compressed tars (no random access), downloading (img2dataset).
"""

import collections
import dataclasses
import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from vlp.core import check
from vlp.data import index as index_lib
from vlp.data import storage
from vlp.data import tokenizer as tokenizers
from vlp.data.sources import fields as fields_lib
from vlp.data.sources.tar_index import REASONS, TEXTS, Wanted, index

log = logging.getLogger(__name__)


class TarSource:
    """The samples of tar files, in the order of `files`: a `records.Source`, picklable by its index.

    A sample has an image and a caption, a class or both; one with only a class has no captions.
    """

    def __init__(
        self,
        files: Sequence[str],
        *,
        fields: fields_lib.Fields = fields_lib.Fields(),
        strict: bool = False,
        tokenizer: str = "",
    ):
        found = index(files, Wanted.of(fields))
        self._open(found, fields, tokenizer)
        self._check(strict)

    def _open(self, found: index_lib.Index, fields: fields_lib.Fields, tokenizer: str) -> None:
        self._index, self.fields, self._tokenizer = found, fields, tokenizer
        self.fingerprint: str = found.meta["fingerprint"]
        self.counts: dict[str, int] = found.meta["counts"]
        self._names: list[str] = found.meta["names"]
        self._wanted = Wanted.of(fields)
        guess = () if "captions" in fields.off else (*TEXTS, *fields_lib.CAPTION)
        self._columns = tuple(dict.fromkeys(fields.captions or guess))

    def __reduce__(self):
        return _opened, (self._index, self.fields, self._tokenizer)

    def _check(self, strict: bool) -> None:
        counts = {k: n for k, n in self.counts.items() if k != "sidecar"}
        if counts and strict:
            number = int(np.argmax(self._index["left_file_ends"] > 0))
            first = collections.Counter(row["reason"] for row in self._left_out(number))
            good = self._index.part("sample_ends", number)
            got = f"{dict(first)} and {good.stop - good.start} good samples"
            do = "fetch it again, or read it without strict mode"
            raise check.error(self._index.text("file", number), got, "a whole tar", do)
        if counts:
            ends = self._index["left_file_ends"]
            damaged = np.flatnonzero(np.diff(ends, prepend=0))
            more = f" and {len(damaged) - 3} more" if len(damaged) > 3 else ""
            where = ", ".join(self._index.text("file", int(i)) for i in damaged[:3])
            log.warning("left out of tars, by reason: %s (%s%s)", counts, where, more)
        if not len(self):
            image = self.fields.image or "an image"
            text = f"one of {list(self.fields.captions)}" if self.fields.captions else "a caption"
            got, do = f"no sample with {image} and {text} ({counts})", "check the files"
            if seen := list(self._index.meta["seen"]):
                got += f"; members: {seen}"
                do = "name members with --image, --captions; put a sample's together (--sort=name)"
            where = ", ".join(self.files[:3]) + (" …" if len(self.files) > 3 else "")
            raise check.error(where, got, "at least one", do)

    @property
    def files(self) -> tuple[str, ...]:
        """Paths of the tars."""
        return tuple(self._index.texts("file"))

    @property
    def left_out(self) -> Iterator[dict[str, str]]:
        """Yields {file, key, reason} of every member or sample that is no record."""
        for number in range(len(self._index["sample_ends"])):
            yield from self._left_out(number)

    def _left_out(self, number: int) -> Iterator[dict[str, str]]:
        file = self._index.text("file", number).rsplit("/", 1)[-1]
        here = self._index.part("left_file_ends", number)
        for i in range(here.start, here.stop):
            reason = REASONS[self._index["left_reason"][i]]
            yield {"file": file, "key": self._index.text("left", i), "reason": reason}

    def __len__(self) -> int:
        return len(self._index["member_ends"])

    @property
    def num_bytes(self) -> int:
        """Bytes of the files."""
        return sum(map(storage.size, self.files))

    def __getitem__(self, i: int) -> dict:
        return self.read(i)[0]

    def read(self, i: int) -> tuple[dict, fields_lib.Notes]:
        """Returns record i, and what of it was left out."""
        if not 0 <= i < len(self):
            raise IndexError(f"record {i} of {len(self)}")
        found = self._index
        file = found.text("file", int(np.searchsorted(found["sample_ends"], i, side="right")))
        here = found.part("member_ends", i)
        names = [self._names[k] for k in found["member_name"][here].tolist()]
        at, sizes = found["member_at"][here].tolist(), found["member_size"][here].tolist()
        begin = min(at)
        stop = max(o + n for o, n in zip(at, sizes))
        # one ranged read for the whole sample, unless much lies between its members
        if stop - begin <= 2 * sum(sizes) + 2**16:
            data = storage.read(file, begin, stop - begin)
            parts = [data[o - begin : o - begin + n] for o, n in zip(at, sizes)]
        else:
            parts = [storage.read(file, o, n) for o, n in zip(at, sizes)]
        notes = fields_lib.Notes()
        return self._record(found.text("key", i), dict(zip(names, parts)), notes), notes

    def place(self, i: int) -> dict:
        """Says what record i is: {row, file, key}."""
        found = self._index
        file = found.text("file", int(np.searchsorted(found["sample_ends"], i, side="right")))
        return {"row": i, "file": file.rsplit("/", 1)[-1], "key": found.text("key", i)}

    def _record(self, key: str, parts: Mapping[str, bytes], notes: fields_lib.Notes) -> dict:
        given, wanted = self.fields, self._wanted
        image = next(parts[m] for m in wanted.images if m in parts)
        row: dict[str, Any] = {}
        if "json" in parts:
            meta = fields_lib.parsed(parts["json"], f"{key}.json")
            row = meta if isinstance(meta, dict) else {}
        names = (*self._columns, given.key, given.lang, given.label)
        for name in (*names, *fields_lib.LANG, *fields_lib.LABEL):
            if name.lower() in parts and name.lower() not in wanted.images:
                row[name] = parts[name.lower()].decode("utf-8-sig")
        first = lambda part, names: (
            getattr(given, part)
            or ("" if part in given.off else next((n for n in names if n in row), ""))
        )
        label = first("label", fields_lib.LABEL)
        if label.lower() in parts and label not in self._columns:
            text = row[label].strip()
            row[label] = int(text) if text.isdecimal() and len(text) < 19 else text
        found = dataclasses.replace(
            given,
            captions=self._columns,
            lang=first("lang", fields_lib.LANG),
            label=label,
        )
        if given.key:
            key = fields_lib.key(row, given.key, key, strict=True, notes=notes)
        return {"key": key, "image": image, **fields_lib.parts(row, found, given, notes)}

    def inputs(self) -> Sequence[str]:
        """Returns the paths of all files behind it."""
        return self.files

    def tokenizer(self) -> tokenizers.Tokenizer:
        """Returns the tokenizer in the folder of the shards."""
        return tokenizers.load(self._tokenizer)


def _opened(found: index_lib.Index, fields: fields_lib.Fields, tokenizer: str) -> TarSource:
    source = TarSource.__new__(TarSource)
    source._open(found, fields, tokenizer)
    return source
