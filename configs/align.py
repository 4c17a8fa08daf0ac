"""ALIGN (Jia et al. 2021, arXiv:2102.05918) with transformers on both sides.

Arguments: path, keep_ratio, smoke. Of the paper (§4.2, §5.1): batch 16,384, 1.2 M steps, lr 1e-3, 10,000 warm-up
steps, then linear decay to 0, weight decay 1e-5, a learned temperature that starts at 1, images of 289 px cut from
346, at most 64 tokens, BERT-Large's text tower (24 × 1024) read at its first token.

Where this differs: the image tower is ViT-H/14 (631 M parameters) at 280 px, not EfficientNet-L2 (480 M) at 289;
AdamW, not LAMB; no label smoothing (0.1 in the paper); the vocabulary is your tokenizer's (100 k WordPieces in the
paper); gradients are clipped to norm 1 and the logit scale to [1, 100] (the defaults), of which the paper says nothing.
The joint space has the text tower's width, as there.
"""

import ml_collections

from vlp.core.config import parse_arg

from . import towers
from .common import pretraining, smoke


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    arg = parse_arg(arg, path="data/pairs", keep_ratio=1.0, smoke=False)
    bert = dict(vocab=100_000, pool="first", causal=False, **towers.text(1024, 24, 16))
    model = dict(
        name="two_tower",
        image_tower=dict(pool="mean", **towers.IMAGE["H/14"], **towers.COMPUTE),
        text_tower=dict(**bert, **towers.COMPUTE),
        embed=1024,
        scale=1.0,
    )
    c = pretraining("align", model, arg.path)
    c.batch = 16_384
    c.objective = dict(name="clip", keep_ratio=arg.keep_ratio)
    c.data.update(image_px=280, text_len=64, min_area_frac=(289 / 346) ** 2, flip=True)
    c.optim = dict(weight_decay=1e-5)
    c.schedule = dict(lr=1e-3, shape="linear", warmup_steps=10_000)
    c.steps = 1_200_000
    return smoke(c) if arg.smoke else c
