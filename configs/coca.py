"""CoCa as in the paper (Yu et al. 2022, arXiv:2205.01917, table 1, §4.1): size=base, large or giant.

size=open_clip_B/32 or open_clip_L/14 is OpenCLIP's model (`towers.open_clip_coca`), its losses (the mean of both
directions; captions × 2) and its pictures and texts, trained as the paper's.

    vlp plan  --config configs/coca.py:size=base
    vlp train --config configs/coca.py:size=large,path=gs://… --workdir …

Differences from the paper: gradients are clipped to norm 1 (the default; in the paper only for fine-tuning); the data.
The paper does not state the text length of pretraining; here 64 tokens + CLS.
"""

import ml_collections

from vlp.core import check
from vlp.core.config import parse_arg

from . import towers
from .common import smoke

OPEN_CLIP = {"open_clip_B/32": "B/32", "open_clip_L/14": "L/14"}
SIZES = {  # image depth, MLP; unimodal and multimodal depth, MLP; width; heads; tied embeddings
    "base": (12, 3072, 12, 12, 3072, 768, 12, False),
    "large": (24, 4096, 12, 12, 4096, 1024, 16, False),
    "giant": (40, 6144, 18, 18, 5632, 1408, 16, True),  # 1.1 B for the decoder only counts up tied
}


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    arg = parse_arg(arg, size="base", path="data/pairs", keep_ratio=1.0, smoke=False)
    if arg.size not in (*SIZES, *OPEN_CLIP):
        raise check.unknown("config argument size", arg.size, (*SIZES, *OPEN_CLIP))
    ours = OPEN_CLIP.get(arg.size)
    depth, mlp, lower, upper, text_mlp, width, heads, tied = SIZES["base" if ours else arg.size]
    c = ml_collections.ConfigDict()
    c.name = f"coca_{arg.size}".replace("/", "").lower()
    c.batch = 65_536
    # What fits the pods of docs/plans.md; the width of giant, 11 × 128, is not divided by 256.
    compute = dict(dtype="bfloat16", remat="full" if arg.size == "giant" else "dots_no_batch")
    c.model = dict(
        name="two_tower",
        image_tower=dict(patch=18, width=width, depth=depth, heads=heads, mlp=mlp, **compute),
        text_tower=dict(
            vocab=64_000, width=width, depth=lower, heads=heads, mlp=text_mlp, **compute
        ),
        embed=width,
        decoder=dict(depth=upper, tied=tied),
        poolers=dict(queries=256, cascade=True),
    )
    c.objective = dict(
        name="coca", contrastive_weight=1.0, caption_weight=2.0, keep_ratio=arg.keep_ratio
    )
    c.data = dict(path=arg.path, image_px=288, text_len=64, captions="uniform", workers=8)
    c.optim = dict(name="adafactor", b1=0.9, b2=0.999, weight_decay=0.01)
    c.schedule = dict(lr=8e-4, shape="linear", warmup_frac=0.02)
    c.steps = 500_000
    c.mesh = dict(data=-1, fsdp=dict(large=16, giant=128).get(arg.size, 1))
    c.evals = dict(
        retrieval=dict(split="val", every_steps=10_000, batch=1024),
        captions=dict(split="val", every_steps=10_000, batch=1024),
    )
    if ours:
        c.model = towers.open_clip_coca(ours)
        c.objective.contrastive_weight = 0.5
        c.data.update(
            image_px=224, text_len=76, clean="lower", crop="torchvision", min_area_frac=0.9
        )
        c.data.update(max_aspect=4 / 3, eval_crop="torchvision")
    c.log_every_steps, c.save_every_steps = 100, 2_000
    return smoke(c) if arg.smoke else c
