"""An in-memory dataset of coloured shapes with captions, for smoke runs and tests.

A record is a function of its index; train, val and test share no combination of size, colour,
shape, background and place. Records have the fields of records/format.py (captions, label, boxes,
negatives), except that `image` is already decoded: u8[64, 64, 3].
"""

import dataclasses
import functools
import hashlib

import numpy as np

from vlp.core import check
from vlp.data import order, tokenizer

IMAGE_PX = 64
COLORS = {
    "red": (220, 40, 40),
    "green": (40, 160, 60),
    "blue": (50, 80, 220),
    "yellow": (240, 210, 50),
    "purple": (140, 60, 170),
    "orange": (240, 140, 30),
    "black": (20, 20, 20),
    "white": (250, 250, 250),
}
SIZES = {"small": 0.14, "medium": 0.21, "large": 0.28}  # radius as a fraction of the image
PLACES = {
    f"{v} {h}".strip(): (y, x)
    for v, y in (("top", 0.32), ("", 0.5), ("bottom", 0.68))
    for h, x in (("left", 0.32), ("", 0.5), ("right", 0.68))
}
SHAPES = {
    "circle": lambda y, x: y**2 + x**2 <= 1,
    "square": lambda y, x: np.maximum(abs(y), abs(x)) <= 0.85,
    "triangle": lambda y, x: (y <= 0.8) & (abs(x) <= (y + 1) / 1.8),
    "diamond": lambda y, x: abs(y) + abs(x) <= 1,
    "ring": lambda y, x: abs(np.hypot(y, x) - 0.75) <= 0.25,
    "cross": lambda y, x: (np.minimum(abs(y), abs(x)) <= 0.3) & (np.maximum(abs(y), abs(x)) <= 1),
    "bar": lambda y, x: (abs(y) <= 0.35) & (abs(x) <= 1),
}
_RADICES = (len(SIZES), len(COLORS), len(SHAPES), len(COLORS) - 1, len(PLACES))
NUM_COMBINATIONS = int(np.prod(_RADICES))  # 10,584
SPLITS = ("train", "val", "test")  # combination c belongs to val if c % 10 == 8, to test if 9


@dataclasses.dataclass(frozen=True)
class Shapes:
    """`num_records` distinct shapes of one split; a `records.Source`."""

    num_records: int = 512
    split: str = "train"

    def __post_init__(self):
        if self.split not in SPLITS:
            raise check.unknown("split of shapes", self.split, SPLITS)
        if not 1 <= self.num_records <= len(_combinations(self.split)):
            raise check.error(
                "config.data.num_records",
                self.num_records,
                f"1 … {len(_combinations(self.split))} shapes in {self.split!r}",
                "ask for fewer",
            )

    def __len__(self) -> int:
        return self.num_records

    def __getitem__(self, i: int) -> dict:
        if not 0 <= i < self.num_records:
            raise IndexError(f"record {i} of {self.num_records}")
        c = int(_combinations(self.split)[i])
        size, color, shape, ground, place = _names(c)
        where = f" at the {place}" if place else ""
        texts = (
            f"a {size} {color} {shape} on {ground}{where}",
            f"{color} {shape} on a {ground} background",
        )
        captions = [{"text": t, "source": "shapes", "lang": "en"} for t in texts]
        y, x = PLACES[place]
        radius = SIZES[size]
        box = [x - radius, y - radius, x + radius, y + radius]
        other_color = next(c for c in COLORS if c not in (color, ground))
        other_shape = next(s for s in SHAPES if s != shape)
        negatives = (
            f"a {size} {other_color} {shape} on {ground}{where}",
            f"a {size} {color} {other_shape} on {ground}{where}",
        )
        key = f"{size}-{color}-{shape}-{ground}-{place.replace(' ', '_') or 'centre'}"
        return {"key": key, "image": _draw(size, color, shape, ground, place), "captions": captions,
                "label": list(SHAPES).index(shape), "boxes": [{"box": box, "text": f"{color} {shape}"}],
                "negatives": list(negatives), "color": color, "shape": shape}  # fmt: skip

    @property
    def fingerprint(self) -> str:
        """Identifies the keys in their order."""
        text = f"shapes:1:{self.split}:{self.num_records}"
        return hashlib.sha256(text.encode()).hexdigest()

    def tokenizer(self) -> tokenizer.Tokenizer:
        """Returns the tokenizer of the shapes' captions, the same for every split and size."""
        return _tokenizer()


def open_data(data) -> Shapes:
    """Opens what the config section `data` names (see `vlp.data.SOURCES`)."""
    return Shapes(data.num_records, data.split)


@functools.cache
def _combinations(split: str) -> np.ndarray:
    """The combinations of one split in a fixed mixed order, so that a short prefix is varied."""
    mixed = order.record_ids(0, NUM_COMBINATIONS, NUM_COMBINATIONS, seed=0)
    group = np.where(mixed % 10 < 8, 0, mixed % 10 - 7)
    return mixed[group == SPLITS.index(split)]


def _names(c: int) -> tuple[str, str, str, str, str]:
    digits = []
    for radix in _RADICES:
        c, digit = divmod(c, radix)
        digits.append(digit)
    color = list(COLORS)[digits[1]]
    ground = [g for g in COLORS if g != color][digits[3]]
    return list(SIZES)[digits[0]], color, list(SHAPES)[digits[2]], ground, list(PLACES)[digits[4]]


@functools.cache
def _mask(size: str, shape: str, place: str) -> np.ndarray:
    grid = (np.arange(IMAGE_PX) + 0.5) / IMAGE_PX
    y, x = PLACES[place]
    return SHAPES[shape]((grid[:, None] - y) / SIZES[size], (grid[None, :] - x) / SIZES[size])


def _draw(size: str, color: str, shape: str, ground: str, place: str) -> np.ndarray:
    pair = np.array([COLORS[ground], COLORS[color]], np.uint8)
    return pair[_mask(size, shape, place).astype(np.int64)]


@functools.cache
def _tokenizer() -> tokenizer.Tokenizer:
    source = Shapes(1000)
    texts = [c["text"] for i in range(len(source)) for c in source[i]["captions"]]
    return tokenizer.train(texts, 128)
