"""Which of a record's captions a sample uses, and how a long one is shortened."""

import functools
import html
import itertools
import re
import string
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from vlp.core import check

CLEAN = ("none", "whitespace", "lower", "canonicalize", "siglip")
SHORTEN = ("truncate", "random", "block", "syntax")
POLICIES = ("first", "uniform", "weighted", "all")
REASONS = ("bad_caption", "no_caption")
# what `str.isalnum` or a category takes for letters and marks, and no font shows (Unicode's
# Default_Ignorable_Code_Point outside of categories C* and Z*), with the blank of Braille
_UNSEEN = frozenset("\u034f\u115f\u1160\u17b4\u17b5\u2800\u3164\uffa0\u180b\u180c\u180d\u180f") | {
    chr(i) for i in (*range(0xFE00, 0xFE10), *range(0xE0100, 0xE01F0))
}
_SEPARATE = ("Zs", "Zl", "Zp", "Cc", "Cf", "Cs")  # not Cn: characters newer than Python's tables
_PLAIN = re.compile("[A-Za-z0-9]")
_SIMPLE = re.compile("[ -%'-~]*")  # printable ASCII without &: ftfy and HTML have nothing to repair
_PUNCTUATION = str.maketrans("", "", string.punctuation)
_SENTENCE_END = re.compile(
    r"""(?:(?<=[.!?])|(?<=[.!?]["'”’)\]]))\s+(?![a-zà-öø-ÿ])|(?<=[。！？])(?![”’」』）])|[\r\n]+"""
)


class BadCaption(check.UserError):
    """A record has no caption that can be used (in the wanted languages); `reason` is one of `REASONS`."""

    def __init__(self, reason: str, error: check.UserError):
        super().__init__(str(error))
        self.reason = reason


def is_plain(text: str) -> bool:
    """Whether a text has a letter or digit of ASCII: surely not blank, and cheap to know."""
    return _PLAIN.search(text) is not None


def is_invisible(text: str) -> bool:
    """Returns whether a text has only white space, control, format and filler characters."""
    return not is_plain(text) and all(
        c in _UNSEEN or unicodedata.category(c) in _SEPARATE for c in text
    )


def is_utf8(text: str) -> bool:
    """Whether UTF-8 can hold a text: no lone surrogates."""
    if text.isascii():
        return True
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def choose(
    captions: Any,
    *,
    policy: str,
    langs: Sequence[str] = (),
    sources: Mapping[str, float] | None = None,
    num: int = 1,
    rng: np.random.Generator | None = None,
    is_blank: Callable[[str], bool] = is_invisible,
    where: str = "captions",
) -> list[str]:
    """Returns the caption texts of one sample, out of those in `langs` and from `sources` (empty: any).

    "first": the first. "uniform": one drawn from `rng`. "weighted": one drawn in proportion to its `weight`
    (default 1); with `sources`, first a source is drawn in proportion to its weight there, then one of its captions.
    "all": the first `num`, or fewer. Texts that are blank (`is_blank`) do not count.
    Raises: `BadCaption`, a `UserError`, if no caption is left or one is malformed.
    """
    if policy not in POLICIES:
        raise check.unknown("config.data.captions", policy, POLICIES)
    if not isinstance(captions, list | tuple) or not all(map(is_caption, captions)):
        error = check.error(where, f"captions {captions!r:.80}", "{text, lang, …}", "repair it")
        raise BadCaption("bad_caption", error)
    wanted = [
        c
        for c in captions
        if (not langs or c["lang"] in langs) and (not sources or c.get("source") in sources)
    ]
    most = {"first": 1, "all": num}.get(policy)  # no more are looked at
    left = list(itertools.islice((c for c in wanted if not is_blank(c["text"])), most))
    if wanted and not left:
        got = f"blank captions {[c['text'] for c in wanted]!a:.80}"
        raise BadCaption("no_caption", check.error(where, got, "one with text", "repair it"))
    weights = _weights(left, sources) if policy == "weighted" else np.ones(len(left))
    if not weights.sum() > 0:
        found = sorted({c["lang"] for c in captions})
        got, field = f"captions only in {found}" if captions else "no caption", "langs"
        expected = f"one in {list(langs)}" if langs else "one with text"
        if sources:
            got += f" from {sorted({str(c.get('source')) for c in captions})}"
            expected += f" from {list(sources)}"
            field = "langs or caption_sources"
        do = f"widen config.data.{field}" if captions else "leave the record out"
        error = check.error(where, got, expected, do)
        raise BadCaption("no_caption", error)
    texts = [c["text"] for c in left]
    if policy == "first":
        return texts[:1]
    if policy == "all":
        return texts
    assert rng is not None, f"{policy} needs a generator"
    if policy == "uniform":
        return [texts[int(rng.integers(len(texts)))]]
    ends = np.cumsum(weights)
    return [texts[int(np.searchsorted(ends, rng.random() * ends[-1], side="right"))]]


def _weights(captions: Sequence[dict], sources: Mapping[str, float] | None) -> np.ndarray:
    """f64, a weight for each: its own, scaled so that a source's add up to the weight of the source."""
    own = np.array([c.get("weight", 1.0) for c in captions], np.float64)
    if not sources:
        return own
    tags = np.array([c["source"] for c in captions])
    sums = np.array([own[tags == tag].sum() for tag in tags])
    return np.array([sources[tag] for tag in tags]) * own / np.where(sums > 0, sums, 1.0)


def is_caption(caption: Any) -> bool:
    """Whether it is a dict with a text that UTF-8 can hold, a language, and a weight from 0 on if any."""
    return (
        isinstance(caption, dict)
        and isinstance(caption.get("text"), str)
        and is_utf8(caption["text"])
        and isinstance(caption.get("lang"), str)
        and isinstance(weight := caption.get("weight", 1.0), int | float)
        and 0 <= weight < float("inf")
    )


def clean(text: str, how: str) -> str:
    """Returns a text as it is cleaned before tokenizing.

    "whitespace": ftfy's repair of mis-encoded text, `html.unescape` twice, single spaces. "lower": and lower case
    (CLIP, Radford et al. 2021, its `simple_tokenizer.py`). "canonicalize": without ASCII punctuation, "_" a space,
    lower case (big_vision's `prompt_engineering.py`; after the same repair, as in OpenCLIP). "siglip": without ASCII
    punctuation, lower case, no repair (transformers' SiglipTokenizer). "none": as it is.
    """
    if how == "none":
        return text
    if how == "siglip":
        return " ".join(text.lower().translate(_PUNCTUATION).split())
    if not _SIMPLE.fullmatch(text):
        text = html.unescape(html.unescape(_ftfy().fix_text(text)))
    if how == "canonicalize":
        text = text.replace("_", " ").translate(_PUNCTUATION)
    text = " ".join(text.split())
    return text if how == "whitespace" else text.lower()


@functools.cache
def _ftfy() -> Any:
    try:
        import ftfy  # here, because only cleaning needs it
    except ImportError:
        got, do = "a text cleaning that needs the package ftfy", 'run `pip install "vlp[hf]"`'
        raise check.error("config.data.clean", got, "it", do) from None
    return ftfy


def check_clean(where: str, how: str) -> None:
    """Raises a `UserError` unless `how` is one of `CLEAN` and its package is there."""
    if how not in CLEAN:
        raise check.unknown(where, how, CLEAN)
    if how not in ("none", "siglip"):
        _ftfy()


def sentences(text: str) -> list[str]:
    """Returns the sentences of a text, in their order, without the blank ones.

    A sentence ends at a line break, at 。！？, and at . ! ? (with closing quotes or brackets) before white space,
    unless a lower-case letter follows ("e.g. a cat").
    """
    parts = (" ".join(part.split()) for part in _SENTENCE_END.split(text))
    return [part for part in parts if not is_invisible(part)]


def shorten(text: str, num_words: int, how: str, rng: np.random.Generator) -> str:
    """Returns at most `num_words` words of a text; one that is short enough is returned as it is.

    "random": words drawn without replacement, in their order; "block": a run of words that begins
    anywhere; "syntax": nouns before adjectives before verbs before all else, the earlier first, in
    their order (English); "truncate": the first. Words are what white space parts, so the tokenizer
    may still have to cut. Source: CLIPA (Li et al. 2023, arXiv:2305.07017, §3.2), at the level of
    words.
    """
    words = [w for w in text.split() if not is_invisible(w)]
    if how not in SHORTEN:
        raise check.unknown("config.data.shorten", how, SHORTEN)
    if len(words) <= num_words:
        return text
    if how == "random":
        kept = np.sort(rng.choice(len(words), num_words, replace=False))
    elif how == "syntax":
        kept = np.sort(np.argsort(_ranks(words), kind="stable")[:num_words])
    else:
        start = int(rng.integers(len(words) - num_words + 1)) if how == "block" else 0
        return " ".join(words[start : start + num_words])
    return " ".join(words[i] for i in kept)


def _ranks(words: Sequence[str]) -> list[int]:
    """0 for nouns, 1 for adjectives, 2 for verbs, 3 for the rest."""
    bare = [
        w.strip(".,;:!?\"'()[]") or w for w in words
    ]  # tags are for words, punctuation confuses
    found = _tagger()(" ".join(bare), tokenize=False)
    classes = ("NN", "JJ", "VB")
    ranks = [next((k for k, c in enumerate(classes) if tag.startswith(c)), 3) for _, tag in found]
    return ranks if len(ranks) == len(words) else [3] * len(words)


@functools.cache
def _tagger() -> Callable:
    """The part-of-speech tagger of TextBlob: a lexicon and rules within the package, no download."""
    try:
        from textblob.en import tag  # here, because only this needs it
    except ImportError:
        got, do = "'syntax' without the package textblob", 'run `pip install "vlp[syntax]"`'
        raise check.error("config.data.shorten", got, "it", do) from None
    tag("a word", tokenize=False)  # reads its lexicon once, before threads ask for it
    return tag


def check_shorten(where: str, how: str) -> None:
    """Raises a `UserError` unless `how` is one of `SHORTEN` and its package is there."""
    if how not in SHORTEN:
        raise check.unknown(where, how, SHORTEN)
    if how == "syntax":
        _tagger()
