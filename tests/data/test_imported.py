"""Imported tokenizers keep their pieces and get our ids."""

import gzip
import json
import pickle

import pytest
import test_cli_data

from vlp.core import check
from vlp.data import imported, tokenizer

tokenizers = pytest.importorskip("tokenizers")


def wordpiece() -> bytes:
    names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "red", "cat", "##s"]
    model = tokenizers.models.WordPiece({n: i for i, n in enumerate(names)}, unk_token="[UNK]")
    made = tokenizers.Tokenizer(model)
    made.normalizer = tokenizers.normalizers.Lowercase()
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    made.decoder = tokenizers.decoders.WordPiece()
    made.add_special_tokens(names[:4])
    made.enable_padding(length=32)
    made.enable_truncation(2)
    return made.to_str().encode()


def test_a_cased_tokenizer_is_lowered_where_asked(tmp_path, capsys):
    cased = json.loads(wordpiece()) | {"normalizer": None}
    (tmp_path / "tokenizer.json").write_text(json.dumps(cased))
    rows = []
    for name, flags in (("as_is", ()), ("lower", ("--lower",))):
        given = ("--from", tmp_path / "tokenizer.json", "--out", tmp_path / name, *flags)
        assert test_cli_data.run("tokenizer", *given) == 0
        tok = tokenizer.load(tmp_path / name)
        rows.append(tok.encode("A Red cats", 6).tolist())
        assert tok.lower == (name == "lower")
    assert rows == [[1, 3, 3, 6, 7, 2], [1, 4, 5, 6, 7, 2]]
    out = capsys.readouterr().out
    assert "keeps case, [bos]" in out and "lower-cases, [bos]" in out


def test_tokenizer_json(tmp_path):
    (tmp_path / "tokenizer.json").write_bytes(wordpiece())
    flags = ("--from", tmp_path / "tokenizer.json", "--out", tmp_path / "tok")
    assert test_cli_data.run("tokenizer", *flags) == 0
    tok = tokenizer.load(tmp_path / "tok")
    # pad bos eos unk, then a red cat ##s
    assert tok.encode("A red cats zebra", 9).tolist() == [1, 4, 5, 6, 7, 3, 2, 0, 0]
    assert tok.encode("a red cats", 5).tolist() == [1, 4, 5, 6, 2]
    assert tok.decode([1, 4, 5, 6, 7, 2, 0]) == "a red cats"
    assert tok.vocab_size == 8 and tok.lower
    assert imported.Pieces(tok.to_bytes(), "").old_ids == [0, 2, 3, 1, 4, 5, 6, 7]
    assert pickle.loads(pickle.dumps(tok)) == tok
    with pytest.raises(check.UserError, match="no tokenizer"):
        tokenizer.Tokenizer(b"{}")


def test_clip_merges():
    merges = ["#version: 0.2", "c a", "ca t</w>", "d o", "do g</w>"]
    data = gzip.compress("\n".join(merges).encode())
    tok = tokenizer.Tokenizer(imported.clip_bpe(data))
    old = imported.Pieces(tok.to_bytes(), "").old_ids
    assert tok.vocab_size == 512 + 4 + 2 + 2  # with a pad and an unk, which CLIP has not
    ids = [old[i] for i in tok.encode("Cat  dog's!", 10).tolist()]
    # start, cat, dog, ', s at a word's end, !, end: by hand from the order of the file
    apostrophe, s, bang = (ord(x) - 33 for x in "'s!")
    byte_pair = [512 + 1, 512 + 3]
    assert ids[:3] == [516, *byte_pair] and 517 in ids
    assert ids[3:6] == [apostrophe, s + 256, bang + 256]
    assert tok.decode(tok.encode("a cat, Über", 40)) == "a cat , über"
    assert json.loads(tok.to_bytes())["model"]["type"] == "BPE"
    with pytest.raises(check.UserError, match="no pairs"):
        imported.clip_bpe(b"#version\none two three")
