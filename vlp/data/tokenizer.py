"""Text to fixed-length ids and back: a SentencePiece model or a tokenizer.json behind a contract.

The contract: pad 0, bos 1, eos 2, unk 3, all distinct; a row is [bos] pieces [eos] pads, and
truncation keeps eos. Lower-casing and Unicode normalisation live inside the model, so that its
bytes are the whole definition.
"""

import hashlib
import io
import os
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import sentencepiece

from vlp.core import check
from vlp.data import imported, reads

PAD, BOS, EOS, UNK = 0, 1, 2, 3
NORMALIZATION = {True: "nmt_nfkc_cf", False: "nmt_nfkc"}  # cf: case folding


class Tokenizer:
    """An immutable tokenizer, defined by its model's bytes: picklable, safe between threads."""

    def __init__(self, model: bytes, where: str = "tokenizer"):
        self._model = bytes(model)
        if self._model[:1] == b"{":  # a tokenizer.json
            self._sp: Any = imported.Pieces(self._model, where)
        else:
            self._sp = _sentencepiece(self._model, where)
        self.vocab_size: int = self._sp.vocab_size()
        self.pad_id, self.bos_id, self.eos_id, self.unk_id = PAD, BOS, EOS, UNK
        self.sha256: str = hashlib.sha256(self._model).hexdigest()
        self.lower: bool = self._sp.encode("A") == self._sp.encode("a") != [UNK]

    def __reduce__(self):
        return Tokenizer, (self._model,)

    def __eq__(self, other):
        return isinstance(other, Tokenizer) and self._model == other._model

    def __hash__(self):
        return hash(self.sha256)

    def __repr__(self):
        return f"Tokenizer(vocab_size={self.vocab_size}, sha256={self.sha256[:12]}…)"

    def encode(self, text: str, length: int) -> np.ndarray:
        """Returns i32[length]: [bos] pieces [eos] pads; eos survives truncation."""
        if length < 3:
            raise check.error("text_len", length, "at least 3 (bos, a piece, eos)", "raise it")
        ids_L = np.empty(length, np.int32)
        self.encode_into(text, ids_L)
        return ids_L

    def encode_into(self, text: str, out: np.ndarray) -> bool:
        """Fills `out` with `encode(text, len(out))`; returns whether pieces were cut."""
        pieces, room = self._sp.encode(text), len(out) - 2
        kept = min(len(pieces), room)
        out[0] = BOS
        out[1 : kept + 1] = pieces[:kept]
        out[kept + 1] = EOS
        out[kept + 2 :] = PAD
        return len(pieces) > room

    def decode(self, ids: Sequence[Any] | np.ndarray) -> str:
        """Returns the text of one row of ids: stops at the first eos, skips pad and bos."""
        kept = []
        for i in np.asarray(ids).tolist():
            if i == EOS:
                break
            if not 0 <= i < self.vocab_size:
                raise check.error(
                    "decode", f"id {i}", f"0 … {self.vocab_size - 1}", "use the run's own tokenizer"
                )
            if i not in (PAD, BOS):
                kept.append(i)
        return self._sp.decode(kept)

    def to_bytes(self) -> bytes:
        """Returns the model; `from_bytes` is its inverse."""
        return self._model

    @staticmethod
    def from_bytes(model: bytes) -> "Tokenizer":
        """Returns the tokenizer that `model` defines."""
        return Tokenizer(model)


def _sentencepiece(model: bytes, where: str) -> sentencepiece.SentencePieceProcessor:
    try:
        found = sentencepiece.SentencePieceProcessor(model_proto=model)
        ids = [found.pad_id(), found.bos_id(), found.eos_id(), found.unk_id()]
    except RuntimeError:
        raise check.error(
            where,
            f"{len(model)} bytes that SentencePiece cannot read",
            "a SentencePiece model",
            "train one with `vlp data tokenizer DIR --out FILE`",
        ) from None
    if ids != [PAD, BOS, EOS, UNK]:
        raise check.error(
            where,
            f"pad, bos, eos, unk = {ids}",
            [PAD, BOS, EOS, UNK],
            "train it with pad_id=0, bos_id=1, eos_id=2, unk_id=3",
        )
    return found


def load(path: str | os.PathLike) -> Tokenizer:
    """Reads a model file. Raises: `UserError` if it is missing or breaks the contract."""
    path = os.fspath(path)
    if not reads.exists(path):
        raise check.error(
            "config.data.tokenizer",
            f"{path!r}, which is no file",
            "a SentencePiece model or a tokenizer.json",
            "train or import one with `vlp data tokenizer`, or correct config.data.tokenizer",
        )
    return Tokenizer(reads.whole(path), where=path)


def train(
    texts: Iterable[str], vocab_size: int, *, lower: bool = True, model_type: str = "unigram"
) -> Tokenizer:
    """Trains a "unigram" or "bpe" model; `vocab_size` is a ceiling, not always reached.

    Unigram seeds its pieces from strings that several distinct words share, so it splits the words
    of a tiny closed vocabulary; there use "bpe".

    One thread and no sampling: the same texts in the same order give the same bytes.
    """
    texts = list(texts)
    out = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(texts),
            model_writer=out,
            model_type=model_type,
            vocab_size=vocab_size,
            hard_vocab_limit=False,
            character_coverage=1.0,
            normalization_rule_name=NORMALIZATION[lower],
            pad_id=PAD,
            bos_id=BOS,
            eos_id=EOS,
            unk_id=UNK,
            num_threads=1,
            minloglevel=2,
        )
    except RuntimeError as e:
        reason = str(e).strip().splitlines()[-1][:200] if str(e).strip() else "no reason given"
        raise check.error(
            "vocab_size",
            f"{vocab_size} for {len(texts)} texts (SentencePiece: {reason})",
            "more than the number of characters",
            "raise it or give more text",
        ) from None
    return Tokenizer(out.getvalue())
