"""Imported tokenizers keep their pieces and get our ids."""

import dataclasses
import gzip
import json
import pickle

import numpy as np
import pytest
import test_cli_data

from vlp.core import check
from vlp.data import order, tokenizer, tokenizer_formats
from vlp.data.config import Data
from vlp.data.dataset import Dataset

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
    assert tokenizer_formats.Pieces(tok.to_bytes(), "").old_ids == [0, 2, 3, 1, 4, 5, 6, 7]
    assert pickle.loads(pickle.dumps(tok)) == tok
    with pytest.raises(check.UserError, match="no tokenizer"):
        tokenizer.Tokenizer(b"{}")


def test_clip_merges():
    merges = ["#version: 0.2", "c a", "ca t</w>", "d o", "do g</w>"]
    data = gzip.compress("\n".join(merges).encode())
    tok = tokenizer.Tokenizer(tokenizer_formats.clip_bpe(data))
    old = tokenizer_formats.Pieces(tok.to_bytes(), "").old_ids
    assert tok.vocab_size == 512 + 4 + 2 + 2  # with a pad and an unk, which CLIP has not
    ids = [old[i] for i in tok.encode("Cat  dog's!", 10).tolist()]
    # start, cat, dog, ', s at a word's end, !, end: by hand from the order of the file
    apostrophe, s, bang = (ord(x) - 33 for x in "'s!")
    byte_pair = [512 + 1, 512 + 3]
    assert ids[:3] == [516, *byte_pair] and 517 in ids
    assert ids[3:6] == [apostrophe, s + 256, bang + 256]
    assert tok.decode(tok.encode("a cat, Über", 40)) == "a cat , über"
    assert json.loads(tok.to_bytes())["model"]["type"] == "BPE"
    with pytest.raises(check.UserError, match="exactly two pieces"):
        tokenizer_formats.clip_bpe(b"#version\none two three")


def made(kind, special=("<unk>", "<s>", "</s>", "<pad>")):
    """A tokenizer.json of a model kind that has its special tokens among its pieces, as trainers make them."""
    texts = ["was <s>20</s> now 10 dollars", "what <pad> means", "a [MASK] <unk> b"] * 9
    models, trainers = tokenizers.models, tokenizers.trainers
    if kind == "bpe":
        t = tokenizers.Tokenizer(models.BPE(unk_token="<unk>"))
        trainer = trainers.BpeTrainer(vocab_size=120, special_tokens=list(special))
        t.normalizer = tokenizers.normalizers.Replace(" ", "_")
        t.decoder = tokenizers.decoders.Replace("_", " ")
    elif kind == "unigram":
        t = tokenizers.Tokenizer(models.Unigram())
        trainer = trainers.UnigramTrainer(
            vocab_size=120, special_tokens=list(special), unk_token="<unk>"
        )
        t.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
        t.decoder = tokenizers.decoders.Metaspace()
    elif kind == "bytes":
        t = tokenizers.Tokenizer(models.BPE())
        alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(
            vocab_size=300, special_tokens=list(special), initial_alphabet=alphabet
        )
        t.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
        t.decoder = tokenizers.decoders.ByteLevel()
    else:
        t = tokenizers.Tokenizer(models.WordLevel(unk_token="<unk>"))
        trainer = trainers.WordLevelTrainer(special_tokens=list(special))
        t.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    t.train_from_iterator(texts, trainer)
    return t


@pytest.mark.parametrize("kind", ["bpe", "unigram", "bytes", "words"])
def test_control_tokens_in_a_text_are_text(kind):
    tok = tokenizer.Tokenizer(made(kind).to_str().encode())
    for text in ("was <s>20</s> now 10 dollars", "what <pad> means", "</s>", "a <s>", "<unk> b"):
        row = tok.encode(text, 64).tolist()
        end = row.index(2)
        pieces = row[1:end]
        assert row[0] == 1 and not {0, 1, 2} & set(pieces) and set(row[end + 1 :]) <= {0}
        if kind == "words":  # a word that is no piece is unknown
            assert (3 in pieces) == (text in ("what <pad> means", "</s>", "a <s>", "<unk> b"))
        else:
            assert 3 not in pieces and tok.decode(row) == text
    if kind != "bytes":
        assert 3 in tok.encode("猫", 8).tolist()


@pytest.mark.parametrize("name", ["[MASK]", "<mask>"])
def test_an_imported_mask_token_is_the_mask(name):
    special = ("<unk>", "<s>", "</s>", "<pad>", name)
    tok = tokenizer.Tokenizer(made("words", special).to_str().encode())
    pieces = tokenizer_formats.Pieces(tok.to_bytes(), "")
    old = json.loads(tok.to_bytes())["model"]["vocab"]
    assert pieces.old_ids[tok.mask_id] == old[name] and tok.num_ids == tok.vocab_size
    assert tok.mask_id not in tok.encode(f"was {name} <pad>", 16)
    without = tokenizer.Tokenizer(made("words").to_str().encode())
    assert without.mask_id == without.vocab_size == without.num_ids - 1


def test_every_special_token_of_the_file_is_kept_out_of_texts():
    special = ["<unk>", "<s>", "</s>", "<pad>", "[MASK]"]
    t = made("bpe", special)
    t.add_special_tokens(["<|im_start|>"])
    t.add_tokens(["dollars"])
    tok = tokenizer.Tokenizer(t.to_str().encode())
    old, ids = (
        tokenizer_formats.Pieces(tok.to_bytes(), "").old_ids,
        t.get_vocab(with_added_tokens=True),
    )
    assert sorted(i for i in old if i >= 0) == sorted(ids.values())
    for text, name in (("a [MASK] b", "[MASK]"), ("<|im_start|>a", "<|im_start|>")):
        assert ids[name] not in [old[i] for i in tok.encode(text, 40)]
        assert tok.decode([old.index(ids[name])]) == ""
    assert ids["dollars"] in [old[i] for i in tok.encode("10 dollars", 40)]
    assert tok.decode(tok.encode("now 10 dollars", 40)) == "now 10 dollars"


def own(tok, t):
    """The file's tokens that got the ids pad, bos, eos, unk."""
    names = {i: n for n, i in t.get_vocab(with_added_tokens=True).items()}
    return [names.get(i) for i in tokenizer_formats.Pieces(tok.to_bytes(), "").old_ids[:4]]


def template(t, single):
    tokens = [(x, t.token_to_id(x)) for x in single.split() if x[0] != "$"]
    t.post_processor = tokenizers.processors.TemplateProcessing(
        single=single, special_tokens=tokens
    )


def test_roles_are_the_post_processors():
    """Whatever the names suggest: here "<s>" is an ordinary word, and the real ones have other names."""
    t = made("bpe", ["<unk>", "<begin>", "<end>", "[SEP]"])
    template(t, "<begin> $A <end>")
    tok = tokenizer.Tokenizer(t.to_str().encode())
    assert own(tok, t) == [None, "<begin>", "<end>", "<unk>"]
    t.post_processor = tokenizers.processors.Sequence(
        [tokenizers.processors.ByteLevel(), t.post_processor]
    )
    assert own(tokenizer.Tokenizer(t.to_str().encode()), t) == own(tok, t)
    sep, cls = (("<end>", t.token_to_id("<end>")), ("<begin>", t.token_to_id("<begin>")))
    for kind in ("BertProcessing", "RobertaProcessing"):
        t.post_processor = getattr(tokenizers.processors, kind)(sep, cls)
        assert own(tokenizer.Tokenizer(t.to_str().encode()), t) == own(tok, t)
    t = made("bpe")
    t.enable_padding(pad_token="<s>", pad_id=t.token_to_id("<s>"))
    template(t, "$A </s> <pad>")  # as mBART's: the language comes last
    assert own(tokenizer.Tokenizer(t.to_str().encode()), t)[2] == "</s>"


def test_shared_roles():
    """GPT-2's one token for all: pad and unk get ids of their own, bos and eos share its row."""
    t = made("bytes", ["<|endoftext|>"])
    template(t, "<|endoftext|> $A <|endoftext|>")
    tok = tokenizer.Tokenizer(t.to_str().encode())
    assert own(tok, t) == [None, "<|endoftext|>", "<|endoftext|>", None]
    row = tok.encode("a <|endoftext|> b", 40)
    assert row.tolist().count(2) == 1 and tok.decode(row) == "a <|endoftext|> b"


def test_roles_are_those_of_the_files_beside(tmp_path, capsys):
    """tokenizer_config.json before special_tokens_map.json before names; what is imported holds them itself."""
    t = made("bpe", ["<unk>", "<begin>", "<end>", "<fill>", "<s>"])
    path = tmp_path / "tokenizer.json"
    t.save(str(path))
    with pytest.raises(check.UserError, match=r"special tokens .*'<begin>', '<end>'"):
        tokenizer.Tokenizer(made("bpe", ["<begin>", "<end>", "<unk>"]).to_str().encode())
    config = {"bos_token": {"content": "<begin>"}, "eos_token": None, "cls_token": "<s>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "special_tokens_map.json").write_text('{"eos_token": "<end>", "bos_token": "<s>"}')
    tok = tokenizer.load(path)
    assert own(tok, t) == [None, "<begin>", "<end>", "<unk>"]
    assert test_cli_data.run("tokenizer", "--from", path, "--out", tmp_path / "mine") == 0
    assert tokenizer.load(tmp_path / "mine") == tok == tokenizer.Tokenizer(tok.to_bytes())
    tokenizers.Tokenizer.from_str(tok.to_bytes().decode())  # still a tokenizer.json
    for text, said in (
        ('{"eos_token": "<stop>"}', "eos = '<stop>', which is not a piece"),
        ("[1, 2]", "AttributeError"),
        ("{", "JSONDecodeError"),
    ):
        (tmp_path / "tokenizer_config.json").write_text(text)
        with pytest.raises(check.UserError, match=f"tokenizer_config.json: got {said}"):
            tokenizer.load(path)


def test_an_ordinary_piece_that_pads_stays_text(tmp_path):
    """Some published tokenizers pad with "!"."""
    t = made("bytes", ["<|startoftext|>", "<|endoftext|>"])
    t.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text('{"pad_token": "!", "unk_token": "!"}')
    tok = tokenizer.load(tmp_path / "tokenizer.json")
    assert tok.decode(tok.encode("wow!!", 12)) == "wow!!"
    assert own(tok, t)[:3] == [None, "<|startoftext|>", "<|endoftext|>"]


def test_blank_and_impossible_texts():
    t = made("bpe")
    t.normalizer = tokenizers.normalizers.Sequence(
        [tokenizers.normalizers.Replace(tokenizers.Regex(r"[^a-z0-9<>/ ]"), ""), t.normalizer]
    )
    tok = tokenizer.Tokenizer(t.to_str().encode())
    assert tok.is_blank("!!") and tok.is_blank("猫") and tok.is_blank("\u3164")
    assert not tok.is_blank("a") and not tok.is_blank("<!>")
    with pytest.raises(check.UserError, match="text: got .*expected text that UTF-8 can hold"):
        tok.encode("a \udcff", 8)


class Captioned:
    """Records of one picture, with these captions."""

    fingerprint = "captioned"

    def __init__(self, texts):
        self.texts = texts

    def __len__(self):
        return len(self.texts)

    def __getitem__(self, i):
        captions = [{"text": t, "lang": "en"} for t in self.texts[i]]
        return {"key": str(i), "image": np.full((8, 8, 3), i, np.uint8), "captions": captions}


def test_what_the_tokenizer_normalises_to_nothing_is_no_caption():
    """By its own rules: counted, replaced as the stream position says, and never [bos][eos]."""
    t = made("unigram")
    strip = tokenizers.normalizers.Replace(tokenizers.Regex(r"[^a-zA-Z0-9 ]"), "")
    t.normalizer = strip
    tok = tokenizer.Tokenizer(t.to_str().encode())
    texts = [["what"], ["…!"], ["猫", "10"], ["now !! 10"], ["\u3164"], ["means"]]
    data = Data(
        image_px=8, text_len=8, bad_records="replace", max_bad_frac=1.0, shorten="random",
        shuffle=False, read_threads=0, min_area_frac=1.0,
    )  # fmt: skip
    dataset = Dataset(data, Captioned(texts), tok)
    (batch,) = dataset.train_iter(start=0, batch=6, num_batches=1, seed=0)
    assert dataset.loader_stats.bad == {"no_caption": 2}
    used = order.join_words(batch["record"])
    assert (used[[0, 2, 3, 5]] == [0, 2, 3, 5]).all() and not {1, 4} & set(used)
    assert (batch["text"][:, 1] >= 3).all() and tok.decode(batch["text"][2]) == "10"
    np.testing.assert_array_equal(dataset.batch_at(4, 1, 0)["record"], batch["record"][4:5])
    short = Dataset(dataclasses.replace(data, text_len=3), Captioned(texts), tok)
    for start in range(0, 60, 6):
        assert (short.batch_at(start, 6, 0)["text"][:, 1] >= 3).all()
    strict = dataclasses.replace(data, bad_records="error")
    with pytest.raises(check.UserError, match="one with text"):
        Dataset(strict, Captioned(texts), tok).batch_at(1, 1, 0)
    assert Dataset(data, Captioned(texts), tok).reference(2) == "10"


@pytest.mark.parametrize("single", ["<a> <b> $A", "<a> $A </s> <b>"])
def test_two_tokens_on_one_side_of_a_text_are_refused(single):
    t = made("bpe", ["<a>", "<b>", "</s>"])
    template(t, single)
    with pytest.raises(check.UserError, match=r"got \[.*'<b>'\] .* one special token at most"):
        tokenizer.Tokenizer(t.to_str().encode())
