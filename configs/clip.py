"""CLIP (Radford et al. 2021, arXiv:2103.00020): ViT-B/32, B/16 or L/14 with the paper's text tower, table 19–20.

Arguments: size, path, keep (below 1: FLIP's masking), smoke. Batch 32,768, 32 epochs of 400 M pairs, AdamW β2 0.98,
weight decay 0.2, lr 5e-4 (B/32, B/16) or 4e-4 (L/14), 2,000 warm-up steps, cosine. The vocabulary is your tokenizer's
(the paper: 49,408); its towers have QuickGELU and a norm before the blocks, which this config leaves out.
"""

import ml_collections
from common import smoke

from vlp.core.config import parse_arg

SIZES = {  # patch, width, depth, heads; text width, heads; embed; lr
    "B/32": (32, 768, 12, 12, 512, 8, 512, 5e-4),
    "B/16": (16, 768, 12, 12, 512, 8, 512, 5e-4),
    "L/14": (14, 1024, 24, 16, 768, 12, 768, 4e-4),
}


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    arg = parse_arg(arg, size="B/32", path="data/pairs", keep=1.0, smoke=False)
    patch, width, depth, heads, text_width, text_heads, embed, lr = SIZES[arg.size]
    c = ml_collections.ConfigDict()
    c.name = f"clip_{arg.size.replace('/', '')}"
    c.batch = 32_768
    compute = dict(dtype="bfloat16", remat="dots_no_batch")
    c.model = dict(
        name="dual",
        image_tower=dict(patch=patch, width=width, depth=depth, heads=heads, pool="cls", **compute),
        text_tower=dict(
            vocab=49_408, width=text_width, depth=12, heads=text_heads, pool="eos", **compute
        ),
        embed=embed,
    )
    c.objective = dict(name="clip", keep=arg.keep)
    c.data = dict(path=arg.path, image_px=224, text_len=77, captions="uniform", workers=8)
    c.optim = dict(b1=0.9, b2=0.98, weight_decay=0.2)
    c.schedule = dict(lr=lr, warmup_steps=2_000)
    c.samples = 12_800_000_000
    c.evals = dict(retrieval=dict(split="val", every_steps=10_000, batch=1024))
    c.log_every_steps, c.save_every_steps = 100, 2_000
    return smoke(c) if arg.smoke else c
