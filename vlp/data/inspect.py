"""`vlp data inspect` and `verify`: what a dataset holds, a page to look at it, and what is wrong.

Reads every record once; images are decoded only by `verify`, and a hundred of them for the rest.
"""

import base64
import collections
import hashlib
import html
import io
import json
import os
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from PIL import Image

from vlp.core import check
from vlp.data import image_ops, records

THUMBNAIL_PX = 160
_PAGE = """<!doctype html><meta charset="utf-8"><title>{title}</title>
<style>body{{font:14px sans-serif;margin:2em}}figure{{display:inline-block;width:180px;margin:6px;
vertical-align:top}}figcaption{{font-size:12px;overflow-wrap:anywhere}}</style>
<h1>{title}</h1><pre>{numbers}</pre>{figures}
"""


def numbers(source: records.Source) -> dict[str, Any]:
    """Counts of a whole source; sizes and lengths as [min, 25 %, median, 75 %, max].

    repeated_*: share of records (texts) whose key, image bytes or text came before.
    """
    size_bytes, short_px, texts, lengths, per_record = [], [], 0, [], []
    kinds: dict[str, collections.Counter] = {
        k: collections.Counter() for k in ("formats", "langs", "sources", "bad")
    }
    seen: dict[str, set] = {"key": set(), "image": set(), "text": set()}
    for i in range(len(source)):
        try:
            record = source[i]
        except ValueError as e:
            kinds["bad"][getattr(e, "reason", "row")] += 1
            continue
        image = record["image"]
        seen["key"].add(record["key"])
        seen["image"].add(hashlib.blake2b(bytes(image), digest_size=16).digest())
        size_bytes.append(len(image))
        try:
            picture = image_ops.Picture(image)
            short_px.append(min(picture.size))
            kinds["formats"][picture.format] += 1
        except image_ops.BadImage:
            kinds["bad"]["image header"] += 1
        per_record.append(len(record["captions"]))
        for caption in record["captions"]:
            texts += 1
            lengths.append(len(caption["text"].split()))
            kinds["langs"][caption["lang"]] += 1
            kinds["sources"][caption["source"]] += 1
            seen["text"].add(hashlib.blake2b(caption["text"].encode(), digest_size=16).digest())
    good = max(len(size_bytes), 1)
    return {
        "records": len(source),
        "bytes": sum(size_bytes),
        "image_bytes": _spread(size_bytes),
        "shorter_side_px": _spread(short_px),
        "captions": texts,
        "captions_per_record": _spread(per_record),
        "caption_words": _spread(lengths),
        "repeated_keys": round(1 - len(seen["key"]) / good, 4),
        "repeated_images": round(1 - len(seen["image"]) / good, 4),
        "repeated_texts": round(1 - len(seen["text"]) / max(texts, 1), 4),
        "uniform_borders": borders(source),
        **{k: dict(v.most_common(20)) for k, v in kinds.items()},
    }


def _spread(values: Sequence[int]) -> list[int]:
    if not values:
        return []
    return [int(x) for x in np.percentile(values, [0, 25, 50, 75, 100])]


def page(source: records.Source, found: dict, *, title: str, num_images: int = 60) -> str:
    """Returns an HTML page of one file: the numbers, and images at equal steps with their texts."""
    figures = []
    for i, record, image in _samples(source, num_images):
        if isinstance(image, ValueError):
            figures.append(
                f"<figure>record {i}<figcaption>{html.escape(str(image))}</figcaption></figure>"
            )
            continue
        small = Image.fromarray(image)
        small.thumbnail((THUMBNAIL_PX, THUMBNAIL_PX))
        out = io.BytesIO()
        small.save(out, "JPEG", quality=80)
        data = base64.b64encode(out.getvalue()).decode()
        lines = [record["key"], *("uniform border" for _ in range(has_uniform_border(image)))]
        lines += [f"[{c['source']}, {c['lang']}] {c['text'][:200]}" for c in record["captions"][:5]]
        text = "<br>".join(html.escape(x) for x in lines)
        figures.append(
            f'<figure><img alt="" src="data:image/jpeg;base64,{data}">'
            f"<figcaption>{text}</figcaption></figure>"
        )
    table = html.escape(json.dumps(found, indent=1, ensure_ascii=False))
    return _PAGE.format(title=html.escape(title), numbers=table, figures="\n".join(figures))


def _samples(
    source: records.Source, num: int
) -> Iterator[tuple[int, dict, np.ndarray | ValueError]]:
    """Yields `num` records at equal steps: number, record, its image or why there is none."""
    for i in np.unique(np.linspace(0, len(source) - 1, num).astype(int)).tolist():
        record: dict = {}
        try:
            record = source[i]
            yield i, record, image_ops.decode(record["image"])
        except ValueError as e:
            yield i, record, e


def borders(source: records.Source, num: int = 100) -> str:
    """Says how many of `num` images at equal steps have a uniform border."""
    images = [x for _, _, x in _samples(source, num) if not isinstance(x, ValueError)]
    return f"{sum(map(has_uniform_border, images))} of {len(images)} looked at"


def has_uniform_border(image: np.ndarray, share: float = 0.05) -> bool:
    """True if two opposite edges are one colour (within 8 of 255) over `share` of the side.

    So look images that were padded to a square (img2dataset's resize_mode="border").
    """
    for axis in (0, 1):
        x = np.moveaxis(image, axis, 0)
        depth = max(1, round(share * len(x)))
        edges = np.concatenate([x[:depth], x[-depth:]]).reshape(-1, 3).astype(int)
        inside = x[depth:-depth].reshape(-1, 3).astype(int)
        flat = (np.ptp(edges, axis=0) <= 8).all()
        if flat and inside.size and (np.ptp(inside, axis=0) > 8).any():
            return True
    return False


def verify(path: str) -> tuple[list[str], list[dict], int]:
    """Checks digests, records and images of our format.

    Returns (problems as lines, bad records, records read); the second as
    lines of a quarantine file (`config.data.skip`).
    """
    problems, bad, total = [], [], 0
    manifest = records.read_manifest(path)
    for file, entry in manifest.get("files", {}).items():
        try:
            records.check_file(os.path.join(path, file), entry, hashed=True)
        except check.UserError as e:
            problems.append(str(e))
    for split, entry in manifest["splits"].items():
        damaged = len(problems)
        for shard in entry["shards"]:
            try:
                records.check_file(os.path.join(path, shard["file"]), shard, hashed=True)
            except check.UserError as e:
                problems.append(str(e))
        if len(problems) > damaged:
            continue
        try:
            source = records.open_split(path, split, hashed=False)
        except check.UserError as e:
            problems.append(str(e))
            continue
        keys = set()
        for i in range(len(source)):
            record = source[i]
            keys.add(record["key"])
            try:
                records.encode(record)
                image_ops.decode(record["image"])
            except (check.UserError, image_ops.BadImage) as e:
                problems.append(f"{split} record {i} (key {record['key']!r}): {e}")
                reason = getattr(e, "reason", "record")
                row = {"split": split, "record": i, "key": record["key"], "reason": reason}
                bad.append(row | {"fingerprint": source.fingerprint})
        if len(keys) < len(source):
            problems.append(f"{split}: {len(source) - len(keys)} keys occur more than once")
        total += len(source)
    return problems, bad, total
