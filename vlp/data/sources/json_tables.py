"""Tables under gzip and .json tables (COCO's annotations, Karpathy's splits, a list of objects) as plain rows.

A .gz is unpacked and a .json written as JSONL once, into the cache.
"""

import gzip
import hashlib
import json
import logging
import os
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import IO, Any

from vlp.core import check
from vlp.data import storage
from vlp.data.sources import fields as fields_lib
from vlp.data.sources.delimited import stem_ending

log = logging.getLogger(__name__)


def plain_file(path: str, split: str) -> tuple[str, bool, str]:
    """Returns the file of plain rows behind a table, whether its lines are the table's, and a stamp."""
    stamp = f"{os.path.abspath(path)}:{storage.stamp(path)}"
    is_json, packed = stem_ending(path) == ".json", path.lower().endswith(".gz")
    if not is_json and not packed:
        return path, True, stamp
    directory = storage.cache_dir("tables")
    stamp += f":{split if is_json else ''}"
    name = hashlib.sha256(f"1:{stamp}".encode("utf-8", "surrogateescape")).hexdigest()[:32]
    target = os.path.join(directory, name + (".jsonl" if is_json else stem_ending(path)))
    if os.path.isfile(target):
        return target, not is_json, stamp
    part = f"{target}.{os.getpid()}.part"
    opened: Callable[..., Any] = gzip.open if packed else open
    try:
        with opened(path, "rb") as f, open(part, "wb") as out:
            if is_json:
                for row in _json_rows(f, path, split):
                    out.write(json.dumps(row).encode() + b"\n")
            else:
                while data := f.read(2**20):
                    out.write(data)
        os.replace(part, target)
    except (gzip.BadGzipFile, EOFError, zlib.error) as e:
        raise check.error(path, f"damaged gzip ({e})", "a whole file", "copy it again") from None
    finally:
        if os.path.exists(part):
            os.remove(part)
    return target, not is_json, stamp


def _json_rows(file: IO[bytes], path: str, split: str) -> Iterator[dict]:
    """Yields the images of a .json with their captions: COCO's, Karpathy's, or a list of objects."""
    expected = "a list of objects, or COCO's images and annotations"
    try:
        found = fields_lib.parsed(file.read(), os.path.basename(path))
    except ValueError as e:
        do = "name it .jsonl if every line is an object"
        raise check.error(path, f"broken JSON ({e!s:.80})", expected, do) from None
    images = found.get("images") if isinstance(found, dict) else found
    if not isinstance(images, list) or not all(isinstance(x, dict) for x in images):
        got = f"keys {sorted(map(str, found))[:10]}" if isinstance(found, dict) else "no objects"
        raise check.error(path, got, expected, "write one row an image")
    if not images:
        raise check.error(path, "0 images", expected, "check the file")
    if any("sentences" in x and "filename" in x for x in images):  # Karpathy's: has its splits
        yield from _karpathy(images, path, split)
        return
    if isinstance(found, list):
        yield from images
        return
    captions: dict[Any, list] = {}
    categories = _objects(found.get("categories"))
    kinds = {c.get("id"): c.get("name") for c in categories if _is_id(c.get("id"))}
    labels: dict[Any, set] = {}
    bad = 0
    for entry in _objects(found.get("annotations")):
        one, kind = entry.get("image_id"), entry.get("category_id")
        if not _is_id(one) or ("caption" not in entry and not _is_id(kind)):
            bad += "caption" in entry or "category_id" in entry
        elif "caption" in entry:
            captions.setdefault(one, []).append(entry["caption"])
        else:
            name = kinds.get(kind)
            labels.setdefault(one, set()).add(name if name and _is_id(name) else kind)
    if bad:
        log.warning("%s: %d annotations left out: the id is neither a number nor text", path, bad)
    for image in images:
        one, row = image.get("id"), {}
        known = one if _is_id(one) else None  # of no annotation
        if captions:
            row["captions"] = captions.get(known, [])
        if len(labels.get(known, ())) == 1:  # several: no class of the image
            row["label"] = next(iter(labels[known]))
        elif labels and not captions:
            row["label"] = None
        yield {"id": one, "file_name": image.get("file_name"), **row}


def _is_id(found: Any) -> bool:
    return isinstance(found, (str, int, float))


def _objects(found: Any) -> list[dict]:
    return [x for x in found if isinstance(x, dict)] if isinstance(found, list) else []


def _karpathy(images: Sequence[dict], path: str, split: str) -> Iterator[dict]:
    """Yields the images of one split; "restval" belongs to "train"."""
    wanted = {"train": ("train", "restval"), "validation": ("val",)}.get(split, (split,))
    num = 0
    for image in images:
        if image.get("split", split) in wanted:
            num += 1
            name = image.get("filename")  # without one, a row that names no image
            if name:
                name = os.path.join(str(image.get("filepath") or ""), str(name))
            one = next((image[k] for k in ("cocoid", "imgid") if k in image), name)
            yield {
                "id": one,
                "file_name": name,
                "captions": [s.get("raw") for s in _objects(image.get("sentences"))],
            }
    if not num:
        have = sorted({str(x.get("split")) for x in images})
        raise check.error(f"split {split!r}", f"splits {have} in {path}", "one of them", "name it")


def own_splits(path: str) -> list[str]:
    """Returns the names of the splits that a .json in Karpathy's form has; [] for other tables."""
    if stem_ending(path) != ".json":
        return []
    opened: Callable[..., Any] = gzip.open if path.lower().endswith(".gz") else open
    try:
        with opened(path, "rb") as f:
            found = fields_lib.parsed(f.read(), path)
    except (OSError, EOFError, zlib.error, ValueError):
        return []  # whoever reads its rows says what is wrong
    images = _objects(found.get("images") if isinstance(found, dict) else found)
    return sorted({str(x["split"]) for x in images if {"sentences", "filename", "split"} <= set(x)})
