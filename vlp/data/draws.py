"""What every leaf of a batch is made with: a sample's place, its random numbers and its crop (`Draws`); bad records."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from vlp.data import image_ops, order, pictures, text_ops
from vlp.data import tokenizer as tokenizers
from vlp.data.config import Data

REASONS = (
    *pictures.REASONS,
    *text_ops.REASONS,
    "unreadable",
    "bad_field",
)  # why a record was replaced
Spec = dict[str, tuple[tuple[int, ...], Any]]
Row = Mapping[str, np.ndarray]


class BadRecord(Exception):
    """A record that cannot be read or used; `reason` is one of `REASONS`."""

    def __init__(self, reason: str, detail: str):
        super().__init__(f"{reason}: {detail}")
        self.reason = reason


@dataclasses.dataclass(slots=True)
class Draws:
    """A sample: its place in the data's order, and random numbers that are a function of it.

    position: in the global stream; epoch: of its record; training: False in evaluations, which draw nothing that
    their metrics are computed on; texts, texts_cut: how many were encoded, and how many of them were cut.
    """

    data: Data
    tokenizer: tokenizers.Tokenizer
    seed: int
    position: int
    epoch: int
    training: bool = True
    stored_crop: bool = False  # a leaf is read that belongs to one of the record's own crops
    texts: int = 0
    texts_cut: int = 0

    def rng(self, name: str) -> np.random.Generator:
        """Returns a generator that depends only on the seed, the name and the position in the stream."""
        return order.sample_rng(self.seed, name, self.position)

    def rng_of_key(self, name: str, record: Mapping) -> np.random.Generator:
        """Returns a generator that depends only on the seed, the name, the record's key and the epoch."""
        return order.sample_rng(self.seed, f"{name}:{record.get('key')}", self.epoch)

    def chosen(self, name: str, num: int, most: int) -> list[int]:
        """Returns up to `most` of 0 … num - 1: the first in evaluations, else drawn, without repetition."""
        if not self.training:
            return list(range(min(num, most)))
        return self.rng(name).permutation(num)[:most].tolist()

    def encode(self, text: str, out_L: np.ndarray, was_cut: bool = False) -> None:
        """Writes the ids of a text, and counts it."""
        self.texts += 1
        self.texts_cut += self.tokenizer.encode_into(text, out_L) or was_cut

    def encode_all(self, texts: Sequence[str], out_KL: np.ndarray, mask_K: np.ndarray) -> None:
        """Writes the ids of at most K texts and their mask; missing texts become [bos] [eos] with mask False."""
        for text, out_L in zip(texts, out_KL):
            self.encode(text, out_L)
        for out_L in out_KL[len(texts) :]:
            self.tokenizer.encode_into("", out_L)
        mask_K[:] = np.arange(len(mask_K)) < len(texts)

    @property
    def is_blank(self) -> Callable[[str], bool]:
        """Whether a text is nothing to the tokenizer; a user's own tokenizer may not say."""
        return getattr(self.tokenizer, "is_blank", text_ops.is_invisible)

    def image(self, image: np.ndarray | pictures.Picture, rng: np.random.Generator, **options: Any):
        """Returns an image changed as `data` says, at random in training."""
        data = self.data
        if self.training or "crop" in options:
            return augmented(image, data, rng, training=self.training, **options)
        how = data.eval_crop
        return image_ops.eval_image(image, data.image_px, resize=data.resize, how=how, **options)

    def crop(self, record: dict) -> image_ops.Crop:
        """Returns the crop of the leaf "image": drawn, the centre in evaluations, or one of the record's own."""
        size = image_ops.size_of(record["image"])
        if self.stored_crop and "crops" in record:
            entry = record["crops"][self.stored_number(record)]
            return image_ops.crop_of_shares(entry["box"], entry["flip"], size, self.data.image_px)
        if not self.training:
            return image_ops.eval_crop(size, self.data.image_px, self.data.eval_crop)
        draws = self.rng("image").random(8)
        return image_ops.draw_crop(size, self.data.image_px, draws, **_crop_options(self.data))

    def stored_number(self, record: dict) -> int:
        """Returns which of the record's crops this sample uses: the first in evaluations."""
        return self.chosen("stored", len(record["crops"]), 1)[0]


def _crop_options(data: Data) -> dict[str, Any]:
    return {
        "min_area_frac": data.min_area_frac,
        "max_area_frac": data.max_area_frac,
        "max_aspect": data.max_aspect,
        "translate_frac": data.translate_frac,
        "flip": data.flip,
        "how": data.crop,
    }


def augmented(
    image: np.ndarray | pictures.Picture,
    data: Data,
    rng: np.random.Generator,
    *,
    training: bool = True,
    crop: image_ops.Crop | None = None,
    out: np.ndarray | None = None,
) -> np.ndarray:
    """Returns the training image that `data` asks for, drawn from `rng`; `crop` replaces the drawn crop."""
    return image_ops.train_image(
        image,
        data.image_px,
        rng,
        **_crop_options(data),
        jitter=data.jitter if training else 0.0,
        randaugment=data.randaugment if training else 0,
        magnitude=data.randaugment_magnitude,
        resize=data.resize,
        crop=crop,
        out=out,
    )


def captions_of(
    record: Mapping,
    data: Data,
    policy: str,
    *,
    sources: Mapping[str, float],
    rng: np.random.Generator | None = None,
    is_blank: Callable[[str], bool] = text_ops.is_invisible,
) -> list[str]:
    """Returns a record's captions (`text_ops.choose`) in `data.langs`. Raises: `text_ops.BadCaption`."""
    return text_ops.choose(
        record.get("captions"),
        policy=policy,
        langs=data.langs,
        sources=sources,
        num=data.num_captions,
        rng=rng,
        is_blank=is_blank,
        where=f"record {record.get('key')!r}",
    )


def bad_field(record: Mapping, field: str, expected: str) -> BadRecord:
    """Returns (does not raise) the error for a field of a record that a leaf cannot use."""
    return BadRecord("bad_field", f"{field} {record.get(field)!r:.60}, expected {expected}")


def entries(record: Mapping, field: str, good: Callable[[Any], bool], expected: str) -> list:
    """Returns a record's list of entries, [] without the field. Raises: `BadRecord` unless all are `good`."""
    found = record.get(field) or []
    if not isinstance(found, list | tuple) or not all(map(good, found)):
        raise bad_field(record, field, f"a list of {expected}")
    return list(found)
