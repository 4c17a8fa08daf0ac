"""The caption policies."""

import numpy as np
import pytest

from vlp.core import check
from vlp.data import text_ops

CAPTIONS = [
    {"text": "a", "source": "x", "lang": "en"},
    {"text": "b", "source": "x", "lang": "de"},
    {"text": "c", "source": "y", "lang": "en"},
]


def test_policies():
    choose = text_ops.choose
    assert choose(CAPTIONS, policy="first") == ["a"]
    assert choose(CAPTIONS, policy="first", langs=("de",)) == ["b"]
    assert choose(CAPTIONS, policy="all", num=4, langs=("en",)) == ["a", "c", "a", "c"]
    assert choose(CAPTIONS, policy="all", num=2) == ["a", "b"]
    rng = np.random.default_rng(0)
    drawn = [choose(CAPTIONS, policy="uniform", rng=rng)[0] for _ in range(300)]
    assert all(70 < drawn.count(x) < 130 for x in "abc")


def test_errors():
    with pytest.raises(check.UserError, match=r"captions only in \['de', 'en'\]"):
        text_ops.choose(CAPTIONS, policy="first", langs=("fr",))
    with pytest.raises(check.UserError, match="did you mean 'uniform'"):
        text_ops.choose(CAPTIONS, policy="unifrom")
