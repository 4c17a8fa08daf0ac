"""Which of a record's captions a sample uses."""

from collections.abc import Sequence

import numpy as np

from vlp.core import check

POLICIES = ("first", "uniform", "all")


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
