"""The config section `data`: what is read and how it is prepared. `check_data` rejects invalid settings."""

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from vlp.core import check
from vlp.data import image_ops, text_ops

BAD_RECORDS = ("error", "replace")
STORED_OF = ("crop", "record")
NAMED = ("slots", "views", "stored")  # fields of `Data` that hold sections by name


@dataclasses.dataclass(frozen=True)
class Part:
    """One source of a mixture. Empty fields take the value of `Data`."""

    name: str
    weight: float = 1.0
    source: str = ""
    path: str = ""
    split: str = ""
    skip: str = ""
    num_records: int = 0


@dataclasses.dataclass(frozen=True)
class Reweight:
    """From stream position `samples` on, the parts of a mixture have these weights."""

    samples: int
    weights: tuple[float, ...]


@dataclasses.dataclass(frozen=True)
class CaptionSource:
    """A source tag of captions ("alt", "rewrite"), and its share where they are drawn "weighted"."""

    name: str
    weight: float = 1.0


@dataclasses.dataclass(frozen=True)
class TextSlot:
    """The leaf `text.<slot>`: one caption of those with certain source tags."""

    sources: tuple[str, ...] = ()  # tags; () = the slot's own name
    captions: str = "uniform"  # first | uniform | weighted (by the captions' own weights)


@dataclasses.dataclass(frozen=True)
class SentenceSet:
    """The leaf `sentences`: sentences of a record's longest caption."""

    num: int = 4  # a sample
    sources: tuple[str, ...] = ()  # tags of captions; () = every one
    max_joined: int = 1  # a text is a run of 1 … max_joined sentences


@dataclasses.dataclass(frozen=True)
class ViewSet:
    """The leaf `views.<name>`: further crops of the image, each drawn for itself."""

    num: int = 2  # a sample
    px: int = 96
    min_area_frac: float = 0.05  # the crop's share of the area
    max_area_frac: float = 0.4
    max_aspect: float = 4 / 3
    flip: bool = True
    jitter: float = 0.0  # the next three as in `Data`
    randaugment: int = 0
    randaugment_magnitude: float = 9.0
    grey_frac: float = 0.0  # probability of a view without colours
    blur_frac: float = 0.0  # probability of a blurred view


@dataclasses.dataclass(frozen=True)
class StoredArray:
    """The leaf `stored.<teacher>`: what a record's `embeddings` hold under the teacher's name."""

    shape: tuple[int, ...]  # of one sample: (E,), or (N, D) for tokens
    of: str = "crop"  # "crop": one array for each of the record's `crops`; "record": one array


@dataclasses.dataclass(frozen=True)
class Data:
    """What is read and how it is prepared."""

    source: str = "records"  # one of vlp.data.SOURCES
    path: str = ""  # directory of the records
    split: str = "train"
    tokenizer: str = ""  # path of a model; "" = the source's own
    num_records: int = 512  # source "shapes" only
    shuffle: bool = True
    shuffle_block: int = 0  # for slow media: records that stay together in the order (0: none)
    shuffle_window: int = 8  # number of such blocks that are mixed at a time
    group_rows: bool = True  # a table's rows of one image are one record, with all their captions
    allow_outside: bool = False  # follow a table's or a link's paths out of the dataset's directory
    group_by: str = ""  # a field of the records: an epoch visits each of its values once
    image_px: int = 64
    text_len: int = 16  # tokens, with bos and eos
    bos: bool | None = None  # rows begin with it; None, "": as the tokenizer says (tokenizer.Row)
    fill: str = ""  # what follows the eos: "pad" or "eos"
    clean: str = ""  # how texts are cleaned first: text_ops.CLEAN
    captions: str = "first"  # first | uniform | weighted | all (the first num_captions)
    num_captions: int = 1
    langs: tuple[str, ...] = ()  # use only captions in these languages (("en",)); () = all
    caption_sources: tuple[
        CaptionSource, ...
    ] = ()  # () = every source, by the captions' own weights
    shorten: str = "truncate"  # how training texts are cut to text_len (text_ops.SHORTEN)
    slots: Mapping[str, TextSlot] = dataclasses.field(default_factory=dict)  # further texts by role
    sentences: SentenceSet = SentenceSet()
    classes: tuple[
        str, ...
    ] = ()  # class names, for labels that are strings; the id is the index here
    num_boxes: int = 8  # boxes per sample, of those whose centre is in the crop
    num_negatives: int = 1  # texts per sample
    num_negative_images: int = 1
    views: Mapping[str, ViewSet] = dataclasses.field(default_factory=dict)  # further crops by name
    stored: Mapping[str, StoredArray] = dataclasses.field(
        default_factory=dict
    )  # stored arrays by teacher
    min_area_frac: float = 0.6  # the crop's share of the area
    max_area_frac: float = 1.0
    max_aspect: float = 1.25
    translate_frac: float = 0.0  # white border that crops may include, as a share of the side
    flip: bool = False
    jitter: float = 0.0  # largest relative change of brightness, contrast, saturation
    randaugment: int = 0  # operations per image
    randaugment_magnitude: float = 9.0  # of 10
    resize: str = "bicubic"  # one of image_ops.FILTERS
    crop: str = "exact"  # training's: image_ops.CROPS
    eval_crop: str = "exact"  # evaluation's: image_ops.EVAL_CROPS
    bad_records: str = "error"  # or "replace": use another record, chosen by the stream position
    max_bad_frac: float = 0.05  # the run stops if it replaces more
    skip: str = ""  # a quarantine file of an earlier run, whose records are omitted
    mixture: tuple[Part, ...] = ()  # several sources instead of one
    reweight: tuple[Reweight, ...] = ()  # changes of the mixture's weights, in order
    cache_decoded: bool = False  # keep decoded images in memory (once per worker process)
    cache_mb: int = 1024  # … up to this size, counted as image bytes
    workers: int = 0  # processes; 0 = threads of this process only
    read_threads: int = 2  # threads that make batches, per process; 0 = none, made when asked for
    prefetch: int = 4  # batches ready ahead of the consumer, per process

    def __post_init__(self) -> None:
        for name in NAMED:  # a config's own kind of mapping brings flax into the workers
            object.__setattr__(self, name, dict(getattr(self, name)))

    def __hash__(self) -> int:
        values = (getattr(self, f.name) for f in dataclasses.fields(self))
        return hash(tuple(tuple(sorted(v.items())) if type(v) is dict else v for v in values))


def check_data(data: Data) -> None:
    """Raises UserError for a value that can never work; opens nothing."""
    image_ops.check_filter("config.data.resize", data.resize)
    text_ops.check_shorten("config.data.shorten", data.shorten)
    enums = (
        ("captions", text_ops.POLICIES),
        ("bad_records", BAD_RECORDS),
        ("fill", ("", "pad", "eos")),
        ("clean", ("", *text_ops.CLEAN)),
        ("crop", image_ops.CROPS),
        ("eval_crop", image_ops.EVAL_CROPS),
    )
    for field, known in enums:
        if getattr(data, field) not in known:
            raise check.unknown(f"config.data.{field}", getattr(data, field), known)
    sources = data.caption_sources
    bounds = (
        ("min_area_frac", 0 < data.min_area_frac <= data.max_area_frac, "in (0, max_area_frac]"),
        ("max_area_frac", data.max_area_frac <= 1, "at most 1"),
        ("max_aspect", data.max_aspect >= 1, "at least 1"),
        ("translate_frac", 0 <= data.translate_frac <= 1, "in [0, 1]"),
        ("jitter", 0 <= data.jitter < 1, "in [0, 1)"),
        ("randaugment", 0 <= data.randaugment <= 100, "in 0 … 100"),
        ("randaugment_magnitude", 0 <= data.randaugment_magnitude <= 10, "in [0, 10]"),
        ("shuffle_block", data.shuffle_block >= 0, "at least 0"),
        ("shuffle_window", data.shuffle_window >= 1, "at least 1"),
        ("shuffle_block", data.shuffle or not data.shuffle_block, "0 without shuffle"),
        ("shuffle_block", data.shuffle_block < 2**31, "below 2^31"),
        ("shuffle_window", data.shuffle_window < 2**31, "below 2^31"),
        ("image_px", data.image_px >= 1, "at least 1"),
        ("image_px", data.image_px <= 2**14, "at most 16,384"),
        ("text_len", data.text_len >= 3, "at least 3 (bos, a piece, eos)"),
        ("text_len", data.text_len <= 2**17, "at most 131,072"),
        ("num_captions", data.num_captions >= 1, "at least 1"),
        ("num_captions", data.num_captions <= 2**10, "at most 1,024"),
        (
            "num_captions",
            data.num_captions == 1 or data.captions == "all",
            "1, but for captions 'all'",
        ),
        (
            "captions",
            data.captions != "weighted" or bool(sources),
            "caption_sources to be set for 'weighted'",
        ),
        (
            "caption_sources",
            len({c.name for c in sources}) == len(sources) and all(c.weight > 0 for c in sources),
            "names that differ, weights above 0",
        ),
        ("num_boxes", 1 <= data.num_boxes <= 2**10, "in 1 … 1,024"),
        ("num_negatives", 1 <= data.num_negatives <= 2**10, "in 1 … 1,024"),
        ("num_negative_images", 1 <= data.num_negative_images <= 2**8, "in 1 … 256"),
        ("classes", len({*data.classes}) == len(data.classes), "names that differ"),
        ("max_bad_frac", 0 <= data.max_bad_frac <= 1, "in [0, 1]"),
        ("mixture", not (data.mixture and data.group_by), "no group_by together with a mixture"),
        (
            "mixture",
            len({p.name for p in data.mixture}) == len(data.mixture),
            "a different name for each part",
        ),
        ("reweight", bool(data.mixture) or not data.reweight, "a mixture to reweight"),
        ("cache_mb", data.cache_mb >= 0, "at least 0"),
        ("workers", data.workers >= 0, "at least 0"),
        ("read_threads", data.read_threads >= 0, "at least 0"),
        ("prefetch", data.prefetch >= 1, "at least 1"),
        ("workers", data.workers <= 2**10, "at most 1,024"),
        ("read_threads", data.read_threads <= 2**10, "at most 1,024"),
        ("prefetch", data.prefetch <= 2**16, "at most 65,536"),
    )
    _check("config.data", data, bounds)
    for kind, names in ((k, getattr(data, k)) for k in NAMED):
        for name, section in names.items():
            where = f"config.data.{kind}.{name}"
            if not name.isidentifier() or name in ("mask", "boxes", "flip"):
                expected = "letters, digits and _ (not mask, boxes or flip)"
                raise check.error(f"config.data.{kind}", repr(name), expected, "rename it")
            _CHECKS[kind](where, section)
    sentences, most = data.sentences, 2**10
    _check(
        "config.data.sentences",
        sentences,
        (
            ("num", 1 <= sentences.num <= most, "in 1 … 1,024"),
            ("max_joined", sentences.max_joined >= 1, "at least 1"),
        ),
    )


def _check(where: str, section: object, rules: Iterable[tuple[str, Any, str]]) -> None:
    """Raises UserError for the first (field, holds, expected) that does not hold."""
    for field, good, expected in rules:
        if not good:
            got = getattr(section, field)
            raise check.error(f"{where}.{field}", got, expected, f"correct {where}.{field}")


def _check_slot(where: str, slot: TextSlot) -> None:
    known = [p for p in text_ops.POLICIES if p != "all"]
    if slot.captions not in known:
        raise check.unknown(f"{where}.captions", slot.captions, known)


def _check_views(where: str, views: ViewSet) -> None:
    area = 0 < views.min_area_frac <= views.max_area_frac
    rules = (
        ("num", 1 <= views.num <= 2**8, "in 1 … 256"),
        ("px", 1 <= views.px <= 2**14, "in 1 … 16,384"),
        ("min_area_frac", area, "in (0, max_area_frac]"),
        ("max_area_frac", views.max_area_frac <= 1, "at most 1"),
        ("max_aspect", views.max_aspect >= 1, "at least 1"),
        ("jitter", 0 <= views.jitter < 1, "in [0, 1)"),
        ("randaugment", 0 <= views.randaugment <= 100, "in 0 … 100"),
        ("randaugment_magnitude", 0 <= views.randaugment_magnitude <= 10, "in [0, 10]"),
        ("grey_frac", 0 <= views.grey_frac <= 1, "in [0, 1]"),
        ("blur_frac", 0 <= views.blur_frac <= 1, "in [0, 1]"),
    )
    _check(where, views, rules)


def _check_stored(where: str, stored: StoredArray) -> None:
    if stored.of not in STORED_OF:
        raise check.unknown(f"{where}.of", stored.of, STORED_OF)
    good = 1 <= len(stored.shape) <= 2 and all(n >= 1 for n in stored.shape)
    _check(where, stored, (("shape", good, "(E,), or (N, D) for tokens"),))


_CHECKS: dict[str, Callable[[str, Any], None]] = {
    "slots": _check_slot,
    "views": _check_views,
    "stored": _check_stored,
}
