"""500 varied strings: the ids of OpenCLIP's and transformers' tokenizers, after their own cleaning, are ours."""

import io
import json
import pathlib

import numpy as np
import pytest
import sentencepiece

from parity import originals
from vlp.data.tokenizer import Row
from vlp.exchange import tokenizers

assert originals  # defines the operators that torchvision may lack
pytest.importorskip("ftfy")
open_clip = pytest.importorskip("open_clip")
transformers = pytest.importorskip("transformers")
library = pytest.importorskip("tokenizers")
pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore")]
WORDS = """a photo of the cat dog's house I'm they'll don't TREE Red BLUE green 2023 3.14 42nd C++
e-mail naïve café Straße ÇELIK Łódź Привет мир 東京タワー 你好 مرحبا नमस्ते 한국어 😀 👩‍👩‍👧 ½ ﬁne
x² ™ © … “quoted” ‘single’ – — &amp; &lt;b&gt; &amp;amp; cafÃ© donâ€™t #hash @user
http://a.b/c?d=e&f=g $9.99 100% under_score (paren) [brack] a/b\\c tab\there new\nline
ñandú ﷺ \u3000wide ǅ İstanbul ß ﬀ 1st 2nd !!! ??? ... --- ~tilde~ ^ ` | ; : , .""".split()


def strings(num=500, seed=0):
    rng = np.random.default_rng(seed)
    ends = [" ", "  ", " ", "", ", "]
    return [
        "".join(w + ends[rng.integers(5)] for w in rng.choice(WORDS, rng.integers(1, 30)))
        for _ in range(num)
    ]


STRINGS = strings()


def same(tokenizer, theirs, length):
    mine = np.stack([tokenizer.encode(s, length) for s in STRINGS])
    wrong = [STRINGS[i] for i in np.flatnonzero((mine != np.asarray(theirs)).any(1))]
    assert not wrong, f"{len(wrong)} of {len(STRINGS)}: {wrong[:3]}"


def padded(tokenizer, length):
    return tokenizer(STRINGS, padding="max_length", max_length=length, truncation=True).input_ids


def test_openclips_clip():
    same(tokenizers.installed_clip("test"), open_clip.SimpleTokenizer()(STRINGS).numpy(), 77)


def test_transformers_clip(tmp_path):
    """From the files that we write: tokenizer.json, and vocab.json with merges.txt; and our reading of both."""
    merges = pathlib.Path(open_clip.tokenizer.default_bpe()).read_bytes()
    ours = tokenizers.clip(merges, "merges", Row(fill="eos"))
    tokenizers.write(ours, tmp_path, 77)
    theirs = padded(transformers.AutoTokenizer.from_pretrained(tmp_path), 77)
    same(ours, theirs, 77)
    same(tokenizers.of_folder(tmp_path), theirs, 77)
    (tmp_path / "tokenizer.json").unlink()
    same(tokenizers.of_folder(tmp_path), theirs, 77)


@pytest.mark.parametrize("kind", ["unigram", "bpe"])
def test_siglip(kind, tmp_path):
    """A SentencePiece model in T5's layout, in transformers' SiglipTokenizer and in OpenCLIP ("canonicalize")."""
    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(strings(800, 1)), model_writer=out, model_type=kind, vocab_size=600, pad_id=0, eos_id=1,
        unk_id=2, bos_id=-1, hard_vocab_limit=False, minloglevel=2, character_coverage=0.99,
    )  # fmt: skip
    (tmp_path / "spiece.model").write_bytes(out.getvalue())
    ours = tokenizers.of_folder(tmp_path)
    theirs = transformers.SiglipTokenizer(str(tmp_path / "spiece.model"))
    same(ours, padded(theirs, 64), 64)
    again = tmp_path / "again"
    again.mkdir()
    tokenizers.write(ours, again, 64)
    same(ours, padded(transformers.AutoTokenizer.from_pretrained(again), 64), 64)
    made = open_clip.tokenizer.HFTokenizer(str(again), context_length=64, clean="canonicalize")
    same(tokenizers.of_folder(again, "canonicalize"), made(STRINGS).numpy(), 64)


def test_siglip_2(tmp_path):
    """A tokenizer.json of Gemma's kind: byte fallback, lower case, eos without bos, its own pad."""
    specials = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", *(f"<0x{i:02X}>" for i in range(256))]
    made = library.Tokenizer(
        library.models.BPE(byte_fallback=True, fuse_unk=True, unk_token="<unk>")
    )
    n = library.normalizers
    made.normalizer = n.Sequence([n.Lowercase(), n.Replace(" ", "▁")])
    made.pre_tokenizer = library.pre_tokenizers.Split(" ", "merged_with_previous")
    made.train_from_iterator(
        strings(200, 2), library.trainers.BpeTrainer(vocab_size=700, special_tokens=specials)
    )
    made.post_processor = library.processors.TemplateProcessing(
        single="$A <eos>", special_tokens=[("<eos>", 1)]
    )
    made.save(str(tmp_path / "tokenizer.json"))
    names = {f"{k}_token": f"<{k}>" for k in ("bos", "eos", "pad", "unk")}
    config = dict(tokenizer_class="PreTrainedTokenizerFast", padding_side="right", **names)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    ours = tokenizers.of_folder(tmp_path)
    assert ours.row == Row(bos=False, ids=(0, -1, 1, 3))
    same(ours, padded(transformers.AutoTokenizer.from_pretrained(tmp_path), 64), 64)
