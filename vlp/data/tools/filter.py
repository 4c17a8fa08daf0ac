"""ALIGN's published rules for noisy image–text pairs, with counts by rule.

Source: Jia et al. 2021, arXiv:2102.05918, §3.1. Not here: its filter of pornographic images and of
near-duplicates of test images, which need models. Counts are exact and of any size (counts.py).
"""

import collections
import dataclasses
from collections.abc import Iterator

from vlp.core import check
from vlp.data import counts as counts_lib
from vlp.data import pictures, records
from vlp.data.sources import fields

RULES = (
    "image_unreadable",
    "row_unreadable",
    "image_small",
    "image_aspect",
    "image_many_texts",
    "text_short",
    "text_long",
    "text_shared",
    "text_rare",
)


@dataclasses.dataclass(frozen=True)
class Rules:
    """The paper's numbers. A record stays if its image passes and one text is left."""

    min_side_px: int = 200  # the shorter side must be larger
    max_aspect: float = 3.0  # longer / shorter side must be smaller
    max_texts_per_image: int = 1000
    max_images_per_text: int = 10
    min_words: int = 3
    max_words: int = 20
    num_frequent: int = 100_000_000  # unigrams and bigrams that count as not rare

    def __post_init__(self):
        least = {"min_side_px": 0, "max_aspect": 1, "min_words": 0}
        rules = {}
        for name, value in dataclasses.asdict(self).items():
            low = least.get(name, 1)
            rules[name] = (value >= low, f"{low} or more")
        rules["max_words"] = (
            self.max_words >= self.min_words,
            f"min_words = {self.min_words} or more",
        )
        for name, (holds, expected) in rules.items():
            if not holds:
                flag = f"--{name.replace('_', '-')}"
                raise check.error(flag, getattr(self, name), expected, f"correct {flag}")


def words(text: str) -> list[str]:
    """The unigrams of a text: lower-case, split at white space."""
    return text.lower().split()


@dataclasses.dataclass
class Seen:
    """What the first pass finds in the raw data."""

    shared_texts: counts_lib.Members  # of more images than allowed
    crowded_images: counts_lib.Members  # with more texts than allowed
    frequent: counts_lib.Members | None  # unigrams and bigrams; None: all are


def survey(source: records.Source, rules: Rules) -> Seen:
    """Reads every record once."""
    texts, images, grams = counts_lib.Counts(), counts_lib.Counts(), counts_lib.Counts()
    source = records.in_order(source)
    for i in range(len(source)):
        record = _read(source, i)
        if isinstance(record, str):
            continue
        images.add_times(record["image"], len(record["captions"]))
        texts.add({_same(c["text"]) for c in record["captions"]})
        for caption in record["captions"]:
            grams.add(_grams(caption["text"]))
    return Seen(
        texts.above(rules.max_images_per_text),
        images.above(rules.max_texts_per_image),
        grams.most_common(rules.num_frequent),
    )


def apply(
    source: records.Source, seen: Seen, rules: Rules, counts: collections.Counter
) -> Iterator[dict]:
    """Yields the records that stay, and counts images and texts dropped by each rule.

    counts also gets "records", "texts" (what came in), "records_kept", "texts_kept" and "no_text"
    (records whose every text was dropped).
    """
    source = records.in_order(source)
    for i in range(len(source)):
        record = _read(source, i)
        counts["records"] += 1
        rule = record if isinstance(record, str) else _image_rule(record, seen, rules)
        if isinstance(record, str) or rule:
            counts[rule] += 1
            continue
        captions = []
        for caption in record["captions"]:
            rule = _text_rule(caption["text"], seen, rules)
            counts["texts"] += 1
            counts[rule or "texts_kept"] += 1
            captions += [] if rule else [caption]
        kept = captions or fields.is_label_alone(record, source)
        counts["records_kept" if kept else "no_text"] += 1
        if kept:
            yield record | {"captions": captions}


def _image_rule(record: dict, seen: Seen, rules: Rules) -> str:
    try:
        short, long = sorted(pictures.Picture(record["image"]).size)
    except pictures.BadImage:
        return "image_unreadable"
    if short <= rules.min_side_px:
        return "image_small"
    if long >= rules.max_aspect * short:
        return "image_aspect"
    return "image_many_texts" if seen.crowded_images.has([record["image"]])[0] else ""


def _text_rule(text: str, seen: Seen, rules: Rules) -> str:
    num = len(words(text))
    if num < rules.min_words:
        return "text_short"
    if num > rules.max_words:
        return "text_long"
    if seen.shared_texts.has([_same(text)])[0]:
        return "text_shared"
    rare = seen.frequent is not None and not seen.frequent.has(_grams(text)).all()
    return "text_rare" if rare else ""


def _grams(text: str) -> list[str]:
    tokens = words(text)
    return tokens + [f"{a} {b}" for a, b in zip(tokens, tokens[1:])]


def _same(text: str) -> str:
    """Equal for texts that differ in case or white space alone."""
    return " ".join(words(text))


def _read(source: records.Source, i: int) -> dict | str:
    """Returns a record, or the rule by which it is dropped."""
    try:
        return source[i]
    except pictures.BadImage:
        return "image_unreadable"
    except check.UserError:
        raise  # a file that cannot be read is no property of the row
    except ValueError:  # a row that does not parse, a text that is none
        return "row_unreadable"
