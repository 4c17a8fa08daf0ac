"""Other projects' tokenizers as ours: Hugging Face's `tokenizer.json`, CLIP's BPE merges.

Ids are renumbered: pad, bos, eos, unk become 0 … 3, and the other pieces follow from 4 on in their old
order (`old_ids` has the old ids, for porting an embedding table). Needs the package `tokenizers`.
"""

import functools
import gzip
import json
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

from vlp.core import check

ROLES = ("pad", "bos", "eos", "unk")
# usual names, if the file does not assign a role; a role without a token gets a new id
NAMES = {
    "pad": ("<pad>", "[PAD]", "<|pad|>", "<|padding|>"),
    "bos": ("<s>", "[CLS]", "<bos>", "<|startoftext|>", "<|begin_of_text|>"),
    "eos": ("</s>", "[SEP]", "<eos>", "<|endoftext|>", "<|end_of_text|>"),
    "unk": ("<unk>", "[UNK]"),
}
MASKS = ("[MASK]", "<mask>", "<|mask|>")  # usual names of the mask token
# Hugging Face's files in the folder of a tokenizer.json, and their keys of each role
CONFIG_FILES = ("tokenizer_config.json", "special_tokens_map.json")
_KEYS = {
    "pad": ("pad_token",),
    "bos": ("bos_token", "cls_token"),
    "eos": ("eos_token", "sep_token"),
    "unk": ("unk_token",),
}
UNK = ROLES.index("unk")
# CLIP (Radford et al. 2021, arXiv:2103.00020, §2.4) keeps 49,152 − 256 − 2 lower-cased merges of its
# file. With 512 pieces for the bytes, alone and at a word's end, and start and end of text: 49,408.
CLIP_MERGES = 49152 - 256 - 2
CLIP_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+"


class Pieces:
    """What `Tokenizer` asks of a model: text → ids and back, in our numbering.

    Control tokens (those of the four roles, and all that the file calls special) have ids but no text. The
    library gets the file without them, so a caption that spells one is split as any other text is.
    old_ids: the file's id of each of our ids; -1 where it has none. roles: its tokens for pad, bos,
    eos, unk, where it has them. mask_id: the id of its mask token, or None.
    """

    def __init__(self, model: bytes, where: str):
        library = _library(where)
        spec = _spec(model, where)
        old, roles = _old_ids(spec), _roles(spec, where)
        self.roles = {r: roles[r] for r in ROLES if r in roles}
        special = [old[roles[r]] if r in roles else -1 for r in ROLES]
        marks = [name for name in _special(spec) if name in MASKS and old[name] not in special]
        controls = {*roles.values(), *_special(spec), *filter(None, [_model_unk(spec)])}
        self.old_ids: list[int] = special + sorted(set(old.values()) - set(special))
        self.mask_id = self.old_ids.index(old[marks[0]]) if marks else None
        try:
            self._inner = library.Tokenizer.from_str(json.dumps(_without(spec, controls)))
        except Exception as e:  # the library raises plain Exception
            raise _no_tokenizer(where, e) from None
        ours = {i: n for n, i in enumerate(self.old_ids) if n >= len(ROLES)}
        inner = self._inner.get_vocab(with_added_tokens=True)
        self._ours = [UNK] * (1 + max(inner.values(), default=-1))
        self._inners: dict[int, int] = {}
        for name, i in inner.items():
            if old.get(name) in ours:
                self._ours[i] = ours[old[name]]
                self._inners[self._ours[i]] = i

    def encode(self, text: str) -> list[int]:
        found = self._inner.encode(text, add_special_tokens=False).ids
        return [self._ours[i] for i in found]

    def decode(self, ids: Sequence[int]) -> str:
        inner = [self._inners[i] for i in ids if i in self._inners]
        return self._inner.decode(inner, skip_special_tokens=False).strip()

    def vocab_size(self) -> int:
        return len(self.old_ids)


class OwnIds:
    """`Pieces` in the file's own numbering. unk: the id for a piece that it lacks."""

    def __init__(self, pieces: Pieces, unk: int):
        self._pieces, self.roles, self.old_ids = pieces, pieces.roles, pieces.old_ids
        self._ours = {old: i for i, old in enumerate(pieces.old_ids) if old >= 0}
        self._unk = unk

    def encode(self, text: str) -> list[int]:
        found = self._pieces.encode(text)
        return [self._unk if i == UNK else self.old_ids[i] for i in found]

    def decode(self, ids: Sequence[int]) -> str:
        return self._pieces.decode([self._ours[i] for i in ids if i in self._ours])

    def vocab_size(self) -> int:
        return 1 + max(self.old_ids)


def with_roles(model: bytes, config_files: Mapping[str, bytes], where: str) -> bytes:
    """Returns the tokenizer.json with the roles of special tokens from the other files of its folder.

    Roles are written as Hugging Face does, as post-processor and padding. Roles that the file assigns
    itself are kept. Raises: `UserError` for a token that is not a piece.
    """
    spec = _spec(model, where)
    found = _assigned(spec, where)
    for name in CONFIG_FILES:
        if name in config_files:
            for role, token in _named(config_files[name], f"{where}: {name}").items():
                if token not in _old_ids(spec):
                    got = f"{role} = {token!r}, which is not a piece of the tokenizer"
                    do = "name a piece there, or remove the file"
                    raise check.error(f"{where}: {name}", got, "one of its pieces", do)
                found.setdefault(role, token)
    if found == _assigned(spec, where):
        return model
    old = _old_ids(spec)
    around = [[{"SpecialToken": {"id": found[r], "type_id": 0}}] if r in found else []
              for r in ("bos", "eos")]  # fmt: skip
    text = {"Sequence": {"id": "A", "type_id": 0}}
    tokens = {t: {"id": t, "ids": [old[t]], "tokens": [t]}
              for r, t in found.items() if r in ("bos", "eos")}  # fmt: skip
    if tokens:
        single = [*around[0], text, *around[1]]
        spec["post_processor"] = {
            "type": "TemplateProcessing",
            "single": single,
            "pair": [*single, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": tokens,
        }
    if "pad" in found:
        spec["padding"] = {
            "strategy": "BatchLongest", "direction": "Right", "pad_to_multiple_of": None,
            "pad_id": old[found["pad"]], "pad_type_id": 0, "pad_token": found["pad"],
        }  # fmt: skip
    return json.dumps(spec, ensure_ascii=False, sort_keys=True).encode()


def assigned(model: bytes, where: str) -> dict[str, str]:
    """Returns role → token, as a tokenizer.json itself assigns them."""
    return _assigned(_spec(model, where), where)


def named(config_files: Mapping[str, bytes], where: str) -> dict[str, str]:
    """Returns role → token, as the files `CONFIG_FILES` of its folder name them; the first file counts."""
    out: dict[str, str] = {}
    for name in CONFIG_FILES:
        if name in config_files:
            out = _named(config_files[name], f"{where}: {name}") | out
    return out


def ids_of(model: bytes) -> dict[str, int]:
    """Returns every piece of a tokenizer.json with its own id."""
    return _old_ids(json.loads(model))


def _no_tokenizer(where: str, e: Exception) -> check.UserError:
    return check.error(where, f"no tokenizer ({e!s:.80})", "a tokenizer.json", "check the file")


def _spec(model: bytes, where: str) -> dict:
    """The file as JSON, if its parts are those of a tokenizer.json."""
    try:
        spec = json.loads(model)
        for part in (_old_ids, _special, functools.partial(_assigned, where=where)):
            part(spec)  # raises where something is not as expected
    except check.UserError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError) as e:
        raise _no_tokenizer(where, e) from None
    return spec


def _old_ids(spec: dict) -> dict[str, int]:
    """Every piece and its id in the file's own numbering."""
    vocab = spec["model"]["vocab"]
    if isinstance(vocab, list):  # Unigram: [piece, score]
        vocab = {piece: i for i, (piece, _) in enumerate(vocab)}
    return vocab | {t["content"]: int(t["id"]) for t in spec.get("added_tokens") or []}


def _special(spec: dict) -> list[str]:
    return [t["content"] for t in spec.get("added_tokens") or [] if t.get("special")]


def _model_unk(spec: dict) -> str | None:
    """Returns the model's unknown token."""
    model = spec["model"]
    if isinstance(model["vocab"], list):
        unk = model.get("unk_id")
        return None if unk is None else model["vocab"][unk][0]
    return model.get("unk_token")


def _assigned(spec: dict, where: str) -> dict[str, str]:
    """Returns role → token, as the file assigns them: by its post-processor, its padding, its model.

    Raises: `UserError` if it puts several tokens before or after a text, which would be lost.
    """
    before, after = _bracket(spec.get("post_processor"))
    pads = {*NAMES["pad"], (spec.get("padding") or {}).get("pad_token")}
    for side, tokens in (("before", before), ("after", after)):
        if len(set(tokens) - pads) > 1:
            do = "keep one in its post-processor, or train a tokenizer (vlp data tokenizer)"
            raise check.error(where, f"{tokens} {side} a text", "one special token at most", do)
    assigned = {
        "pad": (spec.get("padding") or {}).get("pad_token"),
        "bos": before[0] if before else None,
        "eos": after[0] if after else None,
        "unk": _model_unk(spec),
    }
    return {role: token for role, token in assigned.items() if token}


def _bracket(processor: dict | None) -> tuple[list[str], list[str]]:
    """The special tokens that a post-processor puts before and after a single text."""
    kind = (processor or {}).get("type")
    before, after = [], []
    if processor is None:
        return before, after
    if kind == "Sequence":
        for part in processor["processors"]:
            more = _bracket(part)
            before, after = more[0] + before, after + more[1]
    elif kind in ("BertProcessing", "RobertaProcessing"):
        return [processor["cls"][0]], [processor["sep"][0]]
    elif kind == "TemplateProcessing":
        side = before
        for part in processor["single"]:
            if "Sequence" in part:
                side = after
            else:
                tokens = processor["special_tokens"][part["SpecialToken"]["id"]]["tokens"]
                side += tokens
    return before, after


def _named(data: bytes, where: str) -> dict[str, str]:
    """Returns the roles in one of the files `CONFIG_FILES`."""
    try:
        config = json.loads(data)
        found = {}
        for role, keys in _KEYS.items():
            for token in map(config.get, keys):
                token = token["content"] if isinstance(token, dict) else token
                if token and role not in found:
                    found[role] = str(token)
        return found
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        got = f"{type(e).__name__} ({e!s:.60})"
        raise check.error(
            where, got, "names of special tokens", 'write each as a string, or {"content": …}'
        ) from None


def _roles(spec: dict, where: str) -> dict[str, str]:
    """Returns role → token, as the file assigns them, else by name; without roles that need a new id."""
    old, special, roles = _old_ids(spec), _special(spec), _assigned(spec, where)
    if strange := {r: t for r, t in roles.items() if t not in old}:
        got = f"{strange}, which are not pieces of it"
        do = "add them to its vocabulary, or name other tokens there"
        raise check.error(where, got, "special tokens among the pieces", do)
    for role, names in NAMES.items():
        if role not in roles and (known := [n for n in names if n in (special or old)]):
            roles[role] = known[0]
    rest = sorted(set(special) - set(roles.values()))
    if rest and not {"bos", "eos"} & set(roles):
        got = f"special tokens {rest[:8]} and no post-processor that assigns their roles"
        do = f"put its {CONFIG_FILES[0]} into the same folder"
        raise check.error(where, got, "which of them begin and end a text", do)
    others = lambda role: {t for r, t in roles.items() if r != role}
    for role in ("pad", "unk"):  # pad and unk must differ from bos and eos
        if roles.get(role) in others(role):
            del roles[role]
    if roles.get("pad") not in (*special, *NAMES["pad"]):
        roles.pop("pad", None)  # an ordinary piece ("!"), which texts need
    return roles


def _without(spec: dict, controls: set[str]) -> dict:
    """Returns the file with its control tokens renamed, so that no text contains one."""
    model: dict[str, Any] = dict(spec["model"])
    names = {t: f"\0control {i}\0" for i, t in enumerate(sorted(controls))}
    if isinstance(model["vocab"], list):
        model["vocab"] = [[names.get(piece, piece), score] for piece, score in model["vocab"]]
    else:
        model["vocab"] = {names.get(piece, piece): i for piece, i in model["vocab"].items()}
    if isinstance(model["vocab"], dict) and model.get("unk_token"):
        model["unk_token"] = names[model["unk_token"]]
        model["vocab"].setdefault(model["unk_token"], 1 + max(model["vocab"].values(), default=-1))
    if model.get("merges"):
        join = lambda merge: "".join(merge.split(" ") if isinstance(merge, str) else merge)
        model["merges"] = [m for m in model["merges"] if join(m) not in controls]
    added = [t for t in spec.get("added_tokens") or [] if t["content"] not in controls]
    changed = {"model": model, "added_tokens": added}
    empty = dict.fromkeys(("post_processor", "padding", "truncation"))
    return spec | changed | empty


def lowered(model: bytes, where: str) -> bytes:
    """Returns the tokenizer.json with lower-casing put before all else, as SigLIP prepares its texts."""
    library = _library(where)
    found = library.Tokenizer.from_str(model.decode())
    steps = [library.normalizers.Lowercase(), *([found.normalizer] if found.normalizer else [])]
    found.normalizer = library.normalizers.Sequence(steps)
    return json.dumps(json.loads(found.to_str()), ensure_ascii=False, sort_keys=True).encode()


def clip_bpe(data: bytes, where: str = "CLIP's merges") -> bytes:
    """Returns the tokenizer.json of CLIP's `bpe_simple_vocab_16e6.txt.gz` (or its plain text).

    CLIP's own code first repairs mis-encoded text and HTML entities: `Row.clean` "lower" (tokenizer.py).
    """
    library = _library(where)
    expected, do = "a tokenizer.json, or a merges file of two pieces a line", "check the file"
    try:
        text = (gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data).decode()
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as e:
        raise check.error(where, f"{type(e).__name__} ({e!s:.80})", expected, do) from None
    merges = [tuple(x.split()) for x in text.split("\n")[1 : CLIP_MERGES + 1]]
    if not merges or any(len(m) != 2 for m in merges):
        raise check.error(where, "lines without exactly two pieces", expected, do)
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
