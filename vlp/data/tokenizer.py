"""Text to fixed-length ids and back: a SentencePiece model or a tokenizer.json behind a contract.

The contract: pad 0, bos 1, eos 2, unk 3, all distinct; a row is [bos] pieces [eos] pads, and
truncation keeps eos. A `Row` changes this where another library's model was trained otherwise.
`mask_id` is the mask token of masked language modelling: the model's own, else the first id after
the vocabulary. A text never yields pad, bos, eos or mask, even if it spells such a token.
Lower-casing and Unicode normalisation are part of the model, so that its bytes define everything.
"""

import base64
import dataclasses
import hashlib
import io
import json
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import sentencepiece

from vlp.core import check
from vlp.data import storage, text_ops, tokenizer_formats

PAD, BOS, EOS, UNK = 0, 1, 2, 3
MAX_BYTES = 4192  # SentencePiece's own bound on a line, over which it leaves lines out
_MAX_CHARS = MAX_BYTES // 4  # UTF-8 takes at most 4 bytes a character
_CONTROL = re.compile("<(?=(?:pad|s|/s|unk)>)")
NORMALIZATION = {True: "nmt_nfkc_cf", False: "nmt_nfkc"}  # cf: case folding


_WRAPPED = b'{"vlp_row":'  # begins a model that has a Row


@dataclasses.dataclass(frozen=True)
class Row:
    """How the pieces of a text become a row of ids.

    bos: the row begins with it. eos: it ends the pieces (False: a pad is in its place, CLIPA). fill: what follows,
    "pad" or "eos" (SigLIP). clean: how a text is cleaned before (`text_ops.CLEAN`). ids: those of pad, bos, eos, unk
    (-1: none) in the model's own numbering, which is then kept; None: the contract's.
    """

    bos: bool = True
    eos: bool = True
    fill: str = "pad"
    clean: str = "none"
    ids: tuple[int, ...] | None = None


class Tokenizer:
    """An immutable tokenizer, defined by its model's bytes: picklable, safe between threads.

    vocab_size: its pieces, with the special ones. mask_id: the id that hides a word; num_ids: how
    many rows the table of a model has to have that reads this id too.
    """

    def __init__(self, model: bytes, where: str = "tokenizer"):
        self._model = bytes(model)
        self.row, plain = _unwrapped(self._model, where)
        ids = self.row.ids
        text_ops.check_clean(f"{where}: clean", self.row.clean)
        if plain[:1] == b"{":  # a tokenizer.json
            self._sp: Any = tokenizer_formats.Pieces(plain, where)
            own = self._sp.mask_id
            if ids is not None:
                self._sp = tokenizer_formats.OwnIds(self._sp, ids[3])
                own = None if own is None else self._sp.old_ids[own]
        else:
            self._sp = _sentencepiece(plain, where, ids)
            own = _own_mask(self._sp)
        self.vocab_size: int = self._sp.vocab_size()
        self.roles: dict[str, str] = getattr(self._sp, "roles", {})  # of a tokenizer.json's tokens
        self.pad_id, self.bos_id, self.eos_id, self.unk_id = ids or (PAD, BOS, EOS, UNK)
        self.mask_id: int = self.vocab_size if own is None else own
        self.num_ids: int = max(self.vocab_size, self.mask_id + 1)
        self.sha256: str = hashlib.sha256(self._model).hexdigest()
        self.lower: bool = self._pieces("A") == self._pieces("a") != [self.unk_id]

    def __reduce__(self):
        return Tokenizer, (self._model,)

    def __eq__(self, other):
        return isinstance(other, Tokenizer) and self._model == other._model

    def __hash__(self):
        return hash(self.sha256)

    def __repr__(self):
        return f"Tokenizer(vocab_size={self.vocab_size}, sha256={self.sha256[:12]}…)"

    def encode(self, text: str, length: int) -> np.ndarray:
        """Returns i32[length]: [bos] pieces [eos] pads (as `row` says); eos survives truncation."""
        if length < 3:
            raise check.error("text_len", length, "at least 3 (bos, a piece, eos)", "raise it")
        ids_L = np.empty(length, np.int32)
        self.encode_into(text, ids_L)
        return ids_L

    def encode_into(self, text: str, out: np.ndarray) -> bool:
        """Fills `out` with `encode(text, len(out))`; returns whether pieces were cut."""
        row, start = self.row, int(self.row.bos)
        pieces, room = self._pieces(text), len(out) - 1 - start
        end = start + min(len(pieces), room)
        out[:start] = self.bos_id
        out[start:end] = pieces[:room]
        out[end:] = self.eos_id if row.fill == "eos" else self.pad_id
        out[end] = self.eos_id if row.eos else self.pad_id
        return len(pieces) > room

    def _pieces(self, text: str) -> list[int]:
        try:
            return self._sp.encode(text_ops.clean(text, self.row.clean))
        except Exception:  # by library: TypeError, RuntimeError, UnicodeError
            if isinstance(text, str) and text_ops.is_utf8(text):
                raise
            do = "correct the text"
            raise check.error("text", f"{text!r:.80}", "text that UTF-8 can hold", do) from None

    def is_blank(self, text: str) -> bool:
        """Whether a text has nothing to say: invisible, or normalised to nothing by the model."""
        if text_ops.is_plain(text):
            return False
        if text_ops.is_invisible(text):
            return True
        pieces = self._pieces(text)
        return self.unk_id not in pieces and not self._sp.decode(pieces).strip()

    def decode(self, ids: Sequence[Any] | np.ndarray) -> str:
        """Returns the text of one row of ids: stops at the first eos, skips pad, bos and mask.

        Raises: `UserError` for an id that the vocabulary does not have.
        """
        kept = []
        for i in np.asarray(ids).tolist():
            if i == self.eos_id:
                break
            if not 0 <= i < self.num_ids:
                raise check.error(
                    "decode", f"id {i}", f"0 … {self.num_ids - 1}", "use the run's own tokenizer"
                )
            if i not in (self.pad_id, self.bos_id, self.mask_id):
                kept.append(i)
        return self._sp.decode(kept)

    def to_bytes(self) -> bytes:
        """Returns the model; `from_bytes` is its inverse."""
        return self._model

    @staticmethod
    def from_bytes(model: bytes) -> "Tokenizer":
        """Returns the tokenizer that `model` defines."""
        return Tokenizer(model)

    @property
    def old_ids(self) -> list[int]:
        """The model's own ids of ours, in our order; -1: it has none."""
        same = self.row.ids is not None or not hasattr(self._sp, "old_ids")
        return list(range(self.vocab_size)) if same else self._sp.old_ids

    def plain_bytes(self) -> bytes:
        """Returns the model as others read it: without its row."""
        return _unwrapped(self._model, "tokenizer")[1]

    def with_row(self, **changes: Any) -> "Tokenizer":
        """Returns the tokenizer with fields of its `Row` changed. Raises `UserError` for an unknown value."""
        row = dataclasses.replace(self.row, **changes)
        return self if row == self.row else Tokenizer(wrapped(self.plain_bytes(), row))


def wrapped(model: bytes, row: Row) -> bytes:
    """Returns the bytes of a tokenizer with a `Row`; `model` itself if the row is the contract's."""
    if row == Row():
        return model
    text = base64.b64encode(model).decode()
    return json.dumps({"vlp_row": dataclasses.asdict(row), "model": text}).encode()


def _unwrapped(model: bytes, where: str) -> tuple[Row, bytes]:
    if not model.startswith(_WRAPPED):
        return Row(), model
    try:
        found = json.loads(model)
        fields = dict(found["vlp_row"])
        fields["ids"] = None if fields.get("ids") is None else tuple(map(int, fields["ids"]))
        row, plain = Row(**fields), base64.b64decode(found["model"])
    except (ValueError, KeyError, TypeError) as e:
        got = f"a broken file ({type(e).__name__})"
        raise check.error(where, got, "a tokenizer of vlp", "restore a copy of it") from None
    good = row.fill in ("pad", "eos") and (row.ids is None or len(row.ids) == 4)
    if not good or (row.fill == "eos" and not row.eos):
        raise check.error(where, row, "fill 'pad' or 'eos' (with eos), four ids", "correct it")
    return row, plain


def _sentencepiece(
    model: bytes, where: str, own: tuple[int, ...] | None = None
) -> sentencepiece.SentencePieceProcessor:
    """The model behind the contract, or in its own numbering where the ids of its four roles are given."""
    try:
        found = sentencepiece.SentencePieceProcessor(model_proto=model)
        if own is not None:
            specials = [i for i in (*own[:3], _own_mask(found) or -1) if i >= 0]
            controls = _as_controls(model, specials)
            return sentencepiece.SentencePieceProcessor(model_proto=controls)
        ids = [found.pad_id(), found.bos_id(), found.eos_id(), found.unk_id()]
        mask = _own_mask(found)
        matched = mask is not None and not found.is_control(mask)
        if (ids != [PAD, BOS, EOS, UNK] or matched) and (model := _controls(model, mask)):
            found = sentencepiece.SentencePieceProcessor(model_proto=model)
            ids = [PAD, BOS, EOS, found.unk_id()]
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


def _own_mask(found: sentencepiece.SentencePieceProcessor) -> int | None:
    """The id of the model's own mask token, if it has one."""
    ids = ((name, found.piece_to_id(name)) for name in tokenizer_formats.MASKS)
    return next((i for name, i in ids if i > UNK and found.id_to_piece(i) == name), None)


def _controls(model: bytes, mask: int | None = None) -> bytes:
    """The model with pad, bos, eos and mask as control symbols, where they are pieces that texts are matched with.

    b"" where it was not trained to the contract.
    """
    from sentencepiece import sentencepiece_model_pb2

    made: Any = sentencepiece_model_pb2  # its classes are made at import
    spec = made.ModelProto.FromString(model).trainer_spec
    if [spec.pad_id, spec.bos_id, spec.eos_id] != [PAD, BOS, EOS]:
        return b""
    return _as_controls(model, (PAD, BOS, EOS, *([] if mask is None else [mask])))


def _as_controls(model: bytes, ids: Iterable[int]) -> bytes:
    """The model with some pieces as control symbols, which no text is matched with."""
    from sentencepiece import sentencepiece_model_pb2

    made: Any = sentencepiece_model_pb2
    proto = made.ModelProto.FromString(model)
    for i in ids:
        proto.pieces[i].type = proto.SentencePiece.CONTROL
    return proto.SerializeToString()


def model_bytes(path: str) -> bytes:
    """Reads a model; for a tokenizer.json also the roles in the other files of its folder."""
    data = storage.whole(path)
    if data[:1] != b"{" or data.startswith(_WRAPPED):
        return data
    names = {
        name: os.path.join(os.path.dirname(path), name) for name in tokenizer_formats.CONFIG_FILES
    }
    config_files = {name: storage.whole(at) for name, at in names.items() if storage.exists(at)}
    return tokenizer_formats.with_roles(data, config_files, path)


def load(path: str | os.PathLike) -> Tokenizer:
    """Reads a model file. Raises: `UserError` if it is missing or breaks the contract."""
    path = os.fspath(path)
    if not storage.exists(path):
        raise check.error(
            "config.data.tokenizer",
            f"{path!r}, which is not a file",
            "a SentencePiece model or a tokenizer.json",
            "train or import one with `vlp data tokenizer`, or correct config.data.tokenizer",
        )
    return Tokenizer(model_bytes(path), where=path)


def _parts(text: str) -> Iterator[str]:
    """Cuts a text at white space, where there is any, into lines that SentencePiece takes whole.

    It also leaves out lines with U+2585, its own mark of unknown characters, and the names of
    control symbols: a space takes the place of the one and divides the others.
    """
    text = _CONTROL.sub("< ", text.replace("\u2585", " "))
    while len(text) > _MAX_CHARS:
        head, end = text[: _MAX_CHARS + 1], _MAX_CHARS
        words = head.rsplit(maxsplit=1)
        if len(words) == 2 and not head[-1].isspace():
            end = len(head) - len(words[1])
        yield text[:end]
        text = text[end:]
    if text:
        yield text


def train(
    texts: Iterable[str], vocab_size: int, *, lower: bool = True, model_type: str = "bpe"
) -> Tokenizer:
    """Trains byte pairs ("bpe") or a "unigram" model; `vocab_size` is a ceiling, not always reached.

    Unigram seeds its pieces from strings that several distinct words share, so it splits the words
    of a small vocabulary, down to letters.

    All of every text takes part: long ones are cut into parts that SentencePiece reads. One thread
    and no sampling: the same texts in the same order give the same bytes.
    Raises: `UserError` for a text that UTF-8 cannot hold, or too few texts for `vocab_size`.
    """
    texts = list(texts)
    if bad := next((t for t in texts if not text_ops.is_utf8(t)), None):
        do = "leave it out"
        raise check.error("texts", f"{bad!r:.80}", "text that UTF-8 can hold", do)
    out = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=(part for text in texts for part in _parts(text)),
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
            max_sentence_length=MAX_BYTES,
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
