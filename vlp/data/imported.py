"""Tokenizers of others behind our contract: Hugging Face `tokenizer.json`, CLIP's BPE merges.

Their ids move: pad, bos, eos, unk become 0 … 3 and every other piece follows from 4 on in its old
order (`old_ids` says from where, for porting an embedding table). Needs the package `tokenizers`.
"""

import gzip
import json
import zlib
from collections.abc import Sequence
from typing import Any

from vlp.core import check

SPECIAL = (  # names of pad, bos, eos, unk in the wild; a part that has none gets an id of its own
    ("<pad>", "[PAD]", "<|pad|>", "<|padding|>"),
    ("<s>", "[CLS]", "<bos>", "<|startoftext|>", "<|begin_of_text|>"),
    ("</s>", "[SEP]", "<eos>", "<|endoftext|>", "<|end_of_text|>"),
    ("<unk>", "[UNK]"),
)
# Radford et al. 2021, arXiv:2103.00020, §2.4: a vocabulary of 49,152, lower-cased byte pairs. Of it
# 512 are the bytes, alone and at a word's end, and two are the start and end of text.
CLIP_MERGES = 49152 - 512 - 2
CLIP_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+"


class Pieces:
    """What `Tokenizer` asks of a model: text → ids and back, in our numbering."""

    def __init__(self, model: bytes, where: str):
        library = _library(where)
        try:
            self._inner = library.Tokenizer.from_str(model.decode())
        except Exception as e:  # the library raises plain Exception
            raise check.error(
                where, f"no tokenizer ({e!s:.80})", "a tokenizer.json", "check the file"
            ) from None
        self._inner.no_truncation()
        self._inner.no_padding()
        ids = self._inner.get_vocab(with_added_tokens=True)
        special = [next((ids[n] for n in names if n in ids), -1) for names in SPECIAL]
        self.old_ids: list[int] = special + sorted(set(ids.values()) - set(special))
        self._new = {old: new for new, old in enumerate(self.old_ids) if old >= 0}

    def encode(self, text: str) -> list[int]:
        found = self._inner.encode(text, add_special_tokens=False).ids
        return [self._new[i] for i in found]

    def decode(self, ids: Sequence[int]) -> str:
        old = [self.old_ids[i] for i in ids]
        return self._inner.decode([i for i in old if i >= 0], skip_special_tokens=True).strip()

    def vocab_size(self) -> int:
        return len(self.old_ids)


def lowered(model: bytes, where: str) -> bytes:
    """Returns the tokenizer.json with lower-casing put before all else, as SigLIP prepares its texts."""
    library = _library(where)
    found = library.Tokenizer.from_str(model.decode())
    steps = [library.normalizers.Lowercase(), *([found.normalizer] if found.normalizer else [])]
    found.normalizer = library.normalizers.Sequence(steps)
    return json.dumps(json.loads(found.to_str()), ensure_ascii=False, sort_keys=True).encode()


def clip_bpe(data: bytes, where: str = "CLIP's merges") -> bytes:
    """Returns the tokenizer.json of CLIP's `bpe_simple_vocab_16e6.txt.gz` (or its plain text).

    Unlike CLIP's own code it does not repair mis-encoded text or HTML entities first.
    """
    library = _library(where)
    expected, do = "a tokenizer.json, or a merges file of two pieces a line", "check the file"
    try:
        text = (gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data).decode()
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as e:
        raise check.error(where, f"{type(e).__name__} ({e!s:.80})", expected, do) from None
    merges = [tuple(x.split()) for x in text.split("\n")[1 : CLIP_MERGES + 1]]
    if not merges or any(len(m) != 2 for m in merges):
        raise check.error(where, "lines that are no pairs", expected, do)
    # the bytes in the order of the file's author: printable ones first, then the shifted rest
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters = [chr(b) for b in printable] + [chr(256 + i) for i in range(256 - len(printable))]
    pieces = [*letters, *(x + "</w>" for x in letters), *("".join(m) for m in merges)]
    pieces += ["<|startoftext|>", "<|endoftext|>"]
    vocab = {p: i for i, p in enumerate(pieces)}
    model = library.models.BPE(vocab, merges, end_of_word_suffix="</w>")
    out = library.Tokenizer(model)
    spaces = library.normalizers.Replace(library.Regex(r"\s+"), " ")
    out.normalizer = library.normalizers.Sequence(
        [library.normalizers.NFC(), spaces, library.normalizers.Lowercase()]
    )
    split = library.pre_tokenizers.Split(library.Regex(CLIP_WORDS), "removed", invert=True)
    to_bytes = library.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    out.pre_tokenizer = library.pre_tokenizers.Sequence([split, to_bytes])
    out.decoder = library.decoders.Sequence(
        [library.decoders.ByteLevel(), library.decoders.Replace("</w>", " ")]
    )
    return json.dumps(json.loads(out.to_str()), ensure_ascii=False, sort_keys=True).encode()


def _library(where: str) -> Any:
    try:
        import tokenizers
    except ImportError:
        raise check.error(
            where, "no package 'tokenizers'", "it", 'run `pip install "vlp[hf]"`'
        ) from None
    return tokenizers
