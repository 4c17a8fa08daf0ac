"""The papers' towers by name, as sections of a config: `IMAGE["B/16"]` and `TEXT["flip"]["B/16"]`.

Only sizes (patch, width, depth, heads, MLP; vocabulary); how a paper pools, masks and normalises is in `clip`, `flip`,
`clipa` and `siglip` below, which return the whole section `model`. tests/test_towers.py counts their parameters.
"""

from typing import Any

from vlp.core import check


def image(patch: int, width: int, depth: int, heads: int, mlp: int = 0) -> dict[str, int]:
    return dict(patch=patch, width=width, depth=depth, heads=heads, mlp=mlp or 4 * width)


def text(width: int, depth: int, heads: int, mlp: int = 0) -> dict[str, int]:
    return dict(width=width, depth=depth, heads=heads, mlp=mlp or 4 * width)


IMAGE = {
    # ViT's B, L, H (Dosovitskiy et al. 2021, arXiv:2010.11929, table 1); S (Touvron et al. 2021, arXiv:2012.12877).
    "S/32": image(32, 384, 12, 6),
    "S/16": image(16, 384, 12, 6),
    "B/32": image(32, 768, 12, 12),
    "B/16": image(16, 768, 12, 12),
    "L/16": image(16, 1024, 24, 16),
    "L/14": image(14, 1024, 24, 16),
    "H/14": image(14, 1280, 32, 16),
    # Zhai et al. 2022 (arXiv:2106.04560), table 2.
    "g/14": image(14, 1408, 40, 16, 6144),
    "G/14": image(14, 1664, 48, 16, 8192),
    # Shape-optimised (Alabdulmohsin et al. 2023, arXiv:2305.13035, table 1).
    "So400m/14": image(14, 1152, 27, 16, 4304),
}

# ConvNeXt (Liu et al. 2022, arXiv:2201.03545, §3): blocks and channels of each stage.
CONVNEXT = {
    "T": dict(depths=(3, 3, 9, 3), widths=(96, 192, 384, 768)),
    "S": dict(depths=(3, 3, 27, 3), widths=(96, 192, 384, 768)),
    "B": dict(depths=(3, 3, 27, 3), widths=(128, 256, 512, 1024)),
    "L": dict(depths=(3, 3, 27, 3), widths=(192, 384, 768, 1536)),
    "XL": dict(depths=(3, 3, 27, 3), widths=(256, 512, 1024, 2048)),
}

# CLIP's ResNets (Radford et al. 2021, arXiv:2103.00020, table 19); `out` is the joint space.
RESNET = {
    "RN50": dict(depths=(3, 4, 6, 3), width=64, heads=32, out=1024),
    "RN101": dict(depths=(3, 4, 23, 3), width=64, heads=32, out=512),
    "RN50x4": dict(depths=(4, 6, 10, 6), width=80, heads=40, out=640),
    "RN50x16": dict(depths=(6, 8, 18, 8), width=96, heads=48, out=768),
    "RN50x64": dict(depths=(3, 15, 36, 10), width=128, heads=64, out=1024),
}
RESNET_PX = {"RN50": 224, "RN101": 224, "RN50x4": 288, "RN50x16": 384, "RN50x64": 448}

TEXT = {
    # FLIP (Li et al. 2022, arXiv:2212.00794, §3 and table 10).
    "flip": {
        "B/16": text(512, 12, 8),
        "L/16": text(768, 12, 12),
        "L/14": text(768, 12, 12),
        "H/14": text(1024, 24, 16),
    },
    # CLIP (Radford et al. 2021, arXiv:2103.00020, table 20) and, beyond L/14, OpenCLIP's model configs.
    "clip": {
        "S/32": text(384, 12, 6),
        "S/16": text(384, 12, 6),
        "B/32": text(512, 12, 8),
        "B/16": text(512, 12, 8),
        "L/16": text(768, 12, 12),
        "L/14": text(768, 12, 12),
        "H/14": text(1024, 24, 16),
        "g/14": text(1024, 24, 16),
        "G/14": text(1280, 32, 20),
        "RN50": text(512, 12, 8),
        "RN101": text(512, 12, 8),
        "RN50x4": text(640, 12, 10),
        "RN50x16": text(768, 12, 12),
        "RN50x64": text(1024, 12, 16),
    },
    # SigLIP (Zhai et al. 2023, arXiv:2303.15343): the text tower has the image tower's shape.
    "siglip": {
        "B/16": text(768, 12, 12),
        "L/16": text(1024, 24, 16),
        "So400m/14": text(1152, 27, 16, 4304),
    },
}
# CLIPA (Li et al. 2023, arXiv:2305.07017) has OpenCLIP's text towers.
TEXT["clipa"] = {size: TEXT["clip"][size] for size in ("B/16", "L/16", "L/14", "H/14", "G/14")}

COMPUTE = dict(dtype="bfloat16", remat="dots_no_batch")
# CLIP's and OpenCLIP's: PyTorch's epsilon of LayerNorm; mean and deviation of OpenAI's pixels (its `clip.load`).
NORM = dict(eps=1e-5)
PIXELS = dict(mean=(0.48145466, 0.4578275, 0.40821073), std=(0.26862954, 0.26130258, 0.27577711))
CLIP_VOCAB = 49_410  # CLIP's 49,408 and, as `vlp data tokenizer` numbers them, a pad and an unknown


def clip(size: str) -> dict[str, Any]:
    """CLIP's and OpenCLIP's: CLS and a norm before the blocks; causal text, read at its end.

    CLIP has QuickGELU; OpenCLIP's own models (those it adds to CLIP's sizes among them) have the exact GELU.
    RN50 … RN50x64: its modified ResNets, whose attention pooling is the projection too.
    """
    lower = pick("clip", size)
    if size in RESNET:
        compute = dict(COMPUTE, remat="none")
        tower = dict(activation="quick_gelu", **lower, **NORM, **COMPUTE)
        tower |= dict(vocab=CLIP_VOCAB, pool="eos")
        return dict(
            name="two_tower",
            image_tower=dict(name="resnet", **RESNET[size], **PIXELS, **compute),
            text_tower=tower,
            embed=RESNET[size]["out"],
            project_image=False,
        )
    activation = "quick_gelu" if size in ("B/32", "B/16", "L/14") else "gelu_exact"
    shared = dict(activation=activation, **NORM, **COMPUTE)
    front = dict(pool="cls", cls_pos=True, pre_norm=True, patch_bias=False)
    return dict(
        name="two_tower",
        image_tower=dict(**front, **IMAGE[size], **PIXELS, **shared),
        text_tower=dict(vocab=CLIP_VOCAB, pool="eos", **lower, **shared),
        embed=lower["width"],
    )


def open_clip_coca(size: str) -> dict[str, Any]:
    """OpenCLIP's CoCa (coca_ViT-B-32, coca_ViT-L-14), which is not the paper's.

    One pooler of 256 queries, the first of them contrastive; a norm of the image's tokens in each cross-attention and
    two MLPs a layer; a mask of the text's CLS that is one position late.
    """
    section = clip(size)
    shared = dict(activation="gelu_exact")
    section["image_tower"].update(pool="none", cls=True, **shared)
    section["text_tower"].update(pool="cls", cls_pos=True, cls_mask="shifted", **shared)
    heads = {"B/32": 8, "L/14": 8}[size]
    return section | dict(
        decoder=dict(depth=12, norm_image=True, mlp_self=True),
        poolers=dict(queries=255, heads=heads, cascade=False, shared=True),
    )


def flip(size: str) -> dict[str, Any]:
    """FLIP's: fixed positions, the mean of all image tokens with the CLS; text that sees both ways, at its first token.

    FLIP's text tower has no mask: a pad is a word (attend_padding). Joint space: the text tower's width.
    """
    lower = pick("flip", size)
    return dict(
        name="two_tower",
        image_tower=dict(pool="mean", cls=True, pos="sincos", **IMAGE[size], **COMPUTE),
        text_tower=dict(
            vocab=30_523, pool="first", causal=False, attend_padding=True, **lower, **COMPUTE
        ),
        embed=lower["width"],
    )


def clipa(size: str) -> dict[str, Any]:
    """CLIPA's: fixed positions, the norm of the patches' mean; text that sees both ways, at its last position.

    The blocks see a CLS, which the mean leaves out. Its vocabulary is 32,000 (BERT's 30,522 words, rounded up).
    """
    lower = pick("clipa", size)
    front = dict(pool="mean_patches", cls=True, pool_first=True, patch_bias=False)
    return dict(
        name="two_tower",
        image_tower=dict(pos="sincos_big_vision", **front, **IMAGE[size], **COMPUTE),
        text_tower=dict(
            vocab=32_000, pool="last", causal=False, attend_padding=True, **lower, **COMPUTE
        ),
        embed=lower["width"],
    )


def siglip(size: str) -> dict[str, Any]:
    """SigLIP's: attention pooling and no projection of the image; text that sees both ways, at its last position.

    logit scale starts at 10, bias at -10 (§3.2), and both are learned. Vocabulary 32,000.
    """
    lower = pick("siglip", size)
    return dict(
        name="two_tower",
        image_tower=dict(pool="map", **IMAGE[size], **COMPUTE),
        text_tower=dict(
            vocab=32_000, pool="last", causal=False, attend_padding=True, **lower, **COMPUTE
        ),
        embed=lower["width"],
        scale=10.0,
        bias=-10.0,
        project_image=False,
        text_bias=True,
    )


def pick(paper: str, size: str) -> dict[str, int]:
    """The paper's text tower for a size; a KeyError would not say which sizes there are."""
    if size not in TEXT[paper]:
        raise check.unknown("config argument size", size, TEXT[paper])
    return TEXT[paper][size]
