"""ALBEF (Li et al. 2021, arXiv:2107.07651, §3.2, §3.4): ViT-B/16, six text blocks, six that fuse.

    vlp train --config configs/albef.py:path=data/pairs --workdir …

Arguments: path, smoke. Of the paper and its released code: images of 256 px, batch 512, 30 epochs of 14 M pairs,
AdamW with weight decay 0.02, lr 1e-4 after 2,000 warm-up steps, cosine to 1e-5; temperature 0.07; a moving average of
0.995; queues of 65,536; soft targets of weight 0.4, reached in the first epoch; 15 % of the words masked; crops of at
least 20 % of the area, flips, RandAugment. Not of the paper: see docs/methods.md.
"""

import math

import ml_collections
import towers
from common import pretraining, smoke

from vlp.core.config import parse_arg

WORDS = 30_522  # of BERT's vocabulary; the id behind the tokenizer's is the mask


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    arg = parse_arg(arg, path="data/pairs", smoke=False)
    compute = dict(towers.COMPUTE, dropout=0.1)
    text = towers.text(768, 6, 12)
    model = dict(
        name="two_tower",
        image_tower=dict(**towers.IMAGE["B/16"], **towers.COMPUTE, pool="cls"),
        text_tower=dict(vocab=WORDS + 1, pool="first", causal=False, **text, **compute),
        embed=256,
        scale=1 / 0.07,
    )
    c = pretraining("albef", model, arg.path)
    c.batch, c.samples = 512, 30 * 14_000_000
    c.objective = dict(name="albef")
    c.teachers = dict(ema=dict(decay=0.995))
    c.data.update(image_px=256, text_len=32, min_area_frac=0.2, flip=True)
    c.data.update(randaugment=2, randaugment_magnitude=7.0)
    c.optim = dict(b2=0.999, weight_decay=0.02, clip_norm=None)
    scale = dict(match=".*logit_scale", decay=0.0, clamp=(math.log(2.0), math.log(1000.0)))
    c.optim["rules"] = [scale, dict(match=".*bias|.*norm.*/scale", decay=0.0), dict(match=".*")]
    c.schedule = dict(lr=1e-4, warmup_steps=2_000, end_frac=0.1)
    if arg.smoke:
        c = smoke(c)
        c.model.text_tower.vocab += 1  # the mask's id
        c.objective.update(queue=16, fusion_depth=1)
    return c
