"""MaMMUT (Kuo et al. 2023, arXiv:2303.16839) at the sizes of ViT: one text decoder run twice.

Arguments: size (B/16, L/14, H/14), path, keep_ratio (below 1: FLIP's masking), focal (γ of the contrastive loss),
smoke. The decoder is the text tower of CLIP's size, with cross-attention in every block. What the paper fixes beyond
the method (learning rate, weights, length) could not be checked: batch, optimiser and schedule are CLIP's as in
OpenCLIP's large runs (AdamW 0.9/0.95, decay 0.2, clip 1), and are yours to choose.
"""

import ml_collections

from vlp.core.config import parse_arg

from . import towers
from .common import pretraining, smoke


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    arg = parse_arg(arg, size="B/16", path="data/pairs", keep_ratio=1.0, focal=0.0, smoke=False)
    text = towers.pick("clip", arg.size)
    model = dict(
        name="two_tower",
        image_tower=dict(pool="mean", **towers.IMAGE[arg.size], **towers.COMPUTE),
        text_tower=dict(vocab=49_408, pool="norm_mean", causal=False, **text, **towers.COMPUTE),
        embed=text["width"],
        decoder=dict(),  # the text tower again
    )
    c = pretraining(f"mammut_{arg.size}", model, arg.path)
    c.batch = 16_384
    c.objective = dict(name="mammut", keep_ratio=arg.keep_ratio, focal=arg.focal)
    c.data.update(image_px=224, text_len=77)
    c.optim = dict(b1=0.9, b2=0.95, weight_decay=0.2, clip_norm=1.0)
    c.schedule = dict(lr=1e-3, warmup_steps=2_000)
    c.samples = 12_800_000_000
    c.evals.captions = dict(split="val", every_steps=10_000, batch=1024)
    return smoke(c) if arg.smoke else c
