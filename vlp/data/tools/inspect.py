"""`vlp data inspect` and `verify`: what a dataset holds, a page to look at it, and what is wrong.

Reads every record once; images are decoded only by `verify`, and a hundred of them for the rest.
"""

import base64
import collections
import io
import os
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from markupsafe import Markup
from PIL import Image

from vlp.core import check, pages
from vlp.data import counts, pictures, records

THUMBNAIL_PX = 160


def numbers(source: records.Source) -> dict[str, Any]:
    """Counts of a whole source; sizes and lengths as [min, 25 %, median, 75 %, max].

    repeated_*: share of records (texts) whose key, image bytes or text came before.
    """
    size_bytes, short_px, lengths, per_record = (counts.Histogram() for _ in range(4))
    kinds: dict[str, collections.Counter] = {
        k: collections.Counter() for k in ("formats", "langs", "sources", "bad")
    }
    seen = {name: counts.Counts() for name in ("keys", "images", "texts")}
    source = records.in_order(source)
    for i in range(len(source)):
        try:
            record = source[i]
        except check.UserError:
            raise  # a file that cannot be read is no property of the row
        except ValueError as e:
            kinds["bad"][getattr(e, "reason", "row")] += 1
            continue
        image = record["image"]
        seen["keys"].add([record["key"]])
        seen["images"].add([image])
        size_bytes.add(len(image))
        try:
            picture = pictures.Picture(image)
            short_px.add(min(picture.size))
            kinds["formats"][picture.format] += 1
        except pictures.BadImage:
            kinds["bad"]["image header"] += 1
        per_record.add(len(record["captions"]))
        for caption in record["captions"]:
            lengths.add(len(caption["text"].split()))
            kinds["langs"][caption["lang"]] += 1
            kinds["sources"][caption["source"]] += 1
            seen["texts"].add([caption["text"]])
    spread = lambda histogram: histogram.percentiles([0, 25, 50, 75, 100])
    repeats = lambda found: round(found.num_repeats() / max(found.total, 1), 4)
    return {
        "records": len(source),
        "bytes": size_bytes.total(),
        "image_bytes": spread(size_bytes),
        "shorter_side_px": spread(short_px),
        "captions": lengths.num,
        "captions_per_record": spread(per_record),
        "caption_words": spread(lengths),
        **{f"repeated_{name}": repeats(found) for name, found in seen.items()},
        "uniform_borders": borders(source),
        **{k: dict(v.most_common(20)) for k, v in kinds.items()},
    }


def page(source: records.Source, found: dict, *, title: str, num_images: int = 60) -> str:
    """Returns an HTML page of one file: the numbers, and images at equal steps with their texts.

    Args:
        source: the records.
        found: what `numbers` returned about them.
        title: heading of the page.
        num_images: records to show.
    """
    shown = [_shown(*sample) for sample in _samples(source, num_images)]
    return pages.render(
        "vlp.data.tools", "inspect.html.j2", title=title, records=shown, **_counts(found)
    )


def text(found: dict) -> str:
    """Returns what `numbers` found as lines for a terminal, the spreads in columns with heads."""
    of = _counts(found)
    lines = [(pages.title(name), " ".join(filter(None, rest))) for name, *rest in of["tiles"]]
    wide = max(len(name) for name, *_ in [*lines, *of["spreads"], *of["kinds"]])
    out = [f"{name:{wide}}  {value}" for name, value in lines]
    rows = [("", *SPREAD), *of["spreads"]] if of["spreads"] else []
    for name, *values in rows:
        out.append(f"{name:{wide}}" + "".join(f"{value:>12}" for value in values))
    for name, rows in of["kinds"]:
        shown = ", ".join(f"{kind} {num} ({share})" for kind, num, share in rows)
        out.append(f"{name:{wide}}  {shown}")
    return "\n".join(out)


SPREAD = ("min", "25 %", "median", "75 %", "max")
_WORDS = {"langs": "languages", "shorter_side_px": "shorter side, px"}


def _counts(found: dict) -> dict[str, list]:
    """Sorts what `numbers` found by its shape: single numbers (tiles), spreads, and counts by kind."""
    tiles, spreads, kinds = [], [], []
    for key, value in found.items():
        name = _WORDS.get(key, pages.words(key))
        if isinstance(value, dict):
            share = lambda num, total=sum(value.values()): f"{100 * num / (total or 1):.1f} %"
            lines = [(pages.visible(k or "–", 80), f"{n:,}", share(n)) for k, n in value.items()]
            kinds += [(pages.title(name), lines)] * bool(lines)
        elif isinstance(value, list):
            spreads += [(pages.title(name), *(f"{n:,}" for n in value))] * bool(value)
        elif isinstance(value, str):
            words = value.split()
            tiles.append((name, " ".join(words[:3]), " ".join(words[3:]), ""))
        else:
            is_share = key.startswith("repeated_")
            tiles.append((name, f"{100 * value:.4g} %" if is_share else f"{value:,}", "", ""))
    return {"tiles": tiles, "spreads": spreads, "kinds": kinds}


def _shown(i: int, record: dict, image: np.ndarray | ValueError) -> dict[str, Any]:
    """Returns what the page shows of a record: its image, or why there is none; its key and captions."""
    captions = record.get("captions", ())[:5]
    out: dict[str, Any] = {
        "key": record.get("key", f"record {i}"),
        "captions": [(c["text"], f"{c['source']}, {c['lang']}") for c in captions],
    }
    if isinstance(image, ValueError):
        return out | {"image": "", "border": False, "problem": image}
    small = Image.fromarray(image)
    small.thumbnail((THUMBNAIL_PX, THUMBNAIL_PX))
    jpeg = io.BytesIO()
    small.save(jpeg, "JPEG", quality=80)
    uri = "data:image/jpeg;base64," + base64.b64encode(jpeg.getvalue()).decode()
    return out | {"image": Markup(uri), "border": has_uniform_border(image)}


def _samples(
    source: records.Source, num: int
) -> Iterator[tuple[int, dict, np.ndarray | ValueError]]:
    """Yields `num` records at equal steps: number, record, and its image or why it cannot be shown."""
    for i in np.unique(np.linspace(0, len(source) - 1, num).astype(int)).tolist():
        record: dict = {}
        try:
            record = source[i]
            yield i, record, pictures.decode(record["image"])
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


def verify(path: str, tell: Callable[[str, dict | None], None]) -> int:
    """Checks digests, records and images of our format; returns the number of records read.

    tell(line, row) is called with each problem as it is found; row: a bad record's line of a
    quarantine file (`config.data.skip`), None for what is no record.
    """
    manifest, total = records.read_manifest(path), 0

    def good(file: str, entry: dict) -> bool:
        try:
            records.check_file(os.path.join(path, file), entry, hashed=True)
        except check.UserError as e:
            tell(str(e), None)
            return False
        return True

    for file, entry in manifest.get("files", {}).items():
        good(file, entry)
    for split, entry in manifest["splits"].items():
        if not all([good(shard["file"], shard) for shard in entry["shards"]]):
            continue
        try:
            source = records.in_order(records.open_split(path, split, hashed=False))
        except check.UserError as e:
            tell(str(e), None)
            continue
        keys = counts.Counts()
        for i in range(len(source)):
            try:
                record = source[i]
            except check.UserError:
                raise
            except ValueError as e:  # no msgpack, or strings that are not UTF-8
                row = {"split": split, "record": i, "key": "", "reason": "record"}
                row |= {"fingerprint": source.fingerprint}
                tell(f"{split} record {i}: {e!s:.200}", row)
                continue
            keys.add([record["key"]])
            try:
                records.encode(record)
                pictures.decode(record["image"])
            except check.MachineError:
                raise
            except (check.UserError, pictures.BadImage) as e:
                reason = getattr(e, "reason", "record")
                row = {"split": split, "record": i, "key": record["key"], "reason": reason}
                row |= {"fingerprint": source.fingerprint}
                tell(f"{split} record {i} (key {record['key']!r}): {e}", row)
        if repeats := keys.num_repeats():
            tell(f"{split}: {repeats} keys occur more than once", None)
        total += len(source)
    return total
