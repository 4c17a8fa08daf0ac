"""What a converted dataset needs before it can be trained on: a split `val`, and a tokenizer.

val: whole images, those with the smallest digests. So neither the order nor the names of rows
matter, and copies of one image are never on both sides. The tokenizer: byte-pair encoding of the
training captions, as large as they can fill. Not here: reading and writing (convert.py).
"""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from vlp.core import check
from vlp.data import storage
from vlp.data import tokenizer as tokenizers
from vlp.data.sources import fields

NO_IMAGE = np.uint64(2**64 - 1)  # the digest of a row that cannot be held out
MAX_PIECES = 16_000
CHARS_PER_PIECE = 50  # about nine words: 300 short captions make 300 pieces, 20,000 the largest
MAX_RECORDS = 200_000  # whose captions are looked at, evenly spaced (seconds of training)
AUTO = "auto"  # the input's tokenizer, or else a trained one of automatic size


class Subset:
    """The records `rows` (sorted i64) of a source; with `others`, all but these."""

    def __init__(self, source: Any, rows: np.ndarray, *, others: bool = False):
        self.source, self.rows, self.others = source, rows, others
        text = f"{source.fingerprint}:{others}:{hashlib.sha256(rows.tobytes()).hexdigest()}"
        self.fingerprint = hashlib.sha256(text.encode()).hexdigest()
        self.fields = getattr(source, "fields", fields.Fields())
        self._before = rows - np.arange(len(rows))  # of the others: how many come before each row

    def __len__(self) -> int:
        return len(self.source) - len(self.rows) if self.others else len(self.rows)

    def row(self, i: int) -> int:
        """The number in the whole source of record i."""
        if not 0 <= i < len(self):
            raise IndexError(f"record {i} of {len(self)}")
        if not self.others:
            return int(self.rows[i])
        return i + int(np.searchsorted(self._before, i, side="right"))

    def __getitem__(self, i: int) -> dict:
        return self.source[self.row(i)]

    def read(self, i: int) -> tuple[dict, fields.Notes]:
        """Returns record i and what of it was left out."""
        read = getattr(self.source, "read", None)
        return read(self.row(i)) if read else (self[i], fields.Notes())

    def place(self, i: int) -> dict:
        """Says where record i comes from."""
        place = getattr(self.source, "place", None)
        return {"row": self.row(i)} | (place(self.row(i)) if place else {})

    def tokenizer(self) -> tokenizers.Tokenizer:
        """Returns the source's tokenizer."""
        return self.source.tokenizer()


def digest(image: bytes) -> int:
    """The first 64 bits of an image's SHA-256; below `NO_IMAGE`."""
    return min(int.from_bytes(hashlib.sha256(image).digest()[:8], "big"), int(NO_IMAGE) - 1)


def hold_out(blocks: Iterable[np.ndarray], frac: float) -> np.ndarray:
    """Returns i64, the rows to hold out: images with the smallest digests, up to `frac` of the rows.

    blocks: u64, the digests of all rows in order; gone through several times, one by one, as memory
    may not hold them all. Every copy of an image is held out with it. Of two different images or
    more, at least one is held out and one is left; of fewer, none is held out.
    """
    usable = sum(int((block != NO_IMAGE).sum()) for block in blocks)
    wanted = max(1, round(frac * usable))
    least, copies = np.empty(0, np.uint64), np.empty(0, np.int64)
    for block in blocks:
        values, counts = np.unique(block[block != NO_IMAGE], return_counts=True)
        least, inverse = np.unique(np.concatenate([least, values]), return_inverse=True)
        copies = np.bincount(inverse, np.concatenate([copies, counts]), len(least))
        copies = copies.astype(np.int64)
        least, copies = least[: wanted + 1], copies[: wanted + 1]
    chosen, total = [], 0
    for value, count in zip(least[: len(least) - (len(least) <= wanted)], copies):
        if total + count <= wanted:  # images with more copies stay in train
            chosen.append(value)
            total += int(count)
    if not chosen and len(least) > 1:
        chosen = [least[0]]
    held = [np.flatnonzero(np.isin(block, np.array(chosen, np.uint64))) for block in blocks]
    starts = np.cumsum([0, *map(len, blocks)])
    return np.concatenate([at + start for at, start in zip(held, starts)]).astype(np.int64)


class Blocks:
    """The arrays in some .npy files, each read when its turn comes."""

    def __init__(self, paths: Sequence[str]):
        self.paths = paths

    def __iter__(self) -> Iterator[np.ndarray]:
        return (np.load(path) for path in self.paths)


def given_tokenizer(wanted: str, beside: str) -> tokenizers.Tokenizer | None:
    """Returns an existing tokenizer: the file `wanted`, or the input's own (`beside`) for AUTO.

    None if one must be trained, or `wanted` is "". Raises: `UserError` if the file is not a tokenizer.
    """
    if wanted == AUTO:
        return tokenizers.load(beside) if storage.exists(beside) else None
    if not wanted or wanted.isdecimal() and 0 < int(wanted) < 2**31:
        return None
    if wanted.isdecimal():
        raise check.error(
            "--tokenizer", f"{wanted!r:.42}", "1 to 2^31 - 1 pieces", "give another number"
        )
    if not storage.exists(wanted):
        do = "train one with `vlp data tokenizer`, or correct the path"
        got = f"{wanted!r}, which is not a file"
        raise check.error("--tokenizer", got, "a number of pieces, a file, or ''", do)
    return tokenizers.load(wanted)


def step(num_records: int) -> int:
    """How many records apart those are whose captions a tokenizer is trained on."""
    return max(1, -(-num_records // MAX_RECORDS))


def train_tokenizer(texts: Iterable[str], wanted: str) -> tokenizers.Tokenizer | None:
    """Trains a tokenizer with about `wanted` pieces, or, for AUTO, with as many as the texts allow.

    Special tokens and every character of the texts are always pieces. None if there are no texts, only labels.
    """
    texts = list(_visible(texts))
    if not texts:
        return None
    least = len({c for text in texts for c in text.casefold()}) + 8
    fill = min(MAX_PIECES, sum(map(len, texts)) // CHARS_PER_PIECE)
    size = least + fill if wanted == AUTO else max(int(wanted), least)
    return tokenizers.train(texts, size)


def _visible(texts: Iterable[str]) -> Iterator[str]:
    return (text for text in texts if text.strip())
