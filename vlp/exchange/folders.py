"""Folders and files of other libraries ↔ `Exchanged`: OpenCLIP's, Hugging Face's, big_vision's .npz."""

from __future__ import annotations

import dataclasses
import json
import pathlib
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from vlp.core import check
from vlp.core.config import build_named, plain
from vlp.exchange import (
    big_vision,
    hugging_face,
    open_clip,
    open_clip_tensors,
    tensors,
    tokenizers,
)
from vlp.exchange.checkpoint import Exchanged
from vlp.models import MODELS, TOWERS

SYSTEMS = ("open_clip", "hugging_face", "big_vision")
OPEN_CLIP, HUGGING_FACE = "open_clip_config.json", "config.json"
WEIGHTS = {  # in the order in which each library looks
    "open_clip": ("open_clip_model.safetensors", "model.safetensors"),
    "hugging_face": ("model.safetensors",),
}
# Fields of ours that say how a model is computed or trained, and not what it is.
COMPUTE = {"dtype", "remat", "scan", "attention", "dropout", "drop_path", "parent", "name"}


def system_of(path: pathlib.Path) -> str:
    """Returns which library wrote a folder or file. Raises UserError if none is recognised."""
    if path.suffix == ".npz" and path.is_file():
        return "big_vision"
    if (path / OPEN_CLIP).is_file():
        return "open_clip"
    if (path / HUGGING_FACE).is_file():
        return "hugging_face"
    expected = f"a folder with {OPEN_CLIP} or {HUGGING_FACE}, or a .npz of big_vision"
    got = "nothing of that name" if not path.exists() else "no such file in it"
    raise check.error(str(path), got, expected, "correct the path")


def read(path: pathlib.Path, tokenizer: str = "", only: str = "") -> Exchanged:
    """Reads a model of another library.

    Args:
        path: a folder, or a .npz.
        tokenizer: a file, where the folder has none or another is wanted.
        only: "image": the image tower alone, of a .npz.

    Raises:
        UserError: an architecture that is not ours, or tensors that do not fit it; names them in one line.
    """
    system = system_of(path)
    if only not in ("", "image") or (only and system != "big_vision"):
        do = "leave --only out, or give a .npz of big_vision and --only image"
        raise check.error("--only", only, "'image', for a .npz", do)
    if system == "big_vision":
        return _read_npz(path, tokenizer, only)
    if system == "open_clip":
        return _read_open_clip(path, tokenizer)
    cfg, preprocessor = _json(path / HUGGING_FACE), _json(path / "preprocessor_config.json", {})
    model, objective, data = hugging_face.config(cfg, preprocessor, str(path))
    words = tokenizers.of_file(tokenizer) if tokenizer else tokenizers.of_folder(path)
    weights = {
        k: x for k, x in _weights(path, system).items() if k not in hugging_face.UNUSED
    }  # fmt: skip
    leaves = tensors.read(hugging_face.rules(model), weights, str(path))
    model = tokenizers.fitted(model, words, str(path))
    return Exchanged(model, objective, data, words, leaves, system, str(path))


def _read_open_clip(path: pathlib.Path, tokenizer: str) -> Exchanged:
    found = _json(path / OPEN_CLIP)
    if "model_cfg" not in found:
        do = "put it into {'model_cfg': …}"
        raise check.error(str(path / OPEN_CLIP), "no 'model_cfg'", "OpenCLIP's folder layout", do)
    cfg = found["model_cfg"]
    model, objective, data = open_clip.config(cfg, found.get("preprocess_cfg") or {}, str(path))
    text = cfg.get("text_cfg") or {}
    kwargs = text.get("tokenizer_kwargs") or {}
    if tokenizer:
        words = tokenizers.of_file(tokenizer, kwargs.get("clean", "none"))
    elif text.get("hf_tokenizer_name"):
        clean, strip = kwargs.get("clean", "whitespace"), bool(kwargs.get("strip_sep_token"))
        words = tokenizers.of_folder(path, clean, strip)
    else:
        words = tokenizers.installed_clip(str(path)).with_row(clean=kwargs.get("clean", "lower"))
    weights = _weights(path, "open_clip")
    custom = _is_custom(cfg)
    if custom:  # as OpenCLIP's `convert_to_custom_text_state_dict`
        parts = r"(text_projection|positional_embedding|token_embedding|transformer|ln_final).*"
        weights = {
            f"text.{k}" if re.fullmatch(parts, k) else k: x for k, x in weights.items()
        }  # fmt: skip
    same = "visual.attn_pool.attn.in_proj_weight" in weights
    leaves = tensors.read(open_clip_tensors.rules(model, custom, same), weights, str(path))
    model = tokenizers.fitted(model, words, str(path))
    return Exchanged(model, objective, data, words, leaves, "open_clip", str(path))


def _is_custom(cfg: Mapping[str, Any]) -> bool:
    return bool(cfg.get("custom_text") or cfg.get("multimodal_cfg"))


def _read_npz(path: pathlib.Path, tokenizer: str, only: str) -> Exchanged:
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = big_vision.unscanned({name: file[name] for name in file.files})
    except (ValueError, OSError) as e:
        do = "check the file"
        got = f"{type(e).__name__} ({e!s:.80})"
        raise check.error(str(path), got, "big_vision's .npz", do) from None
    words = tokenizers.of_file(tokenizer) if tokenizer else None
    if only:
        image, data = big_vision.image_config(arrays, str(path))
        mine = {n: x for n, x in arrays.items() if n.startswith("img/") and "/head/" not in n}
        leaves = tensors.read(big_vision.image_rules(image), mine, str(path))
        size = dict(width=image["width"], depth=1, heads=image["heads"])
        text = dict(vocab=words.vocab_size if words else 8, pool="none", **size)
        model = dict(name="two_tower", image_tower=image, text_tower=text, embed=0)
        source = f"{path} (the image tower; {len(arrays) - len(mine)} other arrays left out)"
        data |= dict(text_len=16)
        return Exchanged(model, "clip", data, words, leaves, "big_vision", source)
    model, objective, data = big_vision.config(arrays, str(path))
    leaves = tensors.read(big_vision.rules(model), arrays, str(path))
    model = model if words is None else tokenizers.fitted(model, words, str(path))
    return Exchanged(model, objective, data, words, leaves, "big_vision", str(path))


def write(exchanged: Exchanged, out: pathlib.Path, system: str) -> list[str]:
    """Writes a model of ours as another library's folder (big_vision: the file `out`).

    Returns:
        Remarks, each a line: what the other library cannot read of it.

    Raises:
        UserError: an architecture that the other library does not have; names the fields that differ.
    """
    if system not in SYSTEMS:
        raise check.unknown("--to", system, SYSTEMS)
    _check_towers(exchanged, system)
    exchanged = _in_own_numbering(_with_cls_row(exchanged))
    try:
        return _write(exchanged, out, system)
    except open_clip.Foreign as e:
        do = "train one with a size that it has"
        raise check.error(exchanged.source, e.part, f"a model of {system}", do) from None


def _write(exchanged: Exchanged, out: pathlib.Path, system: str) -> list[str]:
    model, words, data = exchanged.build(), exchanged.tokenizer, exchanged.data
    if system == "big_vision":
        _check_siglip(exchanged)
        arrays = tensors.write(big_vision.rules(_plain(model)), exchanged.leaves, exchanged.source)
        np.savez(out, **{big_vision.ROOT + n: x for n, x in arrays.items()})
        return []
    remarks = []
    if system == "hugging_face":
        cfg, preprocessor = (
            hugging_face.to_config(model, data),
            hugging_face.to_preprocessor(model, data),
        )
        found = hugging_face.config(cfg, preprocessor, exchanged.source)[0]
        _compare(exchanged, found, "Hugging Face")
        rules = hugging_face.rules(found)
    else:
        cfg = open_clip.to_config(model, data)
        pixels = dict(mean=model.image_tower.mean, std=model.image_tower.std)
        preprocess = {
            **{k: list(v) for k, v in pixels.items()},
            "size": [data["image_px"]] * 2, "mode": "RGB", "interpolation": data["resize"],
            "resize_mode": "squash" if data["eval_crop"] == "squash" else "shortest",
        }  # fmt: skip
        found = open_clip.config(cfg, pixels, exchanged.source)[0]
        _compare(exchanged, found, "OpenCLIP")
        pooler = exchanged.leaves.get("pool_shared/query")
        same = pooler is not None and pooler.shape[1] == model.image_tower.width
        rules = open_clip_tensors.rules(found, _is_custom(cfg), same)
    theirs = tensors.write(rules, exchanged.leaves, exchanged.source)
    out.mkdir(parents=True, exist_ok=True)
    if words is not None and not (system == "open_clip" and tokenizers.is_clip(words)):
        remark = tokenizers.write(words, out, data["text_len"])
        remarks += [remark] if remark else []
        if system == "open_clip" and not remark:
            clean = (
                words.row.clean
                if words.row.clean in ("whitespace", "lower", "canonicalize")
                else "whitespace"
            )
            kwargs = dict(clean=clean) | ({} if words.row.eos else dict(strip_sep_token=True))
            cfg["text_cfg"] |= dict(hf_tokenizer_name=str(out.name), tokenizer_kwargs=kwargs)
    if system == "hugging_face":
        _dump(out / HUGGING_FACE, cfg)
        _dump(out / "preprocessor_config.json", preprocessor)
        _save(theirs, out / "model.safetensors")
    else:
        _dump(out / OPEN_CLIP, dict(model_cfg=cfg, preprocess_cfg=preprocess))
        _save(theirs, out / "open_clip_model.safetensors")
    return remarks


def _plain(model: Any) -> dict[str, Any]:
    """A built model as a section with every field, for the tables."""
    parts = ("image_tower", "text_tower", "decoder", "poolers")
    fields = {f.name: getattr(model, f.name) for f in dataclasses.fields(model)}
    for part in parts:
        value = fields[part]
        if value is not None:
            fields[part] = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
    return fields


def _described(model: Any) -> dict[str, Any]:
    """What a built model is: its fields by dotted name, without those of COMPUTE."""
    out: dict[str, Any] = {}
    for key, value in _plain(model).items():
        if isinstance(value, dict):
            out |= {f"{key}.{k}": v for k, v in value.items() if k not in COMPUTE}
        elif key not in COMPUTE and key != "heads":
            out[key] = value
    for tower in ("image_tower", "text_tower"):
        if out.get(f"{tower}.mlp") == 0:
            out[f"{tower}.mlp"] = 4 * out[f"{tower}.width"]
    if out.get("image_tower.pool") == "cls":
        out["image_tower.cls"] = True
    if "decoder.mlp" in out:
        out["decoder.mlp"] = out["decoder.mlp"] or out["text_tower.mlp"]
        out.pop("decoder.dropout", None)
    if out.get("poolers.heads", 1) is None:
        out["poolers.heads"] = getattr(model.text_tower, "heads", None)
    return out


# The temperature's start; a trained model has it as a parameter.
START = ("scale", "bias")


def _compare(exchanged: Exchanged, found: Mapping[str, Any], library: str) -> None:
    """Raises UserError unless the other library's model, as we read it, is ours."""
    ours = _described(exchanged.build())
    theirs = _described(build_named(MODELS, dict(found), "config.model", more=TOWERS))
    for key in START:
        same = (ours.pop(key, None) is None) == (theirs.pop(key, None) is None)
        ours[key] = theirs[key] = 0
        if not same:
            ours[key], theirs[key] = "set", "none"
    if ours["text_tower.pool"] == "eos" and ours["text_tower.causal"]:
        # what stands behind the end of text is not read
        for key in ("text_tower.pad_id", "text_tower.attend_padding"):
            ours[key] = theirs[key]
    if ours["text_tower.attend_padding"]:
        ours["text_tower.pad_id"] = theirs["text_tower.pad_id"]
    if ours["text_tower.pool"] != "eos":  # the tower does not look for it
        ours["text_tower.eos_id"] = theirs["text_tower.eos_id"]
    different = [k for k in sorted(ours.keys() | theirs.keys()) if ours.get(k) != theirs.get(k)]
    if different:
        shown = ", ".join(f"{k}={ours.get(k, 'none')}" for k in different[:6])
        want = ", ".join(f"{k}={theirs.get(k, 'none')}" for k in different[:6])
        do = f"{library} has no such model; train one with its values"
        raise check.error(exchanged.source, shown, f"{want} for {library}", do)


SHARED = dict(eps=1e-6, activation="gelu")
BIG_VISION = {  # what its files do not say, since its code has nothing else
    "text_tower": dict(pool="last", causal=False, attend_padding=True, **SHARED),
    "image_tower": dict(
        pool="map", patch_bias=True, pre_norm=False, pool_first=False, pos="learned", registers=0, **SHARED
    ),
}  # fmt: skip


def _check_siglip(exchanged: Exchanged) -> None:
    """Raises UserError unless a model is SigLIP's two towers, as big_vision has them."""
    model = exchanged.build()
    wrong = [
        f"{part}.{k}={getattr(getattr(model, part), k)!r}"
        for part, want in BIG_VISION.items()
        for k, v in want.items()
        if getattr(getattr(model, part), k) != v
    ]
    wrong += ["project_image=True"] if model.project_image else []
    wrong += [] if model.text_bias else ["text_bias=False"]
    wrong += ["a decoder"] if model.decoder else []
    if wrong:
        do = "export it to another library"
        raise check.error(exchanged.source, ", ".join(wrong), "SigLIP's two towers", do)


def _check_towers(exchanged: Exchanged, system: str) -> None:
    """Raises UserError for towers that no table has."""
    model = exchanged.build()
    images = ("ViT", "ResNet") if system == "open_clip" else ("ViT",)
    for part, known in (("image_tower", images), ("text_tower", ("Text",))):
        if (name := type(getattr(model, part)).__name__) not in known:
            do = "export it to another library, or leave it"
            raise check.error(exchanged.source, f"{part} {name}", f"one of {known}", do)
    if not model.embed:
        do = "train a joint space first"
        raise check.error(exchanged.source, "no joint space", "one: embed", do)


def _with_cls_row(exchanged: Exchanged) -> Exchanged:
    """Other libraries' CLS has a position: zeros, where ours has none."""
    model, leaves = dict(exchanged.model), dict(exchanged.leaves)
    for tower in ("image_tower", "text_tower"):
        if f"{tower}/cls" in leaves and f"{tower}/cls_pos" not in leaves:
            leaves[f"{tower}/cls_pos"] = np.zeros_like(leaves[f"{tower}/cls"])
            model[tower] = {**model[tower], "cls_pos": True}
    return dataclasses.replace(exchanged, model=model, leaves=leaves)


def _in_own_numbering(exchanged: Exchanged) -> Exchanged:
    """The token tables in the numbering of the tokenizer's file, without our pad and unk where it has none."""
    words = exchanged.tokenizer
    if words is None or words.row.ids is not None or words.plain_bytes()[:1] != b"{":
        return exchanged
    old = np.array(words.old_ids)
    num = int(old.max()) + 1
    own = old >= 0
    leaves = dict(exchanged.leaves)
    for name, axis in (("text_tower/embedding", 0), ("unembedding", 1)):
        if name in leaves:
            table = np.moveaxis(leaves[name], axis, 0)
            moved = np.zeros((num, table.shape[1]), table.dtype)
            moved[old[own]] = table[: len(old)][own]
            leaves[name] = np.moveaxis(moved, 0, axis)
    four = tuple(int(old[i]) for i in range(4))
    ids = (max(0, four[0]), *four[1:])
    moved_words = words.with_row(ids=ids)
    text = {**exchanged.model["text_tower"], "vocab": num, "pad_id": ids[0], "eos_id": ids[2]}
    model = {**exchanged.model, "text_tower": text}
    return dataclasses.replace(exchanged, model=model, leaves=leaves, tokenizer=moved_words)


def _json(path: pathlib.Path, default: Any = None) -> Any:
    if default is not None and not path.is_file():
        return default
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as e:
        raise check.error(str(path), f"{e!s:.80}", "a JSON file", "correct it") from None


def _dump(path: pathlib.Path, value: Any) -> None:
    path.write_text(json.dumps(plain(value), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _safetensors() -> Any:
    try:
        import safetensors.numpy
    except ImportError:
        got, do = "no package 'safetensors'", 'run `pip install "vlp[hf]"`'
        raise check.error("vlp ckpt", got, "it", do) from None
    return safetensors.numpy


def _weights(folder: pathlib.Path, system: str) -> dict[str, np.ndarray]:
    """Their tensors by name, as float32."""
    library = _safetensors()
    index = folder / "model.safetensors.index.json"
    files = [folder / n for n in WEIGHTS[system] if (folder / n).is_file()][:1]
    if not files and index.is_file():
        files = [folder / n for n in sorted(set(_json(index)["weight_map"].values()))]
    files = files or sorted(folder.glob("*.safetensors"))[:1]
    if not files:
        do = "save them with safetensors: files of pickles (.bin, .pth) are not read"
        raise check.error(str(folder), "no .safetensors", "weights", do)
    out: dict[str, np.ndarray] = {}
    for file in files:
        try:
            out |= library.load_file(file)
        except Exception as e:  # its own type is not public
            got = f"{type(e).__name__} ({e!s:.80})"
            raise check.error(str(file), got, "a safetensors file", "fetch it again") from None
    return {name: np.asarray(x, np.float32) for name, x in out.items()}


def _save(arrays: Mapping[str, np.ndarray], path: pathlib.Path) -> None:
    _safetensors().save_file(
        {n: np.asarray(x, np.float32, order="C") for n, x in arrays.items()}, path, {"format": "pt"}
    )
