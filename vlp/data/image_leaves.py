"""Leaves that are made of pixels, or that say where pixels lie: image, views, boxes, negative images."""

import dataclasses
from typing import Any, ClassVar

import numpy as np

from vlp.data import image_ops, pictures
from vlp.data.config import Data
from vlp.data.draws import Draws, Row, Spec, entries


@dataclasses.dataclass(frozen=True)
class Image:
    """image u8[B R R 3]: a crop of the record's image, changed at random in training."""

    config: ClassVar = "image_px, min_area_frac, max_area_frac, flip, jitter, randaugment …"

    def spec(self, data: Data, batch: int) -> Spec:
        return {"image": ((batch, data.image_px, data.image_px, 3), np.uint8)}

    def fill(self, record: dict, draws: Draws, row: Row) -> None:
        options = {}
        if draws.stored_crop and "crops" in record:
            options["crop"] = draws.crop(record)
        rng = draws.rng("image")
        draws.image(record["image"], rng, out=row["image"], **options)


@dataclasses.dataclass(frozen=True)
class ImageBox:
    """image.box f32[B 4], image.flip bool[B]: which part of the record's image the leaf "image" shows.

    left, top, right, bottom in shares of the whole image's width and height; whether it was mirrored after that.
    """

    config: ClassVar = Image.config

    def spec(self, data: Data, batch: int) -> Spec:
        return {"image.box": ((batch, 4), np.float32), "image.flip": ((batch,), np.bool_)}

    def fill(self, record: dict, draws: Draws, row: Row) -> None:
        crop = draws.crop(record)
        row["image.box"][:] = crop.shares(image_ops.size_of(record["image"]))
        row["image.flip"][...] = crop.flip


@dataclasses.dataclass(frozen=True)
class Views:
    """views.<name> u8[B N P P 3]: N further crops of the record's image, each drawn for itself.

    views.<name>.boxes f32[B N 4] and views.<name>.flip bool[B N]: as for `ImageBox`. Evaluations draw them too.
    """

    config: ClassVar = "views"
    name: str

    @staticmethod
    def each(data: Data) -> "list[Views]":
        return [Views(name) for name in data.views]

    def spec(self, data: Data, batch: int) -> Spec:
        views, leaf = data.views[self.name], f"views.{self.name}"
        return {
            leaf: ((batch, views.num, views.px, views.px, 3), np.uint8),
            f"{leaf}.boxes": ((batch, views.num, 4), np.float32),
            f"{leaf}.flip": ((batch, views.num), np.bool_),
        }

    def fill(self, record: dict, draws: Draws, row: Row) -> None:
        views, leaf = draws.data.views[self.name], f"views.{self.name}"
        size = image_ops.size_of(record["image"])
        for n in range(views.num):
            crop = image_ops.draw_crop(
                size,
                views.px,
                draws.rng(f"{leaf}:crop {n}").random(5),
                min_area_frac=views.min_area_frac,
                max_area_frac=views.max_area_frac,
                max_aspect=views.max_aspect,
                flip=views.flip,
            )
            image_ops.train_image(
                record["image"],
                views.px,
                draws.rng(f"{leaf}:{n}"),
                jitter=views.jitter,
                randaugment=views.randaugment,
                magnitude=views.randaugment_magnitude,
                grey_frac=views.grey_frac,
                blur_frac=views.blur_frac,
                resize=draws.data.resize,
                crop=crop,
                out=row[leaf][n],
            )
            row[f"{leaf}.boxes"][n] = crop.shares(size)
            row[f"{leaf}.flip"][n] = crop.flip


@dataclasses.dataclass(frozen=True)
class Boxes:
    """boxes f32[B M 4], boxes.text i32[B M L], boxes.mask bool[B M]: regions of the leaf "image" and their texts.

    left, top, right, bottom in shares of the image as the batch has it: after its crop and flip, and cut at its edges.
    A box whose centre is outside of the crop is left out; of more than M, M are drawn (the first in evaluations). Rows
    that are left over are the whole image, with mask False.
    """

    config: ClassVar = "num_boxes"
    stage: ClassVar = "image"

    def spec(self, data: Data, batch: int) -> Spec:
        shape = (batch, data.num_boxes)
        return {
            "boxes": ((*shape, 4), np.float32),
            "boxes.text": ((*shape, data.text_len), np.int32),
            "boxes.mask": (shape, np.bool_),
        }

    def is_missing(self, record: dict, data: Data) -> bool:
        return not record.get("boxes")

    def fill(self, record: dict, draws: Draws, row: Row) -> None:
        found = entries(record, "boxes", _is_box, "{box: [x0, y0, x1, y1] in [0, 1], text}")
        crop = draws.crop(record)
        shown = crop.shares(image_ops.size_of(record["image"])).astype(np.float64)
        box_M4 = np.array([entry["box"] for entry in found], np.float64).reshape(-1, 2, 2)
        box_M4 = (box_M4 - shown[:2]) / (shown[2:] - shown[:2])
        if crop.flip:
            box_M4[..., 0] = 1 - box_M4[:, ::-1, 0]
        inside = ((box_M4.mean(1) >= 0) & (box_M4.mean(1) <= 1)).all(1)
        left = np.flatnonzero(inside)
        left = left[draws.chosen("boxes", len(left), draws.data.num_boxes)]
        row["boxes"][:] = 0, 0, 1, 1
        row["boxes"][: len(left)] = box_M4[left].reshape(-1, 4).clip(0, 1)
        texts = [found[i]["text"] for i in left.tolist()]
        draws.encode_all(texts, row["boxes.text"], row["boxes.mask"])


def _is_box(entry: Any) -> bool:
    try:
        x0, y0, x1, y1 = map(float, entry["box"])
        text = entry["text"]
    except (TypeError, ValueError, KeyError):
        return False
    return 0 <= x0 <= x1 <= 1 and 0 <= y0 <= y1 <= 1 and isinstance(text, str)


@dataclasses.dataclass(frozen=True)
class NegativeImages:
    """negatives.image u8[B M R R 3], negatives.image.mask bool[B M]: images that the captions do not describe.

    Changed like the leaf "image", each with its own draws; black where a record has fewer.
    """

    config: ClassVar = "num_negative_images"
    stage: ClassVar = "image"

    def spec(self, data: Data, batch: int) -> Spec:
        shape, px, leaf = (batch, data.num_negative_images), data.image_px, "negatives.image"
        return {leaf: ((*shape, px, px, 3), np.uint8), f"{leaf}.mask": (shape, np.bool_)}

    def is_missing(self, record: dict, data: Data) -> bool:
        return not record.get("negative_images")

    def fill(self, record: dict, draws: Draws, row: Row) -> None:
        leaf = "negatives.image"
        is_image = lambda x: isinstance(x, bytes | np.ndarray)
        found = entries(record, "negative_images", is_image, "encoded images")
        chosen = draws.chosen(leaf, len(found), draws.data.num_negative_images)
        for n, i in enumerate(chosen):
            image = pictures.Picture(found[i]) if isinstance(found[i], bytes) else found[i]
            draws.image(image, draws.rng(f"{leaf}:{n}"), out=row[leaf][n])
        row[leaf][len(chosen) :] = 0
        row[f"{leaf}.mask"][:] = np.arange(len(row[leaf])) < len(chosen)
