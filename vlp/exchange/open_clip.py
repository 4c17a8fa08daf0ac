"""OpenCLIP: a model's JSON ↔ our config (CLIP, CustomText with SigLIP's towers, CoCa). Tensors: `open_clip_tensors`.

Source: open_clip 3.3.0, `model.py`, `transformer.py`, `coca_model.py`; timm 1.0.31, `vision_transformer.py`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from vlp.core import check

# Fields of `CLIPVisionCfg` and `CLIPTextCfg` that have no place in our towers, with the values that change nothing.
VISION_FIXED = dict(
    ls_init_value=None, patch_dropout=0.0, pos_embed_type="learnable", block_type=None, qk_norm=False,
    scaled_cosine_attn=False, scale_heads=False, scale_attn_inner=False, scale_attn=False, scale_fc=False,
)  # fmt: skip
TEXT_FIXED = dict(
    ls_init_value=None, block_type=None, qk_norm=False, scaled_cosine_attn=False, scale_heads=False,
    scale_attn_inner=False, scale_attn=False, scale_fc=False, hf_model_name=None, proj_type="linear",
    tokenizer_mode=None, final_ln_after_pool=False, use_pad_mask=False,
)  # fmt: skip
TOP = (
    *("embed_dim", "vision_cfg", "text_cfg", "multimodal_cfg", "custom_text", "quick_gelu"),
    *("init_logit_scale", "init_logit_bias", "nonscalar_logit_scale", "pad_id"),
)
# timm's sizes of SigLIP: width, depth, heads, MLP.
TIMM = {
    "base": (768, 12, 12, 3072),
    "large": (1024, 24, 16, 4096),
    "so400m": (1152, 27, 16, 4304),
    "giantopt": (1536, 40, 16, 6144),
}
# timm's names have the size of the images; other sizes cannot be asked for.
TIMM_PX = {
    ("base", 16): (224, 256, 384, 512), ("base", 32): (256,), ("large", 16): (256, 384, 512),
    ("so400m", 14): (224, 378), ("so400m", 16): (256, 384, 512), ("giantopt", 16): (256, 384),
}  # fmt: skip
TIMM_NAME = re.compile(r"vit_(base|large|so400m|giantopt)_patch(\d+)_siglip_(\d+)")
OPENAI = dict(
    mean=(0.48145466, 0.4578275, 0.40821073), std=(0.26862954, 0.26130258, 0.27577711)
)  # fmt: skip
EVAL_CROP = {"shortest": "torchvision", "squash": "squash"}  # of preprocess_cfg's resize_mode


class Foreign(check.UserError):
    """An architecture that is not ours; `part` names what."""

    def __init__(self, where: str, part: str):
        super().__init__(
            str(check.error(where, part, "an architecture of vlp", "import another model"))
        )
        self.part = part


def config(
    cfg: Mapping[str, Any], preprocess: Mapping[str, Any], where: str
) -> tuple[dict[str, Any], str, dict[str, Any]]:
    """Returns our sections of a model's JSON.

    Args:
        cfg: as in OpenCLIP's model_configs/, or `model_cfg` of open_clip_config.json.
        preprocess: `preprocess_cfg`; {}: OpenCLIP's defaults.
        where: the file, for errors.

    Returns:
        The section `model`, the name of the objective, and the fields of `data`.

    Raises:
        Foreign: a part that our towers do not have.
    """
    if unknown := [k for k in cfg if k not in TOP]:
        raise Foreign(where, f"the field {unknown[0]!r}")
    vision, text, upper = (
        dict(cfg.get(k) or {}) for k in ("vision_cfg", "text_cfg", "multimodal_cfg")
    )
    for section, fixed in ((vision, VISION_FIXED), (text, TEXT_FIXED)):
        for key, same in fixed.items():
            if section.get(key, same) != same:
                raise Foreign(where, f"{key}={section[key]!r}")
    quick = bool(cfg.get("quick_gelu"))
    image_px = vision.get("image_size", 224)
    if not isinstance(image_px, int):
        raise Foreign(where, f"images of {image_px} pixels, not square")
    embed = cfg["embed_dim"]
    image = _image_tower(vision, quick, embed, where)
    stride = image.get("patch", 4 * 2 ** (len(image.get("depths", ())) - 1))
    if image_px % stride:
        raise Foreign(where, f"image_size {image_px}, no multiple of the patch {stride}")
    image |= {k: tuple(preprocess.get(k, OPENAI[k])) for k in OPENAI}
    lower = _text_tower(text, quick, where)
    model: dict[str, Any] = dict(
        name="two_tower", image_tower=image, text_tower=lower, embed=embed,
        scale=math.exp(cfg.get("init_logit_scale", math.log(1 / 0.07))),
        bias=cfg.get("init_logit_bias"), text_bias=bool(text.get("proj_bias")),
        project_image="patch" in image and not vision.get("timm_model_name"),
    )  # fmt: skip
    if bool(vision.get("attentional_pool")) != bool(upper):
        raise Foreign(where, "an attentional pool without a decoder, or the reverse")
    if upper:
        model |= _coca(vision, text, upper, embed, where)
    mode = preprocess.get("resize_mode", "shortest")
    if mode not in EVAL_CROP:
        raise Foreign(where, f"resize_mode={mode!r}")
    data = dict(
        image_px=image_px, text_len=text.get("context_length", 77), eval_crop=EVAL_CROP[mode],
        resize=preprocess.get("interpolation", "bicubic"), crop="torchvision", max_aspect=4 / 3,
        min_area_frac=0.9,
    )  # fmt: skip
    objective = "coca" if upper else "siglip" if model["bias"] is not None else "clip"
    return model, objective, data


def _activation(section: Mapping[str, Any], quick: bool, where: str) -> str:
    kwargs = section.get("act_kwargs") or {}
    if kwargs == {"approximate": "tanh"} and not quick:
        return "gelu"
    if kwargs:
        raise Foreign(where, f"act_kwargs={kwargs}")
    return "quick_gelu" if quick else "gelu_exact"


def _eps(section: Mapping[str, Any], where: str) -> float:
    kwargs = dict(section.get("norm_kwargs") or {})
    eps = kwargs.pop("eps", 1e-5)
    if kwargs:
        raise Foreign(where, f"norm_kwargs={kwargs}")
    return eps


def _image_tower(v: Mapping[str, Any], quick: bool, embed: int, where: str) -> dict[str, Any]:
    if name := v.get("timm_model_name"):
        found = TIMM_NAME.fullmatch(name)
        if not found or (v.get("timm_pool"), v.get("timm_proj")) not in (
            ("map", "none"),
            ("map", ""),
        ):
            raise Foreign(where, f"timm's {name}")
        width, depth, heads, mlp = TIMM[found[1]]
        patch, px = int(found[2]), int(found[3])
        if px % patch:
            raise Foreign(where, f"image_size {px}, no multiple of the patch {patch}")
        if px not in TIMM_PX.get((found[1], patch), ()) or px != v.get("image_size", 224):
            raise Foreign(where, f"timm's {name} for images of {v.get('image_size', 224)} pixels")
        if width != embed:
            raise Foreign(where, f"embed_dim {embed} unlike timm's width {width}")
        sizes = dict(patch=patch, width=width, depth=depth, heads=heads, mlp=mlp)
        return dict(**sizes, pool="map", activation="gelu_exact", eps=1e-6)
    layers, width, patch = v.get("layers", 12), v.get("width", 768), v.get("patch_size", 16)
    if not isinstance(layers, int):
        heads = width * 32 // v.get("head_width", 64)
        sizes = dict(depths=tuple(layers), width=v.get("width", 64), heads=heads, out=embed)
        return dict(name="resnet", **sizes)
    if not isinstance(patch, int):
        raise Foreign(where, f"patches of {patch} pixels, not square")
    pools = {("tok", False): "cls", ("avg", False): "mean_patches", ("avg", True): "mean_patches",
             ("tok", True): "cls"}  # fmt: skip
    after, kind = bool(v.get("final_ln_after_pool")), v.get("pool_type", "tok")
    if (kind, after) not in pools:
        raise Foreign(where, f"pool_type={kind!r}")
    pool = dict(pool=pools[kind, after], pool_first=after)
    if attentional := v.get("attentional_pool"):
        if attentional is not True or kind != "tok":
            raise Foreign(where, f"attentional_pool={attentional!r} with pool_type={kind!r}")
        pool = dict(pool="none")
    sizes = dict(patch=patch, width=width, depth=layers, heads=width // v.get("head_width", 64))
    mlp = int(width * v.get("mlp_ratio", 4.0))
    front = dict(cls=True, cls_pos=True, pre_norm=not v.get("no_ln_pre"), patch_bias=False)
    shared = dict(activation=_activation(v, quick, where), eps=_eps(v, where))
    return dict(**sizes, mlp=mlp, **front, **pool, **shared)


def _text_tower(x: Mapping[str, Any], quick: bool, where: str) -> dict[str, Any]:
    width, vocab, causal = (
        x.get("width", 512),
        x.get("vocab_size", 49408),
        not x.get("no_causal_mask"),
    )
    sizes = dict(
        vocab=vocab, width=width, depth=x.get("layers", 12), heads=x.get("heads", 8),
        mlp=int(width * x.get("mlp_ratio", 4.0)),
    )  # fmt: skip
    kind = x.get("pool_type", "argmax")
    ids = dict(
        pad_id=x.get("pad_id", 0), eos_id=vocab - 1 if kind == "argmax" else x.get("eos_id", 2)
    )
    if x.get("embed_cls"):
        if not causal:
            raise Foreign(where, "a CLS in a text tower that is not causal")
        pool = dict(pool="cls", cls_pos=True, cls_mask="shifted")
    else:
        pools = {"argmax": "eos", "eos": "eos", "last": "last", "first": "first"}
        if kind not in pools:
            raise Foreign(where, f"the text's pool_type={kind!r}")
        pool = dict(pool=pools[kind], attend_padding=True)
    shared = dict(causal=causal, activation=_activation(x, quick, where), eps=_eps(x, where))
    return dict(**sizes, **ids, **pool, **shared)


def _coca(
    v: Mapping[str, Any], x: Mapping[str, Any], u: Mapping[str, Any], embed: int, where: str
) -> dict[str, Any]:
    """The sections `decoder` and `poolers`; the decoder's fields are `MultimodalCfg`'s, which has the text's too."""
    if not x.get("embed_cls"):
        raise Foreign(where, "a decoder above a text tower without CLS")
    for key, default in (("width", 512), ("heads", 8), ("act_kwargs", None), ("norm_kwargs", None)):
        if u.get(key, default) != x.get(key, default):
            raise Foreign(where, f"a decoder whose {key} is not the text tower's")
    if u.get("width", 512) != embed:
        raise Foreign(
            where, f"a decoder of width {u.get('width', 512)} for image tokens of {embed}"
        )
    mlp = int(u.get("width", 512) * u.get("mlp_ratio", 4))
    return dict(
        decoder=dict(depth=u.get("layers", 12), mlp=mlp, norm_image=True, mlp_self=True),
        poolers=dict(
            queries=v.get("attn_pooler_queries", 256) - 1, heads=v.get("attn_pooler_heads", 8),
            cascade=False, shared=True,
        ),
    )  # fmt: skip


def to_config(model: Any, data: Mapping[str, Any]) -> dict[str, Any]:
    """Returns OpenCLIP's JSON of a built model; whether it says everything, `config` tells."""
    image, text = model.image_tower, model.text_tower
    quick = "quick_gelu" in (getattr(image, "activation", ""), text.activation)
    v: dict[str, Any] = dict(image_size=data["image_px"])
    if hasattr(image, "depths"):
        heads = image.width * 32 // image.heads
        v |= dict(layers=list(image.depths), width=image.width, head_width=heads)
    elif image.pool == "map":
        size = {s: name for name, s in TIMM.items()}.get(
            (image.width, image.depth, image.heads, image.mlp or 4 * image.width), "base"
        )
        name = f"vit_{size}_patch{image.patch}_siglip_{data['image_px']}"
        v |= dict(
            timm_model_name=name, timm_model_pretrained=False, timm_pool="map", timm_proj="none"
        )
    else:
        heads = image.width // image.heads
        v |= dict(layers=image.depth, width=image.width, patch_size=image.patch, head_width=heads)
        v |= _other(image, quick) | ({} if image.pre_norm else dict(no_ln_pre=True))
        if image.pool == "mean_patches":
            v |= dict(pool_type="avg")
        if image.pool_first:
            v |= dict(final_ln_after_pool=True)
    x: dict[str, Any] = dict(
        context_length=data["text_len"], vocab_size=text.vocab, width=text.width, heads=text.heads,
        layers=text.depth, **_other(text, quick),
    )  # fmt: skip
    x |= {} if text.causal else dict(no_causal_mask=True)
    x |= dict(proj_bias=True) if model.text_bias else {}
    if text.pool == "cls":
        x |= dict(embed_cls=True, output_tokens=True, pad_id=text.pad_id, eos_id=text.eos_id)
    elif text.pool == "eos" and text.eos_id == text.vocab - 1:
        pass  # OpenCLIP's "argmax": the highest id
    else:
        x |= dict(pool_type=text.pool, eos_id=text.eos_id)
    out: dict[str, Any] = dict(embed_dim=model.embed, vision_cfg=v, text_cfg=x)
    out |= dict(quick_gelu=True) if quick else {}
    out |= dict(init_logit_bias=model.bias) if model.bias is not None else {}
    timm = getattr(image, "pool", "") == "map"
    out |= dict(custom_text=True) if timm or model.decoder else {}
    if model.decoder and model.poolers:
        heads = model.poolers.heads or text.heads
        v |= dict(attentional_pool=True, attn_pooler_heads=heads, output_tokens=True)
        v |= dict(attn_pooler_queries=model.poolers.queries + 1)
        mlp = (model.decoder.mlp or text.mlp or 4 * text.width) / text.width
        x.pop("pad_id")
        x |= dict(pad_id=text.pad_id)
        upper = {k: x[k] for k in ("context_length", "vocab_size", "width", "heads")}
        upper |= {k: x[k] for k in ("act_kwargs", "norm_kwargs") if k in x}
        out["multimodal_cfg"] = upper | dict(
            layers=model.decoder.depth, attn_pooler_heads=heads, mlp_ratio=mlp
        )
    return out


def _other(tower: Any, quick: bool) -> dict[str, Any]:
    """The fields that differ from OpenCLIP's defaults, of either tower."""
    out: dict[str, Any] = {}
    if tower.mlp and tower.mlp != 4 * tower.width:
        out |= dict(mlp_ratio=tower.mlp / tower.width)
    if tower.eps != 1e-5:
        out |= dict(norm_kwargs=dict(eps=tower.eps))
    if tower.activation == "gelu" and not quick:
        out |= dict(act_kwargs=dict(approximate="tanh"))
    return out
