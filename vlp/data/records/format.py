"""A record as a dict, and its bytes on disk.

  key         str, unique in its split
  image       bytes, an encoded file
  captions    [{text, source, lang, weight}, …], one or more, or none beside a label (classification);
              weight is optional and counts as 1
  boxes       optional [{box: [x0, y0, x1, y1], text}, …]: shares of width and height in [0, 1]
  negatives   optional [str, …]: texts that do not describe the image
  negative_images  optional [bytes, …]: encoded files of images that the captions do not describe
  crops       optional [{box: [x0, y0, x1, y1], flip: bool}, …]: the stored augmentations of the image, in shares of
              its width and height
  embeddings  optional {teacher: f16/f32 array of 1 … 3 axes}, as numpy arrays: of the record, or, with a first axis
              as long as `crops`, of each of them
  label       optional int or str
  weight      optional number from 0 on: of the record in a loss; 1 without
and any extra msgpack-able fields. Not here: shards and manifests.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

import msgpack
import numpy as np

from vlp.core import check


def encode(record: Mapping) -> bytes:
    """Returns the msgpack bytes of a record. Raises: `UserError` naming the field that is wrong."""
    for field in REQUIRED:
        if field not in record:
            raise _bad(record, f"no field {field!r}", f"the fields {list(REQUIRED)}")
    for field, (good, expected) in FIELDS.items():
        if field in record and not good(record[field]):
            got = f"{field} {record[field]!r:.80}"
            raise _bad(record, f"{got} of type {type(record[field]).__name__}", expected)
    for caption in record["captions"]:
        _check_caption(record, caption)
    if not record["captions"] and "label" not in record:
        raise _bad(record, "captions [] and no label", "a list of one or more captions, or a label")
    try:
        packed = msgpack.packb(dict(record), use_bin_type=True, default=_pack_array)
    except (TypeError, ValueError, OverflowError) as e:  # ValueError: a lone surrogate, say
        raise _bad(record, f"a value that cannot be stored ({e})", "msgpack-able values") from None
    assert packed is not None
    return packed


def _check_caption(record: Mapping, caption: object) -> None:
    if not isinstance(caption, Mapping) or not {"text", "source", "lang"} <= set(caption):
        raise _bad(record, f"caption {caption!r:.80}", "{text, source, lang} with optional weight")
    if unknown := sorted(set(caption) - {"text", "source", "lang", "weight"}):
        raise _bad(record, f"caption fields {unknown}", "text, source, lang and optional weight")
    for field in ("text", "source", "lang"):
        if not isinstance(caption[field], str):
            kind = type(caption[field]).__name__
            raise _bad(record, f"caption {field} {caption[field]!r:.80} of type {kind}", "a string")
    weight = caption.get("weight", 1.0)
    if not _is_number(weight) or weight <= 0:
        raise _bad(record, f"caption weight {weight!r:.80}", "a finite number above 0")


def _bad(record: Mapping, got: str, expected: str) -> check.UserError:
    return check.error(f"record {record.get('key')!r:.80}", got, expected, "fix the converter")


def _is_number(x: object) -> bool:
    return isinstance(x, (int, float)) and not isinstance(x, bool) and math.isfinite(x)


def _is_box(entry: object) -> bool:
    if not isinstance(entry, Mapping) or set(entry) != {"box", "text"}:
        return False
    box, text = entry["box"], entry["text"]
    if not isinstance(text, str) or not isinstance(box, (list, tuple)) or len(box) != 4:
        return False
    x0, y0, x1, y1 = box
    return all(map(_is_number, box)) and 0 <= x0 <= x1 <= 1 and 0 <= y0 <= y1 <= 1


def _is_crop(entry: object) -> bool:
    if not isinstance(entry, Mapping) or set(entry) != {"box", "flip"}:
        return False
    box, flip = entry["box"], entry["flip"]
    good = isinstance(flip, bool) and _is_box({"box": box, "text": ""})
    return good and box[0] < box[2] and box[1] < box[3]


def _is_embedding(x: object) -> bool:
    return isinstance(x, np.ndarray) and x.dtype in (np.float16, np.float32) and 1 <= x.ndim <= 3


REQUIRED = ("key", "image", "captions")
FIELDS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "key": (lambda x: isinstance(x, str) and x != "", "a string that is not empty"),
    "image": (lambda x: isinstance(x, bytes), "the bytes of an image file"),
    "captions": (lambda x: isinstance(x, list), "a list of one or more captions"),
    "boxes": (
        lambda x: isinstance(x, list) and all(map(_is_box, x)),
        "a list of {box: [x0, y0, x1, y1] in [0, 1], text}",
    ),
    "negatives": (
        lambda x: isinstance(x, list) and all(isinstance(t, str) for t in x),
        "a list of strings",
    ),
    "negative_images": (
        lambda x: isinstance(x, list) and all(isinstance(b, bytes) for b in x),
        "a list of the bytes of image files",
    ),
    "crops": (
        lambda x: isinstance(x, list) and len(x) > 0 and all(map(_is_crop, x)),
        "a list of {box: [x0, y0, x1, y1] in [0, 1] with x0 < x1 and y0 < y1, flip: bool}",
    ),
    "weight": (lambda x: _is_number(x) and x >= 0, "a finite number from 0 on"),
    "embeddings": (
        lambda x: (
            isinstance(x, dict)
            and all(isinstance(k, str) and _is_embedding(v) for k, v in x.items())
        ),
        "{teacher: float16 or float32 array of one to three axes}",
    ),
    "label": (
        lambda x: isinstance(x, (int, str)) and not isinstance(x, bool),
        "an integer or a string",
    ),
}
_ARRAY = 1  # msgpack extension: (dtype, shape, bytes) of a numpy array, little endian


def _pack_array(x: object) -> msgpack.ExtType:
    if not isinstance(x, np.ndarray) or x.dtype.kind not in "biuf":
        raise TypeError(f"{type(x).__name__} {x!r:.40}")
    little = np.ascontiguousarray(x, x.dtype.newbyteorder("<"))
    data = msgpack.packb((little.dtype.str, x.shape, little.tobytes()), use_bin_type=True)
    assert data is not None
    return msgpack.ExtType(_ARRAY, data)


def _unpack_array(code: int, data: bytes) -> np.ndarray | msgpack.ExtType:
    if code != _ARRAY:
        return msgpack.ExtType(code, data)
    dtype, shape, raw = msgpack.unpackb(data, raw=False)
    return np.frombuffer(raw, dtype).reshape(shape)


def decode(data: bytes) -> dict:
    """Returns the record that `encode` packed."""
    return msgpack.unpackb(data, raw=False, ext_hook=_unpack_array)
