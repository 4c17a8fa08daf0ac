"""Hugging Face transformers: config and tensors of CLIPModel and SiglipModel ↔ ours.

SigLIP 2 at fixed resolution is a SiglipModel with another tokenizer.

Source: transformers 5.24.0, `modeling_clip.py`, `modeling_siglip.py` and their configurations.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from vlp.exchange import tensors as t
from vlp.exchange.open_clip import OPENAI, Foreign

ACTIVATIONS = {"quick_gelu": "quick_gelu", "gelu": "gelu_exact", "gelu_pytorch_tanh": "gelu"}
RESAMPLE = {"bilinear": 2, "bicubic": 3, "lanczos": 1, "box": 4}  # Pillow's numbers
# Defaults of CLIPTextConfig, CLIPVisionConfig, SiglipTextConfig and SiglipVisionConfig, which files may leave out.
_SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
DEFAULTS = {
    "clip": (
        dict(zip(_SIZES, (512, 2048, 12, 8)), vocab_size=49408, max_position_embeddings=77,
             hidden_act="quick_gelu", layer_norm_eps=1e-5, eos_token_id=49407, pad_token_id=1, bos_token_id=49406),
        dict(zip(_SIZES, (768, 3072, 12, 12)), image_size=224, patch_size=32, hidden_act="quick_gelu",
             layer_norm_eps=1e-5, num_channels=3),
    ),
    "siglip": (
        dict(zip(_SIZES, (768, 3072, 12, 12)), vocab_size=32000, max_position_embeddings=64,
             hidden_act="gelu_pytorch_tanh", layer_norm_eps=1e-6, eos_token_id=49407, pad_token_id=1,
             bos_token_id=49406, projection_size=None),
        dict(zip(_SIZES, (768, 3072, 12, 12)), image_size=224, patch_size=16, hidden_act="gelu_pytorch_tanh",
             layer_norm_eps=1e-6, num_channels=3, vision_use_head=True),
    ),
}  # fmt: skip
UNUSED = ("text_model.embeddings.position_ids", "vision_model.embeddings.position_ids")  # old files


def config(
    cfg: Mapping[str, Any], preprocessor: Mapping[str, Any], where: str
) -> tuple[dict[str, Any], str, dict[str, Any]]:
    """Returns our sections of config.json and preprocessor_config.json ({}: defaults): model, objective, `data`.

    Raises:
        Foreign: a model type or part that is not ours.
    """
    kind = cfg.get("model_type", "")
    if kind not in DEFAULTS:
        raise Foreign(where, f"model_type {kind!r}")
    text, vision = (
        default | dict(cfg.get(name) or {})
        for default, name in zip(DEFAULTS[kind], ("text_config", "vision_config"))
    )
    for section in (text, vision):
        if section["hidden_act"] not in ACTIVATIONS:
            raise Foreign(where, f"hidden_act {section['hidden_act']!r}")
    if vision["image_size"] % vision["patch_size"]:
        got = f"image_size {vision['image_size']}, no multiple of patch_size {vision['patch_size']}"
        raise Foreign(where, got)
    pixels = (0.5, 0.5, 0.5)
    default = OPENAI if kind == "clip" else dict(mean=pixels, std=pixels)
    image = dict(patch=vision["patch_size"], **_sizes(vision))
    image |= {k: tuple(preprocessor.get(f"image_{k}", default[k])) for k in default}
    lower = dict(vocab=text["vocab_size"], attend_padding=True, **_sizes(text))
    if kind == "clip":
        embed, eos = cfg.get("projection_dim", 512), text["eos_token_id"]
        image |= dict(pool="cls", cls=True, cls_pos=True, pre_norm=True, patch_bias=False)
        # files with eos 2 are older than that field: their end of text is the highest id
        lower |= dict(pool="eos", eos_id=text["vocab_size"] - 1 if eos == 2 else eos, pad_id=-1)
        scale, bias = cfg.get("logit_scale_init_value", 2.6592), None
    else:
        embed, scale, bias = vision["hidden_size"], math.log(10), -10.0
        if (
            not vision["vision_use_head"]
            or (text["projection_size"] or text["hidden_size"]) != embed
        ):
            raise Foreign(where, "a SigLIP without head, or with towers of different width")
        image |= dict(pool="map")
        lower |= dict(pool="last", causal=False, eos_id=1, pad_id=-1)
    model = dict(
        name="two_tower", image_tower=image, text_tower=lower, embed=embed, scale=math.exp(scale),
        bias=bias, project_image=kind == "clip", text_bias=kind == "siglip",
    )  # fmt: skip
    names = {number: name for name, number in RESAMPLE.items()}
    data = dict(
        image_px=vision["image_size"], text_len=text["max_position_embeddings"],
        eval_crop="torchvision" if kind == "clip" else "squash",
        resize=names.get(preprocessor.get("resample", 3), "bicubic"),
    )  # fmt: skip
    return model, kind, data


def _sizes(section: Mapping[str, Any]) -> dict[str, Any]:
    width, mlp, depth, heads = (section[k] for k in _SIZES)
    shared = dict(activation=ACTIVATIONS[section["hidden_act"]], eps=section["layer_norm_eps"])
    return dict(width=width, mlp=mlp, depth=depth, heads=heads, **shared)


def to_config(model: Any, data: Mapping[str, Any]) -> dict[str, Any]:
    """Returns config.json of a built model; whether it says everything, `config` tells."""
    kind = "siglip" if model.image_tower.pool == "map" else "clip"
    acts = {ours: theirs for theirs, ours in ACTIVATIONS.items()}

    def section(tower: Any) -> dict[str, Any]:
        sizes = tower.width, tower.mlp or 4 * tower.width, tower.depth, tower.heads
        act = acts.get(tower.activation, tower.activation)
        return dict(
            zip(_SIZES, sizes), hidden_act=act, layer_norm_eps=tower.eps, model_type=f"{kind}_"
        )

    text, vision = section(model.text_tower), section(model.image_tower)
    text |= dict(vocab_size=model.text_tower.vocab, max_position_embeddings=data["text_len"])
    text |= dict(eos_token_id=model.text_tower.eos_id, model_type=f"{kind}_text_model")
    vision |= dict(image_size=data["image_px"], patch_size=model.image_tower.patch)
    vision |= dict(model_type=f"{kind}_vision_model")
    architecture = {"clip": "CLIPModel", "siglip": "SiglipModel"}[kind]
    out: dict[str, Any] = dict(architectures=[architecture], model_type=kind, dtype="float32")
    if kind == "clip":
        text |= dict(projection_dim=model.embed, bos_token_id=text["eos_token_id"] - 1)
        vision |= dict(projection_dim=model.embed)
        out |= dict(projection_dim=model.embed, logit_scale_init_value=math.log(model.scale))
    else:
        text |= dict(projection_size=model.embed, bos_token_id=None, pad_token_id=1)
        vision |= dict(vision_use_head=True)
    return out | dict(text_config=text, vision_config=vision)


def to_preprocessor(model: Any, data: Mapping[str, Any]) -> dict[str, Any]:
    """Returns preprocessor_config.json."""
    px = data["image_px"]
    out: dict[str, Any] = dict(
        do_convert_rgb=True, do_resize=True, resample=RESAMPLE.get(data["resize"], 3), do_rescale=True,
        rescale_factor=1 / 255, do_normalize=True, image_mean=list(model.image_tower.mean),
        image_std=list(model.image_tower.std),
    )  # fmt: skip
    square = dict(height=px, width=px)
    if data["eval_crop"] == "squash":
        return out | dict(image_processor_type="SiglipImageProcessor", size=square)
    crop = dict(do_center_crop=True, crop_size=square, size=dict(shortest_edge=px))
    return out | dict(image_processor_type="CLIPImageProcessor", **crop)


def rules(model: Mapping[str, Any]) -> list[t.Rule]:
    """Returns the table of a model's tensors; model: our section, as `config` returns it."""
    image, text = model["image_tower"], model["text_tower"]
    siglip = image["pool"] == "map"
    at, to = "vision_model.embeddings", "text_model.embeddings"
    out = [
        t.rule(
            "image_tower/patch/kernel", f"{at}.patch_embedding.weight", t.patches(image["patch"])
        )
    ]
    if siglip:
        out.append(t.rule("image_tower/patch/bias", f"{at}.patch_embedding.bias"))
        out.append(t.rule("image_tower/pos", f"{at}.position_embedding.weight"))
        out += _head(image["heads"])
    else:
        table = ("image_tower/cls_pos", "image_tower/pos")
        out.append(t.rule(table, f"{at}.position_embedding.weight", t.FIRST_ROW))
        out.append(t.rule("image_tower/cls", f"{at}.class_embedding"))
        out += t.norm("image_tower/norm_pre", "vision_model.pre_layrnorm")  # as spelt there
    out += t.norm("image_tower/norm", "vision_model.post_layernorm")
    out.append(t.rule("text_tower/embedding", f"{to}.token_embedding.weight"))
    out.append(t.rule("text_tower/pos", f"{to}.position_embedding.weight"))
    out += t.norm("text_tower/norm", "text_model.final_layer_norm")
    for tower, name in ((image, "image"), (text, "text")):
        theirs = f"{'vision' if name == 'image' else 'text'}_model.encoder.layers.{{i}}."
        ours = f"{name}_tower/encoder/blocks/"
        out += t.stacked(_block(tower["heads"]), ours, theirs, tower["depth"])
    if siglip:
        out += t.linear("joint_text/proj", "text_model.head")
        out.append(t.rule("temperature/logit_bias", "logit_bias", t.ONE))
    else:
        out.append(t.rule("joint_image/proj/kernel", "visual_projection.weight", t.TRANSPOSED))
        out.append(t.rule("joint_text/proj/kernel", "text_projection.weight", t.TRANSPOSED))
    out.append(t.rule("temperature/logit_scale", "logit_scale", t.ONE if siglip else t.SCALAR))
    return out


def _block(heads: int) -> list[t.Rule]:
    qkv = [f"self_attn.{x}_proj" for x in "qkv"]
    three = t.heads_in(heads, 3, tensors=3)
    return [
        *t.norm("norm_self", "layer_norm1"),
        t.rule("self/qkv/kernel", [f"{x}.weight" for x in qkv], three),
        t.rule("self/qkv/bias", [f"{x}.bias" for x in qkv], three),
        *t.head_out("self/out", "self_attn.out_proj", heads),
        *t.norm("norm_mlp", "layer_norm2"),
        *t.linear("mlp/up", "mlp.fc1"),
        *t.linear("mlp/down", "mlp.fc2"),
    ]


def _head(heads: int) -> list[t.Rule]:
    """SigLIP's attention pooling."""
    ours, theirs = "image_tower/pool_map", "vision_model.head"
    q_kv, at = t.q_and_kv(heads), f"{ours}/attention"
    return [
        t.rule(f"{ours}/query", f"{theirs}.probe", t.LEADING),
        t.rule((f"{at}/q/kernel", f"{at}/kv/kernel"), f"{theirs}.attention.in_proj_weight", q_kv),
        t.rule((f"{at}/q/bias", f"{at}/kv/bias"), f"{theirs}.attention.in_proj_bias", q_kv),
        *t.head_out(f"{at}/out", f"{theirs}.attention.out_proj", heads),
        *t.norm(f"{ours}/norm", f"{theirs}.layernorm"),
        *t.linear(f"{ours}/mlp/up", f"{theirs}.mlp.fc1"),
        *t.linear(f"{ours}/mlp/down", f"{theirs}.mlp.fc2"),
    ]
