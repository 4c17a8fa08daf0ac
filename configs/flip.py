"""FLIP (Li et al. 2022, arXiv:2212.00794): CLIP on a random part of the patches, then a little on whole images.

Arguments: size (B/16, L/16, L/14, H/14), keep_ratio (0.5: the paper's 50 % masking, 0.25: 75 %, 1: its CLIP
baseline), tune (False: no unmasked stage), path, smoke.

Of the paper (§3, §4.1, appendix; released code): AdamW β 0.9/0.95, decay 0.2 (not on biases, norms, CLS, positions),
base lr 4e-6 per 256 examples, warm-up of 51.2 M samples (H/14: 200 × 1.28 M), cosine to 0, batch 65,536, 10,000
ImageNet epochs of samples (32 of LAION-400M), crops of 50-100 % of the area and flips, 32 tokens; tuning 4e-8 per 256
over 128 M samples with 25.6 M of warm-up. No gradient clipping. Its WordPiece vocabulary has 30,523 entries; here it is
your tokenizer's. Weights are kept in float32 and computed with in bfloat16; the paper computes in float32.
"""

import ml_collections

from vlp.core.config import parse_arg

from . import towers
from .common import pretraining, smoke

EPOCH = 1_281_167  # FLIP counts in ImageNet's


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    arg = parse_arg(arg, size="L/16", keep_ratio=0.5, tune=True, path="data/pairs", smoke=False)
    c = pretraining(
        f"flip_{arg.size}_keep{round(100 * arg.keep_ratio)}", towers.flip(arg.size), arg.path
    )
    c.batch = 65_536
    c.objective = dict(name="clip", keep_ratio=arg.keep_ratio)
    c.data.update(image_px=224, text_len=32, min_area_frac=0.5, flip=True)
    c.optim = dict(b1=0.9, b2=0.95, weight_decay=0.2, clip_norm=None)
    warmup = (200 if arg.size == "H/14" else 40) * 1_280_000
    c.schedule = dict(lr=4e-6 * c.batch / 256, warmup_samples=warmup)
    c.stages = [dict(name="masked", samples=10_000 * EPOCH)]
    if arg.tune:
        schedule = dict(lr=4e-8 * c.batch / 256, warmup_samples=25_600_000)
        whole = dict(name="unmasked", samples=128_000_000, objective=dict(keep_ratio=1.0))
        c.stages = [*c.stages, whole | dict(schedule=schedule)]
    return smoke(c) if arg.smoke else c
