"""A zoo of broken records: counted by reason, replaced by a fixed rule, and nothing else changes."""

import collections
import dataclasses
import hashlib
import io
import json
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from vlp.core import check
from vlp.core.appended import Appended
from vlp.data import order, quarantine
from vlp.data.config import Data
from vlp.data.dataset import Dataset
from vlp.data.sources.combined import without

PIXELS = np.random.default_rng(0).integers(0, 256, (40, 56, 3), dtype=np.uint8)


def encoded(kind, pixels=PIXELS, **options):
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, kind, **options)
    return out.getvalue()


def huge_png(width, height):
    """A valid PNG header of many pixels, with hardly any data behind it."""
    chunk = lambda name, body: (
        struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
    )
    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    rows = chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + rows


JPEG, PNG = encoded("JPEG"), encoded("PNG")
WEBP, GIF = encoded("WEBP"), encoded("GIF")
TIFF, BMP = encoded("TIFF"), encoded("BMP")
FLIPPED = bytearray(PNG)
FLIPPED[len(PNG) // 2] ^= 0xFF

CAPTION = {"text": "a red cat", "source": "t", "lang": "en"}
GOOD = {"image": JPEG, "captions": [CAPTION]}
ZOO = {  # name → what is wrong with the record, and the reason counted
    "no bytes": ({"image": b""}, "empty"),
    "zeros": ({"image": bytes(500)}, "empty"),
    "html": ({"image": b"<!DOCTYPE html><html>404</html>"}, "not_an_image"),
    "json": ({"image": b'{"error": "rate limited"}'}, "not_an_image"),
    "text": ({"image": b"not found"}, "not_an_image"),
    "svg": ({"image": b'<svg xmlns="http://www.w3.org/2000/svg"/>'}, "not_an_image"),
    "postscript": ({"image": b"%!PS-Adobe-3.0 EPSF-3.0\n"}, "not_an_image"),
    "pdf": ({"image": b"%PDF-1.4\n"}, "not_an_image"),
    "zip": ({"image": b"PK\x03\x04" + bytes(40)}, "not_an_image"),
    "half a jpeg": ({"image": JPEG[: len(JPEG) // 2]}, "truncated"),
    "jpeg head": ({"image": JPEG[:4]}, "truncated"),
    "half a png": ({"image": PNG[: len(PNG) // 2]}, "truncated"),
    "png signature": ({"image": PNG[:8]}, "truncated"),
    "half a webp": ({"image": WEBP[: len(WEBP) // 2]}, "corrupt"),
    "half a gif": ({"image": GIF[: len(GIF) // 2]}, "truncated"),
    "half a tiff": ({"image": TIFF[: len(TIFF) // 2]}, "truncated"),
    "half a bmp": ({"image": BMP[: len(BMP) // 2]}, "truncated"),
    "wrong crc": ({"image": bytes(FLIPPED)}, "corrupt"),
    "bomb": ({"image": huge_png(60_000, 60_000)}, "too_large"),
    "over the limit": ({"image": huge_png(12_000, 12_000)}, "too_large"),
    "short png": ({"image": huge_png(3_000, 3_000)}, "truncated"),
    "no image": ({"image": None}, "unreadable"),
    "image is text": ({"image": "cat.jpg"}, "unreadable"),
    "captions none": ({"captions": None}, "bad_caption"),
    "captions a text": ({"captions": "a cat"}, "bad_caption"),
    "caption a number": ({"captions": [{"text": 3, "lang": "en"}]}, "bad_caption"),
    "caption bare": ({"captions": ["a cat"]}, "bad_caption"),
    "weight nan": ({"captions": [CAPTION | {"weight": float("nan")}]}, "bad_caption"),
    "no captions": ({"captions": []}, "no_caption"),
    "blank": ({"captions": [CAPTION | {"text": "  "}]}, "no_caption"),
    "zero width": ({"captions": [CAPTION | {"text": "\u200b\ufeff"}]}, "no_caption"),
    "no-break spaces": ({"captions": [CAPTION | {"text": "\xa0\u2007"}]}, "no_caption"),
    "fillers": ({"captions": [CAPTION | {"text": "\u3164"}]}, "no_caption"),
    "controls": ({"captions": [CAPTION | {"text": "\0\x07\x7f"}]}, "no_caption"),
    "selectors": ({"captions": [CAPTION | {"text": "\ufe0f\ufe0e"}]}, "no_caption"),
    "lone surrogate": ({"captions": [CAPTION | {"text": "a cat \udcff"}]}, "bad_caption"),
    "other language": ({"captions": [CAPTION | {"lang": "de"}]}, "no_caption"),
    "raises": ("an error of the source", "unreadable"),
}
NUM = 4 * len(ZOO)
DATA = Data(
    langs=("en",),
    image_px=16,
    text_len=8,
    bad_records="replace",
    max_bad_frac=1.0,
    flip=True,
    read_threads=0,
)


class Listed:
    """Records from a list; the zoo stands at every fourth place."""

    def __init__(self, tokenizer, spoiled):
        self._tokenizer, self.spoiled = tokenizer, spoiled
        self.fingerprint = hashlib.sha256(b"listed").hexdigest()

    def __len__(self):
        return NUM

    def __getitem__(self, i):
        pixels = np.roll(PIXELS, int(i), 1)
        record = {"key": f"k{i:03d}", "captions": [CAPTION], "image": encoded("JPEG", pixels)}
        if self.spoiled and i % 4 == 1:
            change = list(ZOO.values())[i // 4][0]
            if isinstance(change, str):
                raise OSError(change)
            record |= change
        return record

    def tokenizer(self):
        return self._tokenizer


def read(dataset, epochs=2, **options):
    batches = dataset.train_iter(
        start=0, batch=16, num_batches=NUM * epochs // 16, seed=3, **options
    )
    batches = list(batches)
    return {k: np.concatenate([b[k] for b in batches]) for k in batches[0]}


@pytest.mark.filterwarnings("default::PIL.Image.DecompressionBombWarning")
def test_the_zoo_is_counted_and_changes_nothing_else(small_tokenizer, tmp_path):
    spoiled = Dataset(DATA, Listed(small_tokenizer, True), small_tokenizer)
    clean = Dataset(DATA, Listed(small_tokenizer, False), small_tokenizer)
    found, wanted = read(spoiled, quarantine=Appended(tmp_path / "q.jsonl")), read(clean)
    ids = order.record_ids(0, 2 * NUM, NUM, 3)
    bad = ids % 4 == 1
    for name in found:
        np.testing.assert_array_equal(found[name][~bad], wanted[name][~bad], err_msg=name)
    used = order.join_words(found["record"])
    assert (used[bad] % 4 != 1).all() and (used[~bad] == ids[~bad]).all()
    np.testing.assert_array_equal(found["image"], read(spoiled)["image"])  # the same again
    for place in np.flatnonzero(bad)[:5]:  # and at the same place of the stream alone
        alone = spoiled.batch_at(int(place), 1, 3)
        np.testing.assert_array_equal(alone["image"][0], found["image"][place])

    rows = [json.loads(line) for line in (tmp_path / "q.jsonl").read_text().splitlines()]
    assert sorted(r["record"] for r in rows) == list(range(1, NUM, 4))
    reason = {r["record"]: r["reason"] for r in rows}
    for i, (name, (_, expected)) in enumerate(ZOO.items()):
        got = reason[4 * i + 1]
        assert got == expected or (expected is None and got in ("truncated", "corrupt")), (
            name,
            got,
        )
    counts = collections.Counter(reason.values())
    assert spoiled.loader_stats.bad == {
        k: 4 * n for k, n in counts.items()
    }  # two epochs, read twice

    skipping = without(Listed(small_tokenizer, True), str(tmp_path / "q.jsonl"))
    rest = Dataset(DATA, skipping, small_tokenizer)
    assert len(skipping) == NUM - len(ZOO) and skipping.fingerprint != clean.fingerprint
    batches = list(rest.train_iter(start=0, batch=4, num_batches=len(skipping) // 4, seed=0))
    assert len(batches) == len(skipping) // 4 and not rest.loader_stats.bad
    assert [skipping[i]["key"] for i in range(4)] == ["k000", "k002", "k003", "k004"]


@pytest.mark.filterwarnings("default::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("name", list(ZOO))
def test_strict_mode_names_the_record(small_tokenizer, name):
    strict = dataclasses.replace(DATA, bad_records="error", shuffle=False)
    dataset = Dataset(strict, Listed(small_tokenizer, True), small_tokenizer)
    i = 4 * list(ZOO).index(name) + 1
    dataset.batch_at(i - 1, 1, 0)
    with pytest.raises(check.UserError, match=f"k{i:03d}|record {i} "):
        dataset.batch_at(i, 1, 0)


@pytest.mark.filterwarnings("default::PIL.Image.DecompressionBombWarning")
def test_the_run_stops_above_the_set_fraction(small_tokenizer, monkeypatch):
    monkeypatch.setattr(quarantine, "MIN_SEEN", 16)
    few = dataclasses.replace(DATA, max_bad_frac=0.1)
    dataset = Dataset(few, Listed(small_tokenizer, True), small_tokenizer)
    with pytest.raises(check.UserError, match=r"bad records of .*\(k\d+.*max_bad_frac = 0.1"):
        read(dataset)
    assert 0.1 < dataset.loader_stats.bad.total() / dataset.loader_stats.seen


def test_a_skip_file_of_other_data_is_refused(small_tokenizer, tmp_path):
    source = Listed(small_tokenizer, False)
    (tmp_path / "q").write_text(json.dumps({"record": 1, "fingerprint": "other"}) + "\n")
    with pytest.raises(check.UserError, match="no line of 1 about this data"):
        without(source, str(tmp_path / "q"))
    with pytest.raises(check.UserError, match="not a file"):
        without(source, str(tmp_path / "none"))
