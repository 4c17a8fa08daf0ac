"""LiT (Zhai et al. 2022, arXiv:2111.07991): a text tower learns to read a locked, pre-trained image tower.

    vlp train --config configs/lit.py:init=runs/clip_B16 --workdir …

Arguments: init (the workdir of another run, whose image tower is taken: any model with this image tower), size (the
image tower and, as BERT has, the text tower of the same width: B/16, L/16), path, smoke. What `init` has under the same
names is carried; its text tower too, if it has the same shapes.

Of the paper (§4, appendix): batch 16,384, lr 1e-3, decay 1e-4, β2 0.999, 10,000 warm-up steps, cosine to 0, gradients
clipped to norm 1, 16 text tokens, 224 px without augmentation but crops; 900 M pairs seen ("short"); the image is locked,
not tuned at a low rate (§5.2), and has no projection of its own. Where this differs: AdamW, not Adafactor.
"""

import dataclasses

import ml_collections
import towers
from common import pretraining, smoke

from vlp.core.config import parse_arg
from vlp.optim.make import DEFAULT_RULES


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    arg = parse_arg(arg, init="", size="B/16", path="data/pairs", smoke=False)
    model = towers.clip(arg.size)
    width, heads = model["image_tower"]["width"], model["image_tower"]["heads"]
    text = towers.text(width, 12, heads)
    model["text_tower"].update(vocab=32_000, pool="first", causal=False, **text)
    c = pretraining(f"lit_{arg.size}", model | dict(embed=width, project_image=False), arg.path)
    c.init = arg.init
    c.batch = 16_384
    c.objective = dict(name="clip")
    c.data.update(image_px=224, text_len=16)
    locked = dict(match="image_tower/.*", freeze=True)
    rules = [locked, *map(dataclasses.asdict, DEFAULT_RULES)]
    c.optim = dict(b1=0.9, b2=0.999, weight_decay=1e-4, clip_norm=1.0, rules=rules)
    c.schedule = dict(lr=1e-3, warmup_steps=10_000)
    c.samples = 900_000_000
    return smoke(c) if arg.smoke else c
