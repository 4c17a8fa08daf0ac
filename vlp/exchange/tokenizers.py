"""Tokenizers of other libraries' folders ↔ ours, in their own numbering and with their rows."""

from __future__ import annotations

import importlib.util
import json
import pathlib
from collections.abc import Mapping
from typing import Any

from vlp.core import check
from vlp.data import tokenizer as tokenizers
from vlp.data import tokenizer_formats
from vlp.data.tokenizer import Row, Tokenizer

MERGES = "bpe_simple_vocab_16e6.txt.gz"  # CLIP's, in the packages open_clip and clip
SENTENCEPIECE = ("spiece.model", "tokenizer.model", "sentencepiece.model")
START, END = "<|startoftext|>", "<|endoftext|>"


def clip(data: bytes, where: str, row: Row) -> Tokenizer:
    """CLIP's tokenizer from its merges, in its own numbering."""
    model = tokenizer_formats.clip_bpe(data, where)
    num = tokenizers.Tokenizer(model).vocab_size - 2  # without our pad and unk
    ids = (-1 if row.fill == "eos" else 0, num - 2, num - 1, -1)
    return _with(model, row, ids)


def of_file(path: str, clean: str = "none") -> Tokenizer:
    """Reads a file that was given with --tokenizer: ours, CLIP's merges, a tokenizer.json or a SentencePiece model."""
    data = check_file(path)
    if data.startswith(b'{"vlp_row":'):
        return Tokenizer(data, path)
    if data[:1] == b"{":
        return _json(data, pathlib.Path(path).parent, path, clean)
    if data[:2] == b"\x1f\x8b" or data[:8] in (b'"bpe_sim', b"#version"):
        return clip(data, path, Row(clean="lower"))
    return _sentencepiece(data, path, clean)


def check_file(path: str) -> bytes:
    try:
        return pathlib.Path(path).read_bytes()
    except OSError as e:
        do = "correct --tokenizer"
        raise check.error(path, e.strerror or "no file", "a tokenizer", do) from None


def installed_clip(where: str) -> Tokenizer:
    """CLIP's tokenizer with the merges of an installed open_clip or clip. Raises UserError if neither is there."""
    for package in ("open_clip", "clip"):
        found = importlib.util.find_spec(package)
        for folder in (found.submodule_search_locations or ()) if found else ():
            file = pathlib.Path(folder) / MERGES
            if file.is_file():
                return clip(file.read_bytes(), str(file), Row(clean="lower"))
    do = f"give CLIP's {MERGES} with --tokenizer, or install open_clip_torch"
    raise check.error(where, "no tokenizer in the folder", "CLIP's merges", do)


def of_folder(folder: pathlib.Path, clean: str | None = None, strip_sep: bool = False) -> Tokenizer:
    """Reads a Hugging Face tokenizer: tokenizer.json, CLIP's vocab.json and merges.txt, or a SentencePiece model.

    Args:
        folder: that holds the files.
        clean: how OpenCLIP cleans texts first; None: as transformers does.
        strip_sep: OpenCLIP's option: a 0 takes the place of the end of text.
    """
    siglip = next((folder / n for n in SENTENCEPIECE if (folder / n).is_file()), None)
    if (folder / "tokenizer.json").is_file():
        found = _json(
            (folder / "tokenizer.json").read_bytes(), folder, str(folder), clean or "none"
        )
    elif (folder / "merges.txt").is_file():
        row = Row(fill="eos", clean=clean or "none")
        found = clip((folder / "merges.txt").read_bytes(), str(folder / "merges.txt"), row)
    elif siglip is not None:
        # transformers' own cleaning, which changes nothing after OpenCLIP's "canonicalize"
        cleaning = "siglip" if clean in (None, "none") else clean
        found = _sentencepiece(siglip.read_bytes(), str(siglip), cleaning)
    else:
        do = "add them, or give --tokenizer"
        raise check.error(str(folder), "no tokenizer files", "tokenizer.json or the like", do)
    return found.with_row(eos=False) if strip_sep else found


def _json(data: bytes, folder: pathlib.Path, where: str, clean: str) -> Tokenizer:
    """A tokenizer.json: special tokens before and after a text as its post-processor says."""
    beside = {
        n: (folder / n).read_bytes()
        for n in tokenizer_formats.CONFIG_FILES
        if (folder / n).is_file()
    }
    told = tokenizer_formats.assigned(data, where)
    try:
        pieces = tokenizer_formats.Pieces(data, where)
    except check.UserError:  # roles that only the files beside it tell
        data = tokenizer_formats.with_roles(data, beside, where)
        pieces = tokenizer_formats.Pieces(data, where)
    named = tokenizer_formats.named(beside, where)
    # the file's post-processor decides which of the tokens are written
    ids = tokenizer_formats.ids_of(data)
    bos, eos = told.get("bos"), told.get("eos") or named.get("eos")
    pad = named.get("pad") or told.get("pad") or pieces.roles.get("pad")
    fill = "eos" if pad is not None and pad == eos else "pad"
    number = lambda token: -1 if token is None else ids.get(token, -1)
    unk = pieces.roles.get("unk")
    row = Row(bos=bos is not None, eos=told.get("eos") is not None, fill=fill, clean=clean)
    four = (-1 if fill == "eos" else number(pad), number(bos), number(eos), number(unk))
    return _with(data, row, four)


def _sentencepiece(data: bytes, where: str, clean: str) -> Tokenizer:
    """A SentencePiece model. Rows have no bos; T5's layout (SigLIP) fills them with eos, Gemma's with its pad."""
    import sentencepiece

    try:
        found = sentencepiece.SentencePieceProcessor(model_proto=data)
    except RuntimeError:
        do = "check the file"
        raise check.error(where, "bytes that SentencePiece cannot read", "a model", do) from None
    pad, bos, eos, unk = found.pad_id(), found.bos_id(), found.eos_id(), found.unk_id()
    if [pad, bos, eos, unk] == [0, 1, 2, 3]:
        return Tokenizer(data, where).with_row(clean=clean)
    fill = "pad" if bos >= 0 else "eos"
    row = Row(bos=False, fill=fill, clean=clean)
    return _with(data, row, (-1 if fill == "eos" else pad, -1, eos, unk))


def _with(model: bytes, row: Row, ids: tuple[int, ...]) -> Tokenizer:
    fields: dict[str, Any] = {k: getattr(row, k) for k in ("bos", "eos", "fill", "clean")}
    return Tokenizer(tokenizers.wrapped(model, Row(**fields, ids=ids)))


def fitted(model: Mapping[str, Any], tokenizer: Tokenizer, where: str) -> dict[str, Any]:
    """Returns the section `model` with the tokenizer's ids in its text tower. Raises UserError if they do not fit."""
    text = dict(model["text_tower"])
    if text["vocab"] < tokenizer.vocab_size:
        do = "give the tokenizer that these weights were trained with"
        got = f"{tokenizer.vocab_size} pieces"
        raise check.error(where, got, f"at most {text['vocab']}, the table's rows", do)
    if text["pool"] == "eos" and text["eos_id"] != tokenizer.eos_id:
        do = "give the tokenizer that these weights were trained with"
        got = f"an end of text with id {tokenizer.eos_id}"
        raise check.error(where, got, f"{text['eos_id']}, which the model reads", do)
    text |= dict(pad_id=tokenizer.pad_id, eos_id=tokenizer.eos_id)
    return {**model, "text_tower": text}


def is_clip(tokenizer: Tokenizer) -> bool:
    """Whether it is CLIP's own, in its numbering."""
    plain = tokenizer.plain_bytes()
    return plain[:1] == b"{" and tokenizer_formats.ids_of(plain).get(END) == 49_407


def write(tokenizer: Tokenizer, folder: pathlib.Path, length: int) -> str:
    """Writes the files that transformers reads; returns what it cannot read, or "".

    A SentencePiece model in our own numbering has no class there: it is written as tokenizer.model, to be used by vlp.
    """
    plain, row = tokenizer.plain_bytes(), tokenizer.row
    config: dict[str, Any] = dict(model_max_length=length, padding_side="right")
    if plain[:1] != b"{":
        ours = row.ids is None
        (folder / ("tokenizer.model" if ours else "spiece.model")).write_bytes(plain)
        if ours:
            return "its tokenizer is a SentencePiece model of vlp, written as tokenizer.model"
        config |= dict(
            tokenizer_class="SiglipTokenizer", eos_token="</s>", pad_token="</s>", unk_token="<unk>"
        )
    else:
        spec = json.loads(plain)
        if is_clip(tokenizer):
            spec = _clip_spec(spec, row)
            vocab, merges = spec["model"]["vocab"], spec["model"]["merges"]
            lines = (" ".join(m) if isinstance(m, list) else m for m in merges)
            text = json.dumps(vocab, ensure_ascii=False)
            (folder / "vocab.json").write_text(text, encoding="utf-8")
            merged = "\n".join(["#version: 0.2", *lines]) + "\n"
            (folder / "merges.txt").write_text(merged, encoding="utf-8")
            config |= dict(
                tokenizer_class="CLIPTokenizer",
                bos_token=START,
                eos_token=END,
                pad_token=END,
                unk_token=END,
            )
        else:
            config |= dict(tokenizer_class="PreTrainedTokenizerFast")
            tokens = {i: token for token, i in tokenizer_formats.ids_of(plain).items()}
            pad = tokenizer.eos_id if row.fill == "eos" else tokenizer.pad_id
            named = dict(pad_token=pad, bos_token=tokenizer.bos_id, eos_token=tokenizer.eos_id)
            config |= {k: tokens[i] for k, i in named.items() if i in tokens}
        (folder / "tokenizer.json").write_text(
            json.dumps(spec, ensure_ascii=False), encoding="utf-8"
        )
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
    return ""


def _clip_spec(spec: dict[str, Any], row: Row) -> dict[str, Any]:
    """CLIP's tokenizer.json with the special tokens that our own form of it does not have."""
    ids = {token: spec["model"]["vocab"][token] for token in (START, END)}
    special = [
        dict(id=i, content=token, single_word=False, lstrip=False, rstrip=False, normalized=False, special=True)
        for token, i in ids.items()
    ]  # fmt: skip
    around = dict(type="RobertaProcessing", sep=[END, ids[END]], cls=[START, ids[START]],
                  trim_offsets=False, add_prefix_space=False)  # fmt: skip
    model = {**spec["model"], "unk_token": END}
    return {**spec, "added_tokens": special, "post_processor": around, "model": model}
