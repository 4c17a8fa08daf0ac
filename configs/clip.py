"""CLIP (Radford et al. 2021, arXiv:2103.00020, tables 18-20): ViT-B/32, B/16 or L/14, or RN50 … RN50x64.

Arguments: size (and S/32 … G/14: OpenCLIP's), path, keep_ratio (below 1: FLIP's masking), smoke. Of the paper: batch
32,768, 32 epochs of 400 M pairs, AdamW β2 0.98, ε 1e-6, weight decay 0.2, lr 5e-4 (B/32, B/16) or 4e-4 (L/14), 2,000
warm-up steps, cosine, only random square crops. Not from the paper: gradients are clipped to norm 1 (the default), and
the vocabulary is your tokenizer's (49,410 at most: CLIP's 49,408, a pad and an unknown). Larger sizes take L/14's rate.
"""

import ml_collections

from vlp.core.config import parse_arg

from . import towers
from .common import pretraining, smoke

LR = dict.fromkeys(("RN50", "RN101", "RN50x4", "S/32", "S/16", "B/32", "B/16"), 5e-4)
LR["RN50x64"] = 3.6e-4


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    arg = parse_arg(arg, size="B/32", path="data/pairs", keep_ratio=1.0, smoke=False)
    c = pretraining(f"clip_{arg.size}", towers.clip(arg.size), arg.path)
    c.batch = 32_768
    c.objective = dict(name="clip", keep_ratio=arg.keep_ratio)
    c.data.update(image_px=towers.RESNET_PX.get(arg.size, 224), text_len=77)
    c.optim = dict(b1=0.9, b2=0.98, eps=1e-6, weight_decay=0.2)
    c.schedule = dict(lr=LR.get(arg.size, 4e-4), warmup_steps=2_000)
    c.samples = 12_800_000_000
    return smoke(c) if arg.smoke else c
