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


def test_each_policy_draws_its_captions():
    choose = text_ops.choose
    assert choose(CAPTIONS, policy="first") == ["a"]
    assert choose(CAPTIONS, policy="first", langs=("de",)) == ["b"]
    assert choose(CAPTIONS, policy="all", num=4, langs=("en",)) == ["a", "c"]
    assert choose(CAPTIONS, policy="all", num=2) == ["a", "b"]
    rng = np.random.default_rng(0)
    drawn = [choose(CAPTIONS, policy="uniform", rng=rng)[0] for _ in range(300)]
    assert all(70 < drawn.count(x) < 130 for x in "abc")


def test_captions_are_weighted_by_source():
    """Two thirds for the rewrites, however many there are; of these by their own weights."""
    rewrites = [{"text": t, "source": "rewrite", "lang": "en", "weight": w} for t, w in
                (("r", 1.0), ("s", 3.0), ("t", 0.0))]  # fmt: skip
    captions = [*CAPTIONS, *rewrites]
    sources, rng = {"rewrite": 2.0, "x": 1.0, "none here": 5.0}, np.random.default_rng(0)
    draw = lambda policy, **more: text_ops.choose(
        captions, policy=policy, sources=sources, rng=rng, **more
    )
    drawn = [draw("weighted", langs=("en",))[0] for _ in range(1200)]
    for text, share in {"a": 1 / 3, "r": 1 / 6, "s": 1 / 2, "t": 0, "c": 0}.items():
        assert abs(drawn.count(text) - 1200 * share) <= 60 * (share > 0), text
    assert draw("all", num=5) == ["a", "b", "r", "s", "t"]
    assert {draw("uniform")[0] for _ in range(100)} == set("abrst")
    with pytest.raises(check.UserError, match=r"in \['de', 'en'\] from \['x', 'y'\], .*from \['z'"):
        text_ops.choose(CAPTIONS, policy="first", sources={"z": 1.0})


def test_shortened_texts():
    """How often each word survives: all words for "random", the middle ones most for "block", the first for neither."""
    text, rng = "a b c d e f", np.random.default_rng(0)
    draw = lambda how: [text_ops.shorten(text, 3, how, rng).split() for _ in range(400)]
    for how in ("random", "block"):
        rows = draw(how)
        assert all(len(row) == 3 and row == sorted(row) for row in rows)
        counts = np.array([sum(w in row for row in rows) for w in text.split()])
        if how == "random":
            assert (abs(counts - 200) < 50).all()
        else:  # 4 runs, of which a word is in 1, 2, 3, 3, 2, 1
            assert (abs(counts - 100 * np.array([1, 2, 3, 3, 2, 1])) < 50).all()
            assert {"".join(row) for row in rows} == {"abc", "bcd", "cde", "def"}
    assert draw("truncate") == [["a", "b", "c"]] * 400
    assert text_ops.shorten("a  b", 2, "random", rng) == "a  b"


def test_syntax_keeps_nouns_then_adjectives_then_verbs():
    pytest.importorskip("textblob")
    text = "a small dog is running on the green grass."
    keep = lambda n: text_ops.shorten(text, n, "syntax", np.random.default_rng(0))
    assert keep(1) == "dog" and keep(2) == "dog grass."
    assert keep(3) == "small dog grass." and keep(4) == "small dog green grass."
    assert keep(6) == "small dog is running green grass."
    assert keep(7) == "a small dog is running green grass." and keep(9) == text


BLANK = [
    "",
    " ",
    "\u200b",
    "\ufeff\u200d",
    "\xa0\u2003",
    "\u3164",
    "\u115f\uffa0",
    "\0\x07",
    "\u2800",
    "\xad",
    "\ufe0f",
]
TEXT = ["!", "é", "猫", "\u200bx", "👩\u200d🚀", "Ⅻ", "\U0001fae8", "\ue000", "…"]


def test_blank_texts_are_no_captions():
    of = lambda *texts: [{"text": t, "lang": "en"} for t in texts]
    for text in BLANK:
        assert text_ops.is_invisible(text), repr(text)
        assert text_ops.choose(of(text, "cat"), policy="first") == ["cat"]
        with pytest.raises(text_ops.BadCaption) as e:
            text_ops.choose(of(text), policy="first")
        assert e.value.reason == "no_caption"
    for text in TEXT:
        assert not text_ops.is_invisible(text) and text_ops.is_utf8(text)
        assert text_ops.choose(of(text), policy="first") == [text]
    for how in ("random", "block", "truncate"):  # what is invisible is no word
        drawn = {
            text_ops.shorten("a \u200b \u3164 b", 1, how, np.random.default_rng(p))
            for p in range(9)
        }
        assert drawn <= {"a", "b"}


@pytest.mark.parametrize("text", ["\ud800", "a cat \udcff", "\udc80\ud800"])
def test_lone_surrogates_are_bad_captions(text):
    assert not text_ops.is_utf8(text)
    with pytest.raises(text_ops.BadCaption, match="captions") as e:
        text_ops.choose([{"text": text, "lang": "en"}], policy="first")
    assert e.value.reason == "bad_caption"
    str(e.value).encode()  # what is printed can be


def test_mistakes_in_text_settings_are_one_line():
    with pytest.raises(check.UserError, match="config.data.shorten.*did you mean 'block'"):
        text_ops.shorten("a b", 1, "blok", np.random.default_rng(0))
    with pytest.raises(check.UserError, match=r"captions only in \['de', 'en'\]"):
        text_ops.choose(CAPTIONS, policy="first", langs=("fr",))
    with pytest.raises(check.UserError, match="did you mean 'uniform'"):
        text_ops.choose(CAPTIONS, policy="unifrom")
