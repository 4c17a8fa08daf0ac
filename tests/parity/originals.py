"""Models of other libraries with random weights, at small sizes, and the folders that those libraries would publish."""

import json
import math
import pathlib

import numpy as np
import pytest

torch = pytest.importorskip("torch")


def operators():
    """torchvision's operators are not built for every torch; open_clip imports it but calls none of them."""
    library = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        try:
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        except RuntimeError:
            pass  # torchvision has its own
    return library


LIBRARY = operators()


def trained_like(model, seed=0):
    """Moves every parameter, so that no norm or bias has the value it starts with."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name in ("logit_scale", "logit_bias"):
                continue
            p += (
                0.05
                * torch.randn(p.shape, generator=generator)
                * (p.std() if p.numel() > 1 and p.std() > 0 else 1)
            )
        for name, b in model.named_buffers():
            if name.endswith(("running_mean", "running_var")):
                b += 0.2 * torch.rand(b.shape, generator=generator)
    return model.eval()


SMALL = dict(image_size=32, patch_size=8, width=64, layers=2, head_width=16)
TEXT = dict(context_length=12, vocab_size=49408, width=32, heads=4, layers=2)
OPEN_CLIP = {
    "ViT-B-32": dict(embed_dim=24, vision_cfg=SMALL, text_cfg=TEXT),
    "ViT-B-32-quickgelu": dict(embed_dim=24, quick_gelu=True, vision_cfg=SMALL, text_cfg=TEXT),
    "RN50": dict(
        embed_dim=24, vision_cfg=dict(image_size=64, layers=[2, 1, 2, 1], width=16, head_width=128), text_cfg=TEXT
    ),
    "ViT-B-16-CLIPA": dict(
        embed_dim=24,
        vision_cfg=dict(**SMALL, no_ln_pre=True, pool_type="avg", final_ln_after_pool=True),
        text_cfg=dict(**TEXT, pool_type="last", no_causal_mask=True),
    ),
    "ViT-B-16-SigLIP": dict(
        embed_dim=768,
        init_logit_bias=-10,
        custom_text=True,
        vision_cfg=dict(
            image_size=224, timm_model_name="vit_base_patch16_siglip_224", timm_pool="map", timm_proj="none"
        ),
        text_cfg=dict(
            **TEXT, no_causal_mask=True, proj_bias=True, pool_type="last", norm_kwargs=dict(eps=1e-6)
        ),
    ),
    "coca_ViT-B-32": dict(
        embed_dim=32,
        custom_text=True,
        vision_cfg=dict(
            **SMALL, attentional_pool=True, attn_pooler_heads=4, attn_pooler_queries=9, output_tokens=True
        ),
        text_cfg=dict(**TEXT, embed_cls=True, output_tokens=True),
        multimodal_cfg=dict(**TEXT, attn_pooler_heads=4),
    ),
}  # fmt: skip


def open_clip_model(cfg):
    """An OpenCLIP model of a JSON, trained-like."""
    dual = pytest.importorskip("open_clip.model")
    coca = pytest.importorskip("open_clip.coca_model")
    cfg = json.loads(json.dumps(cfg))
    custom = cfg.pop("custom_text", False)
    cls = coca.CoCa if "multimodal_cfg" in cfg else dual.CustomTextCLIP if custom else dual.CLIP
    torch.manual_seed(0)
    model = cls(**cfg)
    if hasattr(model, "text_decoder"):  # left as `torch.empty` there
        torch.nn.init.normal_(
            model.text_decoder.text_projection, std=cfg["text_cfg"]["width"] ** -0.5
        )
    return trained_like(model)


def open_clip_folder(cfg, model, folder, preprocess=None):
    from safetensors.torch import save_file

    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    preprocess = preprocess or {}
    config = dict(model_cfg=cfg, preprocess_cfg=preprocess)
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    save_file(
        {k: v.contiguous() for k, v in model.state_dict().items()},
        folder / "open_clip_model.safetensors",
    )
    return folder


def inputs(image_px, length, vocab=49408, num=3, seed=0):
    """u8 images, and CLIP's rows: one short, one of middle length, one full."""
    rng = np.random.default_rng(seed)
    image = rng.integers(0, 256, (num, image_px, image_px, 3)).astype(np.uint8)
    text = np.zeros((num, length), np.int32)
    for row, used in zip(text, np.linspace(3, length, num).astype(int)):
        row[:used] = [vocab - 2, *rng.integers(1000, vocab - 2, used - 2), vocab - 1]
    return image, text


def torch_image(image, mean, std):
    x = torch.from_numpy(image).permute(0, 3, 1, 2).float() / 255
    mean, std = (torch.tensor(v).reshape(1, 3, 1, 1) for v in (mean, std))
    return (x - mean) / std


def unit(x):
    x = x.detach().numpy()
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


SCALE = math.log(1 / 0.07)
