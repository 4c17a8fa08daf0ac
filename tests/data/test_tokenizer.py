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
    with pytest.raises(check.UserError, match="no file"):
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
