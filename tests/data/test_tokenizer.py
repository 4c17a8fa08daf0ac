"""The tokenizer contract: special ids, truncation that keeps eos, bytes that define everything."""

import io
import pickle

import numpy as np
import pytest
import sentencepiece

from vlp.core import check
from vlp.data import tokenizer


def test_row_is_bos_pieces_eos_pads(small_tokenizer):
    t = small_tokenizer
    row = t.encode("red cat", 12)
    assert row.dtype == np.int32 and row.shape == (12,)
    end = int(np.argmax(row == t.eos_id))
    assert row[0] == t.bos_id and (row[end + 1 :] == t.pad_id).all() and (row[:end] > 0).all()
    assert t.decode(row) == "red cat"


def test_truncation_keeps_eos_and_is_told(small_tokenizer):
    eos, pad, row = small_tokenizer.eos_id, small_tokenizer.pad_id, np.empty(7, np.int32)
    assert small_tokenizer.encode_into("red cat sleeps " * 10, row)
    assert row[-1] == eos and (row != 0).all()
    assert not small_tokenizer.encode_into("red", row) and row[-1] == pad
    fit = len(small_tokenizer.encode("red cat", 20).nonzero()[0])
    assert not small_tokenizer.encode_into("red cat", np.empty(fit, np.int32))  # exactly full
    assert small_tokenizer.encode_into("red cat", np.empty(fit - 1, np.int32))


def test_empty_text_and_short_rows(small_tokenizer):
    assert small_tokenizer.encode("", 4).tolist() == [1, 2, 0, 0]
    assert small_tokenizer.decode([1, 2, 0, 0]) == ""
    with pytest.raises(check.UserError, match="at least 3"):
        small_tokenizer.encode("red", 2)


def test_lower_case_is_in_the_model(small_tokenizer):
    assert small_tokenizer.lower
    np.testing.assert_array_equal(
        small_tokenizer.encode("RED Cat", 9), small_tokenizer.encode("red cat", 9)
    )
    cased = tokenizer.train(["Red cat", "red Cat", "a A"] * 4, 40, lower=False, model_type="bpe")
    assert not cased.lower


def test_decode_stops_at_eos_and_skips_specials(small_tokenizer):
    t = small_tokenizer
    red, dog = t.encode("red", 6)[1:3], t.encode("dog", 6)[1:3]
    ids = [0, t.bos_id, *red[red > 2], 0, t.eos_id, *dog]
    assert t.decode(ids) == "red"
    with pytest.raises(check.UserError, match="id 9999"):
        t.decode([9999])


def test_bytes_and_pickle_round_trip(small_tokenizer, tmp_path):
    t = tokenizer.Tokenizer.from_bytes(small_tokenizer.to_bytes())
    assert t == small_tokenizer == pickle.loads(pickle.dumps(t))
    assert t.sha256 == small_tokenizer.sha256 and hash(t) == hash(small_tokenizer)
    (tmp_path / "t.model").write_bytes(t.to_bytes())
    assert tokenizer.load(tmp_path / "t.model") == t


def test_training_is_deterministic_and_caps_the_vocabulary():
    texts = ["red cat", "blue dog", "green bird"] * 5
    assert tokenizer.train(texts, 5000) == tokenizer.train(texts, 5000)
    assert tokenizer.train(texts, 5000).vocab_size < 100


def test_bad_models_are_refused(tmp_path):
    with pytest.raises(check.UserError, match="not a file"):
        tokenizer.load(tmp_path / "none.model")
    with pytest.raises(check.UserError, match="cannot read"):
        tokenizer.Tokenizer(b"nonsense")
    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(  # its defaults: unk 0, bos 1, eos 2, no pad
        sentence_iterator=iter(["red cat", "blue dog"] * 5),
        model_writer=out,
        vocab_size=20,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    with pytest.raises(check.UserError, match=r"got pad, bos, eos, unk = \[-1, 1, 2, 0\]"):
        tokenizer.Tokenizer(out.getvalue())
    with pytest.raises(check.UserError, match="vocab_size: got 6"):
        tokenizer.train(["red cat", "blue dog"], 6)


TAGGED = ["was <s>20</s> now <pad> dollars", "a red cat sees <unk> things"] * 9


def sentencepiece_with(**options):
    out = io.BytesIO()
    texts = ["was < s > 20 < / s > now < pad > dollars", "a red cat sees < unk > things 2 0 d"] * 9
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts), model_writer=out, vocab_size=60, hard_vocab_limit=False,
        character_coverage=1.0, pad_id=0, bos_id=1, eos_id=2, unk_id=3, minloglevel=2, **options,
    )  # fmt: skip
    return tokenizer.Tokenizer(out.getvalue())


@pytest.mark.parametrize(
    "options", [{}, {"user_defined_symbols": "<s>,</s>,<pad>"}, {"control_symbols": "20,red"}]
)
def test_control_tokens_in_a_text_are_text(options):
    t = sentencepiece_with(**options) if options else tokenizer.train(TAGGED, 80)
    for text in ("was <s>20</s> now <pad> dollars", "</s>", "a <pad>", "<s><s>", "red <unk>"):
        row = t.encode(text, 64)
        end = int(np.argmax(row == 2))
        assert row[0] == 1 and (row[1:end] >= 4).all() and (row[end + 1 :] == 0).all()
        assert t.decode(row) == text


@pytest.mark.parametrize("kind", ["control_symbols", "user_defined_symbols"])
def test_the_models_own_mask_token_is_the_mask(kind):
    """It hides words, and a text that spells it is text."""
    t = sentencepiece_with(**{kind: "<mask>"})
    assert 4 <= t.mask_id < t.vocab_size == t.num_ids
    row = t.encode("was <mask> 20", 64)
    assert t.mask_id not in row
    assert t.decode([1, row[1], t.mask_id, 2]) == t.decode([1, row[1], 2])
    assert tokenizer.Tokenizer.from_bytes(t.to_bytes()).mask_id == t.mask_id


def test_without_a_mask_token_the_mask_is_behind_the_vocabulary(small_tokenizer):
    t = small_tokenizer
    assert t.mask_id == t.vocab_size == t.num_ids - 1
    row = t.encode("red cat", 8)
    assert t.decode([*row[:3], t.mask_id, 2]) == t.decode([*row[:3], 2])
    with pytest.raises(check.UserError, match=f"id {t.num_ids}"):
        t.decode([t.num_ids])
    assert pickle.loads(pickle.dumps(t)).mask_id == t.mask_id


def test_long_texts_take_part():
    long = "Описание: " + "длинный рассказ о картине " * 400
    solid = "猫" * 3000  # no white space: cut anywhere
    short = [f"a small dog number {i}" for i in range(30)]
    t = tokenizer.train([*short, long, solid, "блок ▅ щ"], 300)
    for text in (long, solid, "щ"):
        assert t.unk_id not in t.encode(text, 9000)
    assert tokenizer.train(["слово " * 900] * 5, 100).decode([5, 4]) is not None
    assert tokenizer.train(short, 300) == tokenizer.train([s + "  " for s in short], 300)
    parts = list(tokenizer._parts(long))
    assert "".join(parts) == long and all(p[-1] == " " for p in parts)
    assert all(
        len(p.encode()) <= tokenizer.MAX_BYTES
        for x in (long, solid, " " * 5000)
        for p in tokenizer._parts(x)
    )


def test_blank_after_normalisation(small_tokenizer):
    for text in ("", "\u200b", "\u3164", "\xa0", "\0", "\u200e\u200f"):
        assert small_tokenizer.is_blank(text)
    for text in ("red", "7", "猫", "🐱", "!"):  # unknown is not blank
        assert not small_tokenizer.is_blank(text)


def test_text_that_utf8_cannot_hold(small_tokenizer):
    for text in ("\ud800", "red \udcff cat"):
        with pytest.raises(check.UserError, match="text: got .*expected text that UTF-8 can hold"):
            small_tokenizer.encode(text, 8)
        with pytest.raises(check.UserError, match="texts: got .*expected text that UTF-8 can hold"):
            tokenizer.train(["red", text], 50)
