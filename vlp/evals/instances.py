"""Benchmarks of compositional pairs as they are published: which caption fits an image, or which image a caption.

An instance has some images and some texts; text k is right for image k, and texts beyond the images are wrong for all.
Read are the JSON files of SugarCrepe, ARO (VG relation and attribution), VL-CheckList and Winoground, and rows
{"image": path, "captions": [right, wrong, …]} (as for ARO's order tasks), also as JSONL.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from vlp.core import check
from vlp.data import pictures

ENDINGS = ("", ".png", ".jpg", ".jpeg", ".webp")  # Winoground names images without one


@dataclasses.dataclass(frozen=True)
class Region:
    """An image file, or its part `box`: left, top, width, height in pixels."""

    path: str
    box: tuple[float, float, float, float] | None = None

    def read(self) -> bytes | np.ndarray:
        """Returns the encoded file, or the pixels of its part."""
        with open(self.path, "rb") as f:
            data = f.read()
        if self.box is None:
            return data
        pixels = pictures.Picture(data).pixels()[0]
        left, top, width, height = (round(edge) for edge in self.box)
        top, left = min(max(top, 0), len(pixels) - 1), min(max(left, 0), pixels.shape[1] - 1)
        return np.ascontiguousarray(pixels[top : top + max(height, 1), left : left + max(width, 1)])


@dataclasses.dataclass(frozen=True)
class Instance:
    """group: the relation, attribute or task that it belongs to."""

    images: tuple[Region, ...]
    texts: tuple[str, ...]
    group: str


@dataclasses.dataclass(frozen=True)
class Pictures:
    """Regions as a source of records without captions (`texts`: with one each)."""

    regions: tuple[Region, ...]
    fingerprint: str
    texts: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.regions)

    def __getitem__(self, i: int) -> dict[str, Any]:
        captions = [{"text": t, "source": "", "lang": "und"} for t in self.texts[i : i + 1]]
        region = self.regions[i]
        return {"key": region.path, "image": region.read(), "captions": captions}


def read(path: str, images: str, where: str) -> tuple[list[Instance], str]:
    """Returns the instances of a file, or of the .json files of a directory, and a digest of the files.

    Args:
        path: the file or directory.
        images: the folder of the images; "": that of the file.
        where: for errors.

    Raises:
        UserError: another format, or an image that is not there.
    """
    found = pathlib.Path(path)
    files = sorted(p for p in found.glob("*.json*") if p.is_file()) if found.is_dir() else [found]
    out: list[Instance] = []
    digest = hashlib.sha256()
    for file in files:
        try:
            data = file.read_bytes()
        except OSError as e:
            raise check.error(
                where, f"{str(file)!r} ({e.strerror})", "a JSON file", "correct it"
            ) from None
        digest.update(hashlib.sha256(data).digest())
        folder = images or str(file.parent)
        try:
            rows = _rows(data)
            out += [_instance(row, file.stem, folder, where) for row in rows]
        except (ValueError, KeyError, TypeError, IndexError) as e:
            if isinstance(e, check.UserError):
                raise
            got = f"{str(file)!r} ({type(e).__name__}: {e!s:.60})"
            expected = "JSON of SugarCrepe, ARO, VL-CheckList or Winoground, or {image, captions}"
            raise check.error(where, got, expected, "name a file of this form") from None
    if not out:
        raise check.error(where, f"no instance in {path!r}", "a JSON file with some", "correct it")
    return out, digest.hexdigest()


def _rows(data: bytes) -> list[Any]:
    """Returns the rows of a JSON list, of a JSON object with keys "0", "1", …, or of JSON lines."""
    text = data.decode("utf-8-sig")
    try:
        found = json.loads(text)
    except ValueError:
        return [json.loads(line) for line in text.splitlines() if line.strip()]
    if isinstance(found, Mapping):
        return [found] if {"image", "image_0"} & found.keys() else list(found.values())
    return found


def _instance(row: Any, name: str, folder: str, where: str) -> Instance:
    """Reads one row, of whichever form it is."""

    def image(path: str, box: Sequence[Any] | None = None) -> Region:
        full = os.path.join(folder, path)
        there = next((full + end for end in ENDINGS if os.path.isfile(full + end)), "")
        if not there:
            do = "name the folder of the images in `images`"
            raise check.error(where, f"no file {full!r}", "the images of the benchmark", do)
        if box is None:
            return Region(there)
        left, top, width, height = map(float, box)
        return Region(there, (left, top, width, height))

    if isinstance(row, list):  # VL-CheckList: [path, {"POS": […], "NEG": […]}]
        return Instance((image(row[0]),), (row[1]["POS"][0], row[1]["NEG"][0]), name)
    if "image_0" in row:  # Winoground
        pictures = image(_name(row["image_0"])), image(_name(row["image_1"]))
        return Instance(pictures, (row["caption_0"], row["caption_1"]), row.get("tag") or name)
    if "negative_caption" in row:  # SugarCrepe
        return Instance((image(row["filename"]),), (row["caption"], row["negative_caption"]), name)
    if "true_caption" in row:  # ARO: the box first
        box = [row[f"bbox_{k}"] for k in "xywh"] if "bbox_x" in row else None
        group = row.get("relation_name") or "_".join(row.get("attributes", [])) or name
        texts = row["true_caption"], row["false_caption"]
        return Instance((image(row["image_path"], box),), texts, group)
    texts = tuple(row["captions"])
    if len(texts) < 2 or not all(isinstance(t, str) for t in texts):
        raise ValueError(f"captions {texts!r:.40}")
    return Instance((image(row["image"]),), texts, row.get("group") or name)


def _name(image: Any) -> str:
    return image["path"] if isinstance(image, Mapping) else image


def regions(instances: Sequence[Instance]) -> Iterator[Region]:
    """Yields the images of all instances."""
    for instance in instances:
        yield from instance.images
