"""OpenCLIP's tensors ↔ our leaves: ViT, CLIP's ResNet, timm's SigLIP tower, text, CoCa's poolers and decoder.

Source: open_clip 3.3.0, `model.py`, `transformer.py`, `coca_model.py`; timm 1.0.31, `vision_transformer.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vlp.exchange import tensors as t


def rules(model: Mapping[str, Any], custom: bool, same_width: bool = False) -> list[t.Rule]:
    """Returns the table of a model's tensors.

    Args:
        model: our section, as `config` returns it.
        custom: the text tower's tensors begin with "text." (CustomTextCLIP, CoCa).
        same_width: the pooler's output is as wide as the image's tokens: PyTorch then has one matrix for q, k and v.
    """
    image, text = model["image_tower"], model["text_tower"]
    at = "text." if custom else ""
    if "depths" in image:
        out = _resnet(image)
    elif image["pool"] == "map":
        out = _timm(image)
    else:
        out = _vit(image)
        poolers = model.get("poolers")
        out += (
            _pooler(poolers, same_width)
            if poolers
            else t.norm("image_tower/norm", "visual.ln_post")
        )
        out.append(t.rule("joint_image/proj/kernel", "visual.proj"))
    out.append(t.rule("text_tower/embedding", f"{at}token_embedding.weight"))
    cls = text["pool"] == "cls"
    table = ("text_tower/pos", "text_tower/cls_pos") if cls else "text_tower/pos"
    out.append(t.rule(table, f"{at}positional_embedding", t.LAST_ROW if cls else t.SAME))
    out += [t.rule("text_tower/cls", f"{at}cls_emb")] if cls else []
    block = _block(text["heads"])
    out += t.stacked(
        block, "text_tower/encoder/blocks/", f"{at}transformer.resblocks.{{i}}.", text["depth"]
    )
    out += t.norm("text_tower/norm", f"{at}ln_final")
    if model["text_bias"]:
        out += t.linear("joint_text/proj", f"{at}text_projection")
    else:
        out.append(t.rule("joint_text/proj/kernel", f"{at}text_projection"))
    if decoder := model.get("decoder"):
        upper = [
            *_block(text["heads"], mlp="mlp_self"),
        ]
        upper = [*t.stacked(upper, "", "text_decoder.resblocks.{i}.", decoder["depth"]),
                 *t.stacked(_cross(text["heads"]), "", "text_decoder.cross_attn.{i}.", decoder["depth"])]  # fmt: skip
        out += [
            t.Rule(tuple(f"decoder/blocks/{n}" for n in r.ours), r.theirs, r.form, r.layers)
            for r in upper
        ]
        out += t.norm("decoder_norm", "text_decoder.ln_final")
        out.append(t.rule("unembedding", "text_decoder.text_projection"))
    out.append(t.rule("temperature/logit_scale", "logit_scale", t.SCALAR))
    if model.get("bias") is not None:
        out.append(t.rule("temperature/logit_bias", "logit_bias", t.SCALAR))
    return out


def _resnet(image: Mapping[str, Any]) -> list[t.Rule]:
    """ModifiedResNet; the first block of a stage is not stacked with the others."""
    out, at, pool = [], "image_tower", "visual.attnpool"
    for i in range(3):
        out.append(t.rule(f"{at}/stem{i}/kernel", f"visual.conv{i + 1}.weight", t.CONV))
        out += t.batch_norm(f"{at}/stem{i}_norm", f"visual.bn{i + 1}")
    block = []
    for i, form in enumerate((t.CONV_1, t.CONV, t.CONV_1)):
        block.append(t.rule(f"conv{i}/kernel", f"conv{i + 1}.weight", form))
        block += t.batch_norm(f"conv{i}_norm", f"bn{i + 1}")
    project = [t.rule("project/kernel", "downsample.0.weight", t.CONV_1)]
    project += t.batch_norm("project_norm", "downsample.1")
    for i, depth in enumerate(image["depths"]):
        ours, theirs = f"{at}/stage{i}", f"visual.layer{i + 1}"
        out += t.stacked([*block, *project], f"{ours}/first/", f"{theirs}.0.", 0)
        if depth > 1:
            out += t.stacked(block, f"{ours}/blocks/", f"{theirs}.{{i}}.", depth - 1, start=1)
    out.append(t.rule(f"{at}/pool/pos", f"{pool}.positional_embedding"))
    for ours, names in (("q", ["q_proj"]), ("kv", ["k_proj", "v_proj"])):
        form = t.heads_in(image["heads"], len(names), tensors=len(names))
        for ours_, theirs in (("kernel", "weight"), ("bias", "bias")):
            tensors = [f"{pool}.{n}.{theirs}" for n in names]
            out.append(t.rule(f"{at}/pool/{ours}/{ours_}", tensors, form))
    return out + t.head_out(f"{at}/pool/out", f"{pool}.c_proj", image["heads"])


def _block(heads: int, mlp: str = "mlp") -> list[t.Rule]:
    """ResidualAttentionBlock. mlp: the name of our MLP."""
    return [
        *t.norm("norm_self", "ln_1"),
        t.rule("self/qkv/kernel", "attn.in_proj_weight", t.heads_in(heads, 3)),
        t.rule("self/qkv/bias", "attn.in_proj_bias", t.heads_in(heads, 3)),
        *t.head_out("self/out", "attn.out_proj", heads),
        *t.norm(f"norm_{mlp}", "ln_2"),
        *t.linear(f"{mlp}/up", "mlp.c_fc"),
        *t.linear(f"{mlp}/down", "mlp.c_proj"),
    ]


def _cross(heads: int) -> list[t.Rule]:
    """The second block of a decoder's layer: cross-attention and MLP."""
    return [
        *t.norm("norm_cross", "ln_1"),
        *t.norm("norm_context", "ln_1_kv"),
        t.rule(("cross/q/kernel", "cross/kv/kernel"), "attn.in_proj_weight", t.q_and_kv(heads)),
        t.rule(("cross/q/bias", "cross/kv/bias"), "attn.in_proj_bias", t.q_and_kv(heads)),
        *t.head_out("cross/out", "attn.out_proj", heads),
        *t.norm("norm_mlp", "ln_2"),
        *t.linear("mlp/up", "mlp.c_fc"),
        *t.linear("mlp/down", "mlp.c_proj"),
    ]


def _vit(image: Mapping[str, Any]) -> list[t.Rule]:
    table = ("image_tower/cls_pos", "image_tower/pos")
    blocks = ("image_tower/encoder/blocks/", "visual.transformer.resblocks.{i}.", image["depth"])
    return [
        t.rule("image_tower/patch/kernel", "visual.conv1.weight", t.patches(image["patch"])),
        t.rule("image_tower/cls", "visual.class_embedding"),
        t.rule(table, "visual.positional_embedding", t.FIRST_ROW),
        *(t.norm("image_tower/norm_pre", "visual.ln_pre") if image["pre_norm"] else []),
        *t.stacked(_block(image["heads"]), *blocks),
    ]


def _pooler(poolers: Mapping[str, Any], same_width: bool) -> list[t.Rule]:
    heads, at = poolers["heads"], "pool_shared/attention"
    if same_width:
        kernels = [
            t.rule(
                (f"{at}/q/kernel", f"{at}/kv/kernel"),
                "visual.attn_pool.attn.in_proj_weight",
                t.q_and_kv(heads),
            )
        ]
    else:
        names = [f"visual.attn_pool.attn.{x}_proj_weight" for x in "qkv"]
        kernels = [
            t.rule(f"{at}/q/kernel", names[0], t.heads_in(heads, 1)),
            t.rule(f"{at}/kv/kernel", names[1:], t.heads_in(heads, 2, tensors=2)),
        ]
    return [
        *t.norm("image_tower/norm", "visual.attn_pool.ln_k"),
        t.rule("pool_shared/query", "visual.attn_pool.query"),
        *t.norm("pool_shared/norm_query", "visual.attn_pool.ln_q"),
        *kernels,
        t.rule(
            (f"{at}/q/bias", f"{at}/kv/bias"),
            "visual.attn_pool.attn.in_proj_bias",
            t.q_and_kv(heads),
        ),
        *t.head_out(f"{at}/out", "visual.attn_pool.attn.out_proj", heads),
        *t.norm("pool_shared/norm", "visual.ln_post"),
    ]


def _timm(image: Mapping[str, Any]) -> list[t.Rule]:
    """timm's VisionTransformer with SigLIP's attention pooling."""
    heads, trunk, pool = image["heads"], "visual.trunk", "image_tower/pool_map"
    block = [
        *t.norm("norm_self", "norm1"),
        t.rule("self/qkv/kernel", "attn.qkv.weight", t.heads_in(heads, 3)),
        t.rule("self/qkv/bias", "attn.qkv.bias", t.heads_in(heads, 3)),
        *t.head_out("self/out", "attn.proj", heads),
        *t.norm("norm_mlp", "norm2"),
        *t.linear("mlp/up", "mlp.fc1"),
        *t.linear("mlp/down", "mlp.fc2"),
    ]
    return [
        t.rule(
            "image_tower/patch/kernel",
            f"{trunk}.patch_embed.proj.weight",
            t.patches(image["patch"]),
        ),
        t.rule("image_tower/patch/bias", f"{trunk}.patch_embed.proj.bias"),
        t.rule("image_tower/pos", f"{trunk}.pos_embed", t.LEADING),
        *t.stacked(block, "image_tower/encoder/blocks/", f"{trunk}.blocks.{{i}}.", image["depth"]),
        *t.norm("image_tower/norm", f"{trunk}.norm"),
        t.rule(f"{pool}/query", f"{trunk}.attn_pool.latent", t.LEADING),
        t.rule(f"{pool}/attention/q/kernel", f"{trunk}.attn_pool.q.weight", t.heads_in(heads, 1)),
        t.rule(f"{pool}/attention/q/bias", f"{trunk}.attn_pool.q.bias", t.heads_in(heads, 1)),
        t.rule(f"{pool}/attention/kv/kernel", f"{trunk}.attn_pool.kv.weight", t.heads_in(heads, 2)),
        t.rule(f"{pool}/attention/kv/bias", f"{trunk}.attn_pool.kv.bias", t.heads_in(heads, 2)),
        *t.head_out(f"{pool}/attention/out", f"{trunk}.attn_pool.proj", heads),
        *t.norm(f"{pool}/norm", f"{trunk}.attn_pool.norm"),
        *t.linear(f"{pool}/mlp/up", f"{trunk}.attn_pool.mlp.fc1"),
        *t.linear(f"{pool}/mlp/down", f"{trunk}.attn_pool.mlp.fc2"),
    ]
