"""SigLIP (Zhai et al. 2023, arXiv:2303.15343): B/16, L/16 or So400m/14, the sigmoid loss with a learned bias.

Arguments: size, path, keep_ratio (below 1: FLIP's masking), smoke. Of the paper: batch 32,768, 40 B examples, β2
0.95, 64 text tokens, logit scale 10 and bias −10 at the start. Of its successor, which states them (Tschannen et al.
2025, arXiv:2502.14786, §2): lr 1e-3, decoupled weight decay 1e-4, gradient norm 1, 20,000 warm-up steps, cosine.
Their code (big_vision) adds the decay after the rate: 1e-4 is the share of a kernel that a step takes at the full
rate, which `weight_decay` says in units of lr: 1e-4 / 1e-3 = 0.1. As there, kernels alone decay and the temperature
is not bounded.
"""

import ml_collections

from vlp.core.config import parse_arg

from . import towers
from .common import pretraining, smoke


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    arg = parse_arg(arg, size="B/16", path="data/pairs", keep_ratio=1.0, smoke=False)
    c = pretraining(f"siglip_{arg.size}", towers.siglip(arg.size), arg.path)
    c.batch = 32_768
    c.objective = dict(name="siglip", keep_ratio=arg.keep_ratio)
    c.data.update(image_px=224, text_len=64, eval_crop="squash")
    c.data.update(bos=False, fill="eos", clean="siglip")  # pieces, eos to the end
    c.optim = dict(b1=0.9, b2=0.95, weight_decay=0.1, clip_norm=1.0)
    c.optim["rules"] = [dict(match=".*/kernel"), dict(match=".*", decay=0.0)]
    c.schedule = dict(lr=1e-3, warmup_steps=20_000)
    c.samples = 40_000_000_000
    return smoke(c) if arg.smoke else c
