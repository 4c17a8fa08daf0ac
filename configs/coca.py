"""CoCa as in the paper (Yu et al. 2022, arXiv:2205.01917, table 1, §4.1): size=base, large or giant.

    vlp plan  --config configs/coca.py:size=base
    vlp train --config configs/coca.py:size=large,path=gs://… --workdir …

Where this differs from the paper: gradients clipped to norm 1 (the default; the paper says so of fine-tuning alone),
and the data is yours.
The text length of pretraining is not in the paper; 64 tokens + CLS here.
"""

import ml_collections

from vlp.core import check
from vlp.core.config import parse_arg

from .common import smoke

SIZES = {  # image depth, MLP; unimodal and multimodal depth, MLP; width; heads; tied embeddings
    "base": (12, 3072, 12, 12, 3072, 768, 12, False),
    "large": (24, 4096, 12, 12, 4096, 1024, 16, False),
    "giant": (40, 6144, 18, 18, 5632, 1408, 16, True),  # 1.1 B for the decoder only counts up tied
}


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    arg = parse_arg(arg, size="base", path="data/pairs", keep_ratio=1.0, smoke=False)
    if arg.size not in SIZES:
        raise check.unknown("config argument size", arg.size, SIZES)
    depth, mlp, lower, upper, text_mlp, width, heads, tied = SIZES[arg.size]
    c = ml_collections.ConfigDict()
    c.name = f"coca_{arg.size}"
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
    c.mesh = dict(data=-1, fsdp=dict(base=1, large=16, giant=128)[arg.size])
    c.evals = dict(
        retrieval=dict(split="val", every_steps=10_000, batch=1024),
        captions=dict(split="val", every_steps=10_000, batch=1024),
    )
    c.log_every_steps, c.save_every_steps = 100, 2_000
    return smoke(c) if arg.smoke else c
