"""CLIPA (Li et al. 2023, arXiv:2305.07017, v2: 2306.15658): small images and short texts, then a little at full size.

Arguments: size (L/14, H/14, G/14; B/16 and L/16 of v1), image_px and text_len of the first stage, shorten (how texts
are cut to text_len: truncate, random, block, syntax), high (True: a third stage at 336 px), path, smoke.

Of the paper and its released configs (v2): 12.8 B samples at 84 px and 8 tokens, batch 65,536, lr 8e-6 per 256
examples, 3,200 warm-up steps ("smaller collapses"), crops of 40-100 % of the area, colour jitter 0.4; then 4 × 131 M at
224 px and 32 tokens, batch 32,768, 30 % of the patches dropped, lr 4e-7 per 256, 26.2 M of warm-up; 131 M at 336 px,
batch 16,384, 40 % dropped, lr 1e-7 per 256. AdamW β 0.9/0.95, decay 0.2, cosine to 0 in each stage.

Where this differs: a longer text table keeps its first rows and starts the others fresh.
"""

import ml_collections

from vlp.core.config import parse_arg

from . import towers
from .common import pretraining, smoke

UNIT = 131_072_000  # samples


def stage(name: str, samples: int, batch: int, lr: float, keep_ratio: float, **data: int) -> dict:
    """A stage at full text; lr is per 256 examples."""
    schedule = dict(lr=lr * batch / 256, warmup_samples=26_214_400)
    data = dict(text_len=32, shorten="truncate", jitter=0.0, **data)
    return dict(name=name, samples=samples, batch=batch, objective=dict(keep_ratio=keep_ratio),
                schedule=schedule, data=data)  # fmt: skip


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    arg = parse_arg(
        arg, size="H/14", image_px=84, text_len=8, shorten="truncate", high=False,
        path="data/pairs", smoke=False,
    )  # fmt: skip
    c = pretraining(f"clipa_{arg.size}", towers.clipa(arg.size), arg.path)
    c.batch = 65_536
    c.objective = dict(name="clip", keep_ratio=1.0)
    c.data.update(image_px=arg.image_px, text_len=arg.text_len, shorten=arg.shorten)
    c.data.update(min_area_frac=0.4, jitter=0.4)
    c.optim = dict(b1=0.9, b2=0.95, weight_decay=0.2, clip_norm=None, mu_dtype="bfloat16")
    c.schedule = dict(lr=8e-6 * c.batch / 256, warmup_samples=3_200 * c.batch)
    c.stages = [
        dict(name="short", samples=12_800_000_000),
        stage("full", 4 * UNIT, 32_768, 4e-7, keep_ratio=0.7, image_px=224),
    ]
    if arg.high:
        c.stages = [*c.stages, stage("high", UNIT, 16_384, 1e-7, keep_ratio=0.6, image_px=336)]
    return smoke(c) if arg.smoke else c
