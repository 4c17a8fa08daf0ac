"""One row of a batch: reads a record, prepares its image and captions, and replaces bad records."""

import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from vlp.core import check
from vlp.data import image_ops, order, text_ops
from vlp.data import tokenizer as tokenizers
from vlp.data.config import Data
from vlp.data.sources.combined import Concatenated

REASONS = (*image_ops.REASONS, *text_ops.REASONS, "unreadable")  # why a record was replaced
MAX_BAD_IN_A_ROW = 100


class BadRecord(Exception):
    """A record that cannot be read; `reason` is one of `REASONS`."""

    def __init__(self, reason: str, detail: str):
        super().__init__(f"{reason}: {detail}")
        self.reason = reason


def train_sample(
    seed: int,
    tokenizer: tokenizers.Tokenizer,
    record: dict,
    data: Data,
    place: tuple[int, int],
    out: np.ndarray,
) -> list[tuple[str, bool]]:
    """Fills `out` with the training image at a place (stream position, epoch); returns the captions,
    each with whether it was shortened.

    The image's draws depend on the position, the caption's on the epoch and the key: forms of a
    caption follow each other whatever the order.
    """
    position, epoch = place
    drawn = data.captions in ("uniform", "weighted")
    rng = order.sample_rng(seed, f"caption:{record.get('key')}", epoch) if drawn else None
    texts = texts_of(record, data, data.captions, rng, tokenizer)
    augmented(record["image"], data, order.sample_rng(seed, "image", position), out)
    if data.shorten == "truncate":  # which the tokenizer does
        return [(t, False) for t in texts]
    rng = order.sample_rng(seed, "shorten", position)
    num_words = data.text_len - 2  # beside bos and eos
    short = [text_ops.shorten(t, num_words, data.shorten, rng) for t in texts]
    is_blank = _is_blank(tokenizer)
    short = [old if is_blank(new) else new for old, new in zip(texts, short)]
    return [(new, new is not old) for old, new in zip(texts, short)]


def augmented(
    image: np.ndarray | image_ops.Picture,
    data: Data,
    rng: np.random.Generator,
    out: np.ndarray | None = None,
) -> np.ndarray:
    """Returns the training image that `data` asks for, drawn from `rng`."""
    return image_ops.train_image(
        image,
        data.image_px,
        rng,
        min_area_frac=data.min_area_frac,
        max_area_frac=data.max_area_frac,
        max_aspect=data.max_aspect,
        translate_frac=data.translate_frac,
        flip=data.flip,
        jitter=data.jitter,
        randaugment=data.randaugment,
        magnitude=data.randaugment_magnitude,
        resize=data.resize,
        out=out,
    )


def eval_sample(
    tokenizer: tokenizers.Tokenizer,
    record: dict,
    data: Data,
    place: tuple[int, int],
    out: np.ndarray,
) -> list[tuple[str, bool]]:
    """Fills `out` with a record's image as evaluations see it; returns the captions."""
    del place  # nothing is drawn
    texts = texts_of(record, data, "all" if data.captions == "all" else "first", None, tokenizer)
    image_ops.eval_image(record["image"], data.image_px, resize=data.resize, out=out)
    return [(t, False) for t in texts]


def eval_image_alone(
    tokenizer: tokenizers.Tokenizer,
    record: dict,
    data: Data,
    place: tuple[int, int],
    out: np.ndarray,
) -> list[tuple[str, bool]]:
    """Fills `out` like `eval_sample`; returns empty captions."""
    del place, tokenizer
    image_ops.eval_image(record["image"], data.image_px, resize=data.resize, out=out)
    return [("", False)] * (data.num_captions if data.captions == "all" else 1)


def _is_blank(tokenizer: Any) -> Callable[[str], bool]:
    """Whether a text is nothing to a tokenizer; a user's own may not say."""
    return getattr(tokenizer, "is_blank", text_ops.is_invisible)


def texts_of(
    record: dict,
    data: Data,
    policy: str,
    rng: np.random.Generator | None,
    tokenizer: tokenizers.Tokenizer,
) -> list[str]:
    return text_ops.choose(
        record.get("captions"),
        policy=policy,
        langs=data.langs,
        sources={c.name: c.weight for c in data.caption_sources},
        num=data.num_captions,
        rng=rng,
        is_blank=_is_blank(tokenizer),
        where=f"record {record.get('key')!r}",
    )


class Reader:
    """Reads the records of a source, decoded ones from a cache if `data.cache_decoded`; safe in several threads."""

    def __init__(self, data: Data, source: Any):
        self.data, self.source = data, source
        self._cache: dict[int, dict] = {}
        self._cache_left = data.cache_mb * 10**6 if data.cache_decoded else 0
        self._lock = threading.Lock()

    def decoded(self, record_id: int) -> dict:
        """Returns a record with its image decoded: u8[H, W, 3]. Do not write into it."""
        try:
            found = self.read(int(record_id))
            if isinstance(found["image"], image_ops.Picture):
                found = found | {"image": found["image"].pixels()[0]}
            return found
        except (BadRecord, image_ops.BadImage) as e:
            raise self.refusal(int(record_id), e) from e

    def read(self, record_id: int) -> dict:
        """Returns a record whose image is an array or a `Picture`. Raises: `BadImage`, `BadRecord`."""
        if (found := self._cache.get(record_id)) is not None:
            return found
        try:
            found = self.source[record_id]
            image = found["image"]
            if not isinstance(image, bytes | np.ndarray):
                raise TypeError(f"image is a {type(image).__name__}")
        except image_ops.BadImage:  # of a source that looks at the file itself
            raise
        except Exception as e:  # by source: OSError, zlib.error, msgpack's, KeyError …
            if fault := check.machine(f"record {record_id} of {self.data.path}", e):
                raise fault from None
            raise BadRecord("unreadable", f"{type(e).__name__}: {e!s:.120}") from e
        if isinstance(image, bytes):
            found["image"] = image = image_ops.Picture(image)
        if not self.data.cache_decoded:
            return found
        if isinstance(image, image_ops.Picture):  # whole, whether or not there is room for it
            found["image"] = image = image.pixels()[0]
        with self._lock:
            if self._cache_left >= image.nbytes and record_id not in self._cache:
                self._cache[record_id] = found
                self._cache_left -= image.nbytes
        return found

    def refusal(self, record_id: int, e: Any) -> check.UserError:
        if isinstance(e, check.UserError):  # of the captions: it says what to do
            return e
        what = "a bad image" if isinstance(e, image_ops.BadImage) else "a bad record"
        named = f" (key {self.key(record_id)!r}, {self.data.path or self.data.source})"
        where = f"record {record_id} of {self.data.split!r}{named}"
        do = "remove it or set config.data.bad_records='replace'"
        return check.error(where, f"{what} ({e})", "an image and a caption", do)

    def key(self, record_id: int) -> str:
        try:
            return str(self.source[record_id]["key"])
        except Exception:
            return f"record {record_id}"

    def good(
        self, record_id: int, position: int, seed: int, fill: Callable, secs: np.ndarray
    ) -> tuple[list[tuple[str, bool]], int, int]:
        """Fills a row from the record, or from the first good one of its substitutes.

        Returns its caption texts (and whether they were shortened), the id of the record used, and
        0 or 1 + the reason (in `REASONS`) for which the record that was due is not used.
        """
        used, why, why_not = record_id, 0, ""
        for attempt in range(MAX_BAD_IN_A_ROW):
            began = time.perf_counter()
            try:
                record = self.read(used)
                read = time.perf_counter()
                secs[0] += read - began
                texts = fill(record)
                secs[1] += time.perf_counter() - read
                return texts, used, why
            except (BadRecord, image_ops.BadImage, text_ops.BadCaption) as e:
                if self.data.bad_records == "error":
                    raise self.refusal(used, e) from e
                why, why_not = why or 1 + REASONS.index(e.reason), f"{e!s:.120}"
                low, count = self._siblings(record_id)
                used = order.substitute(position, attempt, low, count, seed)
        raise check.error(
            f"record {record_id} and {MAX_BAD_IN_A_ROW} substitutes",
            "only bad ones",
            "images with captions",
            f"see why each is bad with config.data.bad_records = 'error' (last: {why_not})",
        )

    def _siblings(self, record_id: int) -> tuple[int, int]:
        """The records that may stand in for one: first id and number (those of its source)."""
        if not isinstance(self.source, Concatenated):
            return 0, len(self.source)
        ends = np.cumsum(self.source.sizes)
        k = int(np.searchsorted(ends, record_id, side="right"))
        return int(ends[k]) - self.source.sizes[k], self.source.sizes[k]
