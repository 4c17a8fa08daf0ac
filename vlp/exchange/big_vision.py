"""big_vision's .npz: two_towers of SigLIP, and LiT's image tower. Sizes are read from the arrays; heads are width / 64.

Source: big_vision at 0127fb6, `models/vit.py`, `models/proj/image_text/{two_towers,text_transformer}.py`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from vlp.exchange import tensors as t
from vlp.exchange.open_clip import Foreign

HEAD = 64  # their variants' width / heads, but for these widths
HEADS = {1152: 16, 1408: 16, 1280: 16, 1664: 16, 1536: 16}
ROOT = "params/"
_BLOCK = re.compile(r"(.*/)encoderblock/(.*)")
_NUMBERED = re.compile(r".*/encoderblock_(\d+)/.*")


def unscanned(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Returns the arrays by name, without ROOT; scanned blocks (one, with a layer axis) are numbered."""
    if any(name.startswith(ROOT) for name in arrays):
        arrays = {n.removeprefix(ROOT): x for n, x in arrays.items() if n.startswith(ROOT)}
    out: dict[str, np.ndarray] = {}
    for name, x in arrays.items():
        if found := _BLOCK.fullmatch(name):
            out |= {f"{found[1]}encoderblock_{i}/{found[2]}": layer for i, layer in enumerate(x)}
        else:
            out[name] = x
    return {n: np.asarray(x, np.float32) for n, x in out.items()}


def config(
    arrays: Mapping[str, np.ndarray], where: str
) -> tuple[dict[str, Any], str, dict[str, Any]]:
    """Returns our sections of a file's (unscanned) arrays: model, objective, `data`.

    Raises:
        Foreign: a text tower that is not big_vision's own (LiT's BERT), or an image tower with other parts.
    """
    image, data = image_config(arrays, where)
    if "img/head/kernel" in arrays:
        raise Foreign(where, "a projection of the image with a bias (try --only image)")
    if "txt/Embed_0/embedding" not in arrays:
        raise Foreign(where, "no text tower of big_vision's own (LiT's is BERT; try --only image)")
    vocab, text_width = arrays["txt/Embed_0/embedding"].shape
    embed = arrays["txt/head/kernel"].shape[1]
    text = dict(vocab=vocab, causal=False, pool="last", attend_padding=True, eos_id=1, pad_id=-1)
    text |= _sizes(arrays, "txt/Encoder_0/", text_width)
    bias = "b" in arrays
    model = dict(
        name="two_tower", image_tower=image, text_tower=text, embed=embed, scale=10.0,
        bias=-10.0 if bias else None, project_image=False, text_bias=True,
    )  # fmt: skip
    data |= dict(text_len=arrays["txt/pos_embedding"].shape[1])
    return model, "siglip" if bias else "clip", data


def image_config(
    arrays: Mapping[str, np.ndarray], where: str
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns the section `image_tower`, and the fields of `data` that follow from it. Raises Foreign, as `config`."""
    if "img/embedding/kernel" not in arrays:
        raise Foreign(where, "no img/embedding/kernel")
    patch, width = arrays["img/embedding/kernel"].shape[0], arrays["img/embedding/kernel"].shape[-1]
    num, cls = arrays["img/pos_embedding"].shape[1], "img/cls" in arrays
    pool = "cls" if cls else "map" if "img/MAPHead_0/probe" in arrays else "mean"
    image = dict(patch=patch, pool=pool, **_sizes(arrays, "img/Transformer/", width))
    # with class token the position table has, or has not, a row for it
    row = cls and math.isqrt(num) ** 2 != num
    image |= dict(cls_pos=True) if row else {}
    side = math.isqrt(num - row)
    return image, dict(image_px=side * patch, eval_crop="squash", resize="bilinear")


def _sizes(arrays: Mapping[str, np.ndarray], at: str, width: int) -> dict[str, Any]:
    found = [_NUMBERED.fullmatch(n) for n in arrays if n.startswith(at)]
    depth = 1 + max(int(m[1]) for m in found if m)
    kernel = arrays[f"{at}encoderblock_0/MultiHeadDotProductAttention_0/query/kernel"]
    mlp = arrays[f"{at}encoderblock_0/MlpBlock_0/Dense_0/kernel"].shape[1]
    return dict(
        width=width, depth=depth, heads=kernel.shape[1], mlp=mlp, activation="gelu", eps=1e-6
    )


def rules(model: Mapping[str, Any]) -> list[t.Rule]:
    """Returns the table of a model's arrays; model: our section, as `config` returns it."""
    image, text = model["image_tower"], model["text_tower"]
    out = [
        t.rule("image_tower/patch/kernel", "img/embedding/kernel", _patches(image["patch"])),
        t.rule("image_tower/patch/bias", "img/embedding/bias"),
        *_norm("image_tower/norm", "img/Transformer/encoder_norm"),
        t.rule("text_tower/embedding", "txt/Embed_0/embedding"),
        t.rule("text_tower/pos", "txt/pos_embedding", t.LEADING),
        *_norm("text_tower/norm", "txt/Encoder_0/encoder_norm"),
        *_linear("joint_text/proj", "txt/head"),
        t.rule("temperature/logit_scale", "t", t.ONE),
    ]
    if model.get("bias") is not None:
        out.append(t.rule("temperature/logit_bias", "b", t.ONE))
    if image["pool"] != "cls":
        out.append(t.rule("image_tower/pos", "img/pos_embedding", t.LEADING))
        out += _map_pool() if image["pool"] == "map" else []
    else:
        first = t.Form(
            lambda p: (p[0, 0], p[0, 1:]),
            lambda row, rest: (np.concatenate([row[None], rest])[None],),
        )
        table = ("image_tower/cls_pos", "image_tower/pos")
        row = bool(image.get("cls_pos"))
        out.append(
            t.rule(table if row else table[1], "img/pos_embedding", first if row else t.LEADING)
        )
        cls = t.Form(lambda c: (c.reshape(-1),), lambda c: (c[None, None],))
        out.append(t.rule("image_tower/cls", "img/cls", cls))
    for tower, ours, theirs in (
        (image, "image_tower", "img/Transformer"),
        (text, "text_tower", "txt/Encoder_0"),
    ):
        at = f"{theirs}/encoderblock_{{i}}/"
        out += t.stacked(_block(), f"{ours}/encoder/blocks/", at, tower["depth"])
    return out


def image_rules(image: Mapping[str, Any]) -> list[t.Rule]:
    """Returns the table of an image tower alone (LiT's files)."""
    model = dict(image_tower=image, text_tower=dict(depth=0))
    return [r for r in rules(model) if r.ours[0].startswith("image_tower/")]


def _patches(side: int) -> t.Form:
    """[p, p, 3, W] ↔ [p · p · 3, W]."""
    return t.Form(
        lambda k: (k.reshape(-1, k.shape[-1]),), lambda k: (k.reshape(side, side, 3, -1),)
    )


def _stack(axis: int) -> t.Form:
    return t.Form(
        lambda *x: (np.stack(x, axis),),
        lambda k: tuple(np.squeeze(x, axis) for x in np.split(k, k.shape[axis], axis)),
    )


def _norm(ours: str, theirs: str) -> list[t.Rule]:
    return [t.rule(f"{ours}/{x}", f"{theirs}/{x}") for x in ("scale", "bias")]


def _linear(ours: str, theirs: str) -> list[t.Rule]:
    return [t.rule(f"{ours}/{x}", f"{theirs}/{x}") for x in ("kernel", "bias")]


def _block() -> list[t.Rule]:
    at = "MultiHeadDotProductAttention_0"
    parts = ("query", "key", "value")
    return [
        *_norm("norm_self", "LayerNorm_0"),
        t.rule("self/qkv/kernel", [f"{at}/{x}/kernel" for x in parts], _stack(1)),
        t.rule("self/qkv/bias", [f"{at}/{x}/bias" for x in parts], _stack(0)),
        *_linear("self/out", f"{at}/out"),
        *_norm("norm_mlp", "LayerNorm_1"),
        *_linear("mlp/up", "MlpBlock_0/Dense_0"),
        *_linear("mlp/down", "MlpBlock_0/Dense_1"),
    ]


def _map_pool() -> list[t.Rule]:
    ours, theirs = "image_tower/pool_map", "img/MAPHead_0"
    at = f"{theirs}/MultiHeadDotProductAttention_0"
    return [
        t.rule(f"{ours}/query", f"{theirs}/probe", t.LEADING),
        *_linear(f"{ours}/attention/q", f"{at}/query"),
        t.rule(
            f"{ours}/attention/kv/kernel", [f"{at}/{x}/kernel" for x in ("key", "value")], _stack(1)
        ),
        t.rule(
            f"{ours}/attention/kv/bias", [f"{at}/{x}/bias" for x in ("key", "value")], _stack(0)
        ),
        *_linear(f"{ours}/attention/out", f"{at}/out"),
        *_norm(f"{ours}/norm", f"{theirs}/LayerNorm_0"),
        *_linear(f"{ours}/mlp/up", f"{theirs}/MlpBlock_0/Dense_0"),
        *_linear(f"{ours}/mlp/down", f"{theirs}/MlpBlock_0/Dense_1"),
    ]
