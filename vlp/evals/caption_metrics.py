"""BLEU, ROUGE-L and CIDEr-D of captions as coco-caption computes them, in plain Python; how varied captions are.

Numbers of `bleu`, `rouge_l` and `cider_d` equal those of pycocoevalcap 1.2 for the same tokens. `ptb` replaces its Java
tokenizer; docs/evaluation.md says where the two differ. METEOR and SPICE exist in Java alone: see `with_java`.
"""

from __future__ import annotations

import collections
import contextlib
import importlib.util
import io
import math
import re
import shutil
from collections.abc import Mapping, Sequence
from typing import Any

from vlp.core import check

Tokens = Sequence[str]

# What coco-caption's PTBTokenizer drops. It lower-cases first, so brackets (-lrb-, -rrb-) stay.
_DROPPED = frozenset("'' ' `` ` -LRB- -RRB- -LCB- -RCB- . ? ! , : - -- ... ;".split())
_BRACKETS = {"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-"}
_QUOTES = str.maketrans({"’": "'", "‘": "'", "“": '"', "”": '"', "–": "--", "—": "--", "`": "'"})
_SPLIT = {  # words that the treebank splits
    "cannot": ("can", "not"), "gonna": ("gon", "na"), "gotta": ("got", "ta"),
    "wanna": ("wan", "na"), "gimme": ("gim", "me"), "lemme": ("lem", "me"),
}  # fmt: skip
_SHORT = frozenset(  # abbreviations that keep their full stop
    "mr mrs ms dr st jr sr prof rev gen lt col sgt capt gov sen rep vs etc inc ltd co corp no mt ft ave blvd".split()
)
_TOKEN = re.compile(
    r"""
    https?://\S+ | [\w.+-]+@[\w-]+(?:\.[\w-]+)+
  | (?:[a-z]\.){2,}                                # u.s.
  | (?<!\w)[a-z]\.(?=\s+\w)                        # a. b. smith
  | '?\d+(?:[.,:/-]\d+)*(?:st|nd|rd|th|s)?\b       # 1,000.50  12:30  1/2  3-4  2nd
  | o'[^\W\d_]+ | c'mon | 'n'                      # o'clock
  | [^\W\d_]+n't(?!\w)                             # isn't: split below
  | [\w&]+(?:[-/&_][\w&]+|\.[\w&]+)*               # close-up
  | '(?:s|m|d|ll|ve|re)(?!\w)                      # what follows a word
  | \.{2,} | -{2,} | [?!]{2,} | [^\w\s]
    """,
    re.VERBOSE,
)
_NO_WORD = re.compile(r'\.{2,}|-{2,}|"|[\U0001f000-\U0001faff\u2600-\u27bf\ufe0f\u200d]')


def ptb(text: str) -> list[str]:
    """Returns the lower-case words of a caption in the manner of the Penn treebank, without punctuation."""
    text = text.lower().translate(_QUOTES)
    found: list[str] = []
    for match in _TOKEN.finditer(text):
        word = match.group()
        if word.endswith("n't") and len(word) > 3:
            found += [word[:-3], "n't"]
        elif word in _SPLIT:
            found += _SPLIT[word]
        elif word == "." and found and found[-1] in _SHORT and text[match.start() - 1] != " ":
            found[-1] += "."
        else:
            found.append(_BRACKETS.get(word, word))
    return [w for w in found if w not in _DROPPED and not _NO_WORD.fullmatch(w)]


def ngrams(tokens: Tokens, most: int = 4) -> collections.Counter[tuple[str, ...]]:
    """Returns the counts of all n-grams of 1 … `most` tokens."""
    return collections.Counter(
        tuple(tokens[i : i + n]) for n in range(1, most + 1) for i in range(len(tokens) - n + 1)
    )


def bleu(captions: Sequence[Tokens], references: Sequence[Sequence[Tokens]]) -> list[float]:
    """Returns BLEU-1 … BLEU-4 of the corpus (Papineni et al. 2002), clipped, with the closest reference's length.

    The constants are coco-caption's, which keep an empty count from being 0.
    """
    tiny, small = 1e-15, 1e-9
    length = ref_length = 0
    right, guessed = [0] * 4, [0] * 4
    for tokens, refs in zip(captions, references, strict=True):
        most: collections.Counter = collections.Counter()
        for ref in refs:
            most |= ngrams(ref)
        for gram, num in (ngrams(tokens) & most).items():
            right[len(gram) - 1] += num
        for n in range(4):
            guessed[n] += max(0, len(tokens) - n)
        length += len(tokens)
        ref_length += min((abs(len(ref) - len(tokens)), len(ref)) for ref in refs)[1]
    ratio = (length + tiny) / (ref_length + small)
    brevity = math.exp(1 - 1 / ratio) if ratio < 1 else 1.0
    out, product = [], 1.0
    for n in range(4):
        product *= (right[n] + tiny) / (guessed[n] + small)
        out.append(product ** (1 / (n + 1)) * brevity)
    return out


def rouge_l(captions: Sequence[Tokens], references: Sequence[Sequence[Tokens]]) -> float:
    """Returns the mean of ROUGE-L (Lin 2004) with β 1.2; precision and recall are each the best of the references."""
    beta2, total = 1.2**2, 0.0
    for tokens, refs in zip(captions, references, strict=True):
        tokens, refs = tokens or [""], [ref or [""] for ref in refs]
        common = [_lcs(tokens, ref) for ref in refs]
        precision = max(c / len(tokens) for c in common)
        recall = max(c / len(ref) for c, ref in zip(common, refs))
        if precision and recall:
            total += (1 + beta2) * precision * recall / (recall + beta2 * precision)
    return total / len(captions)


def _lcs(a: Tokens, b: Tokens) -> int:
    """Returns the length of the longest common subsequence."""
    row = [0] * (len(b) + 1)
    for x in a:
        before = 0
        for j, y in enumerate(b, 1):
            before, row[j] = row[j], before + 1 if x == y else max(row[j], row[j - 1])
    return row[-1]


def cider_d(captions: Sequence[Tokens], references: Sequence[Sequence[Tokens]]) -> float:
    """Returns CIDEr-D (Vedantam et al. 2015), mean over images, × 10: clipped, with a Gaussian of the lengths, σ 6.

    Document frequencies are those of the references of this set, so the number depends on the whole set.
    """
    df: collections.Counter = collections.Counter()
    for refs in references:
        df.update({gram for ref in refs for gram in ngrams(ref)})
    log_num = math.log(len(references))

    def weigh(tokens: Tokens) -> tuple[list[dict], list[float], int]:
        vectors: list[dict] = [{} for _ in range(4)]
        for gram, num in ngrams(tokens).items():
            vectors[len(gram) - 1][gram] = num * (log_num - math.log(max(1, df[gram])))
        norms = [math.sqrt(sum(v * v for v in vector.values())) for vector in vectors]
        return vectors, norms, max(0, len(tokens) - 1)  # coco-caption counts pairs of words

    total = 0.0
    for tokens, refs in zip(captions, references, strict=True):
        vectors, norms, length = weigh(tokens)
        score = 0.0
        for ref in refs:
            ref_vectors, ref_norms, ref_length = weigh(ref)
            penalty = math.exp(-((length - ref_length) ** 2) / (2 * 6.0**2))
            for n in range(4):
                value = sum(
                    min(v, ref_vectors[n].get(gram, 0.0)) * ref_vectors[n].get(gram, 0.0)
                    for gram, v in vectors[n].items()
                )
                if norms[n] and ref_norms[n]:
                    value /= norms[n] * ref_norms[n]
                score += value * penalty / 4
        total += 10 * score / len(refs)
    return total / len(captions)


def distinct(captions: Sequence[Tokens], n: int) -> float:
    """Returns the share of different n-grams among all n-grams of the captions (Li et al. 2016); 0 without any."""
    grams = [tuple(c[i : i + n]) for c in captions for i in range(len(c) - n + 1)]
    return len(set(grams)) / len(grams) if grams else 0.0


def score(captions: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
    """Returns every metric of this module.

    Args:
        captions: one text an image.
        references: one or more texts an image.
    """
    said = [ptb(text) for text in captions]
    refs = [[ptb(text) for text in texts] for texts in references]
    out = {f"bleu_{n}": value for n, value in enumerate(bleu(said, refs), 1)}
    out |= {"rouge_l": rouge_l(said, refs), "cider_d": cider_d(said, refs)}
    out |= {f"distinct_{n}": distinct(said, n) for n in (1, 2)}
    return out | {"words": sum(map(len, said)) / len(said)}


def check_java(where: str) -> None:
    """Raises UserError unless METEOR and SPICE can run: pycocoevalcap is installed, and Java."""
    if importlib.util.find_spec("pycocoevalcap") is None:
        do = "pip install pycocoevalcap, or set java=False"
        raise check.error(where, "no package pycocoevalcap", "METEOR and SPICE", do)
    if shutil.which("java") is None:
        do = "install a Java runtime, or set java=False"
        raise check.error(where, "no program java", "METEOR and SPICE, which run in Java", do)


def with_java(
    captions: Sequence[str], references: Sequence[Sequence[str]], spice: bool = False
) -> dict[str, float]:
    """Returns what pycocoevalcap computes with Java's tokenizer: its BLEU, ROUGE-L, CIDEr-D and METEOR (and SPICE).

    SPICE downloads its parser the first time. Call `check_java` before.
    """
    load: Any = importlib.import_module
    tokenizer = load("pycocoevalcap.tokenizer.ptbtokenizer").PTBTokenizer()
    as_rows = lambda texts: {i: [{"caption": t} for t in ts] for i, ts in enumerate(texts)}
    metrics: dict[str, Any] = {
        "bleu": load("pycocoevalcap.bleu.bleu").Bleu(4),
        "rouge_l": load("pycocoevalcap.rouge.rouge").Rouge(),
        "cider_d": load("pycocoevalcap.cider.cider").Cider(),
        "meteor": load("pycocoevalcap.meteor.meteor").Meteor(),
    }
    if spice:
        metrics["spice"] = load("pycocoevalcap.spice.spice").Spice()
    out: dict[str, float] = {}
    with contextlib.redirect_stdout(io.StringIO()):  # they print
        refs = tokenizer.tokenize(as_rows(references))
        said = tokenizer.tokenize(as_rows([[c] for c in captions]))
        for name, metric in metrics.items():
            value = metric.compute_score(refs, said)[0]
            values: Mapping = (
                {f"bleu_{n}": v for n, v in enumerate(value, 1)}
                if name == "bleu"
                else {name: value}
            )
            out |= {f"java/{k}": float(v) for k, v in values.items()}
    return out
