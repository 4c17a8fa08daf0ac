"""Rows of ids as other models have them, text cleaning, and tokenizers in their own numbering."""

import gzip
import io
import json
import pickle

import numpy as np
import pytest
import sentencepiece

from helpers.formats import clip_merges
from vlp.core import check
from vlp.data import text_ops, tokenizer, tokenizer_formats
from vlp.data.config import Data, check_data
from vlp.data.dataset import open_dataset
from vlp.data.tokenizer import Row, Tokenizer

TEXTS = ["a red cat on a mat", "a blue dog", "two red dogs and a cat"]


@pytest.fixture(scope="module")
def ours() -> Tokenizer:
    return tokenizer.train(TEXTS * 4, 60)


def t5() -> bytes:
    """A SentencePiece model in T5's layout: pad 0, eos 1, unk 2, no bos."""
    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS * 20), model_writer=out, model_type="unigram", vocab_size=40,
        pad_id=0, eos_id=1, unk_id=2, bos_id=-1, hard_vocab_limit=False, minloglevel=2,
    )  # fmt: skip
    return out.getvalue()


def test_rows_without_bos_filled_with_eos(ours):
    """SigLIP's: pieces, then eos to the end; truncation keeps one."""
    row = ours.with_row(bos=False, fill="eos")
    plain = ours.encode("a red cat", 10).tolist()
    pieces = plain[1 : plain.index(2)]
    assert row.encode("a red cat", 10).tolist() == pieces + [2] * (10 - len(pieces))
    assert row.encode("a red cat", 3).tolist() == [*pieces[:2], 2]
    assert row.decode(row.encode("a red cat", 10)) == "a red cat"
    assert ours.with_row(eos=False).encode("a red cat", 10).tolist() == [
        x if x != 2 else 0 for x in plain
    ]


def test_a_row_is_part_of_the_bytes(ours):
    row = ours.with_row(fill="eos", clean="siglip")
    assert row != ours and ours.with_row() is ours
    for again in (Tokenizer.from_bytes(row.to_bytes()), pickle.loads(pickle.dumps(row))):
        assert again == row and again.row == row.row
    assert row.plain_bytes() == ours.to_bytes() == ours.plain_bytes()
    assert row.with_row(fill="pad", clean="none") == ours


def test_a_row_of_a_file_is_kept(ours, tmp_path):
    (tmp_path / "words").write_bytes(ours.with_row(bos=False).to_bytes())
    assert tokenizer.load(tmp_path / "words").row == Row(bos=False)


def test_broken_rows_are_one_line(ours):
    with pytest.raises(check.UserError, match="fill"):
        ours.with_row(fill="bos")
    with pytest.raises(check.UserError, match="clean.*did you mean 'lower'"):
        ours.with_row(clean="lowr")
    with pytest.raises(check.UserError, match="broken file"):
        Tokenizer(b'{"vlp_row": {"x": 1}}')


@pytest.mark.parametrize(
    ("how", "want"),
    [
        ("none", " A  “Cat”&amp;amp; don't_go!\n"),
        ("siglip", "a “cat”ampamp dontgo"),
        ("whitespace", 'A "Cat"& don\'t_go!'),
        ("lower", 'a "cat"& don\'t_go!'),
        ("canonicalize", "a cat dont go"),
    ],
)
def test_cleaning(how, want):
    """The same text as CLIP, OpenCLIP and transformers clean it."""
    if how not in ("none", "siglip"):
        pytest.importorskip("ftfy")
    assert text_ops.clean(" A  “Cat”&amp;amp; don't_go!\n", how) == want


def test_plain_texts_need_no_repair():
    """The short way, for printable ASCII without &, gives what ftfy and html do."""
    ftfy = pytest.importorskip("ftfy")
    import html

    letters = [chr(i) for i in range(32, 127) if chr(i) != "&"]
    rng = np.random.default_rng(0)
    for _ in range(200):
        text = "".join(rng.choice(letters, 30))
        repaired = html.unescape(html.unescape(ftfy.fix_text(text)))
        assert text_ops.clean(text, "whitespace") == " ".join(repaired.split())


def test_the_configs_fields_change_the_rows_of_a_run(ours):
    data = Data(source="shapes", num_records=8, bos=False, fill="eos", clean="siglip", text_len=8)
    made = open_dataset(data, tokenizer=ours)
    assert made.tokenizer.row == Row(bos=False, fill="eos", clean="siglip")
    assert made.eval_batch(0, 2)["text"][:, -1].tolist() == [2, 2]
    for wrong in (dict(fill="x"), dict(clean="x"), dict(crop="x"), dict(eval_crop="x")):
        with pytest.raises(check.UserError, match=f"config.data.{next(iter(wrong))}"):
            check_data(Data(**wrong))


def test_a_sentencepiece_model_keeps_its_own_ids():
    model = t5()
    plain = sentencepiece.SentencePieceProcessor(model_proto=model)
    row = Row(bos=False, fill="eos", ids=(-1, -1, 1, 2))
    tok = Tokenizer(tokenizer.wrapped(model, row))
    assert (tok.pad_id, tok.bos_id, tok.eos_id, tok.unk_id) == (-1, -1, 1, 2)
    pieces = plain.encode("a red cat")
    assert tok.encode("a red cat", 12).tolist() == pieces + [1] * (12 - len(pieces))
    assert tok.decode(tok.encode("a red cat", 12)) == "a red cat"
    assert tok.vocab_size == plain.vocab_size() and tok.old_ids == list(range(tok.vocab_size))
    assert 1 not in tok.encode("a </s> b", 12)[: -(12 - len(plain.encode("a </s> b")))]
    with pytest.raises(check.UserError, match="pad, bos, eos, unk"):
        Tokenizer(model)


def test_clip_keeps_48_894_merges():
    """512 + 48,894 + 2 = 49,408 pieces, the end of text the last; further lines of the file are not read."""
    pytest.importorskip("tokenizers")
    spec = json.loads(tokenizer_formats.clip_bpe(gzip.compress(clip_merges(50_000))))
    vocab = spec["model"]["vocab"]
    assert len(spec["model"]["merges"]) == 48_894
    assert vocab["<|startoftext|>"] == 49_406 and vocab["<|endoftext|>"] == 49_407
    assert "qz" not in vocab


def test_a_tokenizer_json_keeps_its_own_ids():
    pytest.importorskip("tokenizers")
    model = tokenizer_formats.clip_bpe(clip_merges(400))
    end = 512 + 400 + 1
    tok = Tokenizer(tokenizer.wrapped(model, Row(ids=(0, end - 1, end, -1))))
    renumbered = Tokenizer(model)
    ids = tok.encode("abc q!", 12)
    assert ids[0] == end - 1 and end in ids.tolist() and ids[-1] == 0
    assert tok.vocab_size == end + 1 and renumbered.vocab_size == end + 1 + 2
    old = np.array(renumbered.old_ids)
    moved = renumbered.encode("abc q!", 12)
    np.testing.assert_array_equal(np.where(moved == 0, 0, old[moved]), ids)
    assert tok.decode(ids) == renumbered.decode(moved) == "abc q !"
