"""Which of a record's captions a sample uses, and how a long one is shortened."""

from collections.abc import Sequence

import numpy as np

from vlp.core import check

POLICIES = ("first", "uniform", "all")
SHORTEN = ("truncate", "random", "block")


def choose(
    captions: Sequence[dict],
    *,
    policy: str,
    langs: Sequence[str] = (),
    num: int = 1,
    rng: np.random.Generator | None = None,
    where: str = "captions",
) -> list[str]:
    """Returns the caption texts of one sample, out of those in `langs` (empty: any language).

    "first": the first; "uniform": one drawn from `rng`; "all": the first `num`, repeated in a cycle
    if there are fewer.
    Raises: `UserError` if no caption is left.
    """
    texts = [c["text"] for c in captions if not langs or c["lang"] in langs]
    if not texts:
        raise check.error(
            where,
            f"captions only in {sorted({c['lang'] for c in captions})}",
            f"one in {list(langs)}",
            "change config.data.langs",
        )
    if policy == "first":
        return texts[:1]
    if policy == "uniform":
        assert rng is not None, "uniform needs a generator"
        return [texts[int(rng.integers(len(texts)))]]
    if policy == "all":
        return [texts[i % len(texts)] for i in range(num)]
    raise check.unknown("config.data.captions", policy, POLICIES)


def shorten(text: str, num_words: int, how: str, rng: np.random.Generator) -> str:
    """Returns at most `num_words` words of a text; one that is short enough is returned as it is.

    "random": words drawn without replacement, in their order; "block": a run of words that begins
    anywhere; "truncate": the first. Words are what white space parts, so the tokenizer may still
    have to cut. Source: CLIPA (Li et al. 2023, arXiv:2305.07017, §3.2), at the level of words.
    """
    words = text.split()
    if how not in SHORTEN:
        raise check.unknown("config.data.shorten", how, SHORTEN)
    if len(words) <= num_words:
        return text
    if how == "random":
        kept = np.sort(rng.choice(len(words), num_words, replace=False))
        return " ".join(words[i] for i in kept)
    start = int(rng.integers(len(words) - num_words + 1)) if how == "block" else 0
    return " ".join(words[start : start + num_words])
