"""LiT (Zhai et al. 2022, arXiv:2111.07991): a text tower learns to read a locked, pre-trained image tower.

    vlp train --config configs/lit.py:init=runs/clip_B16 --workdir …

Arguments: init (the workdir of another run, whose image tower is taken), size (B/16 or L/16 with CLIP's image tower;
the text tower has its width), path, smoke. `init_match` leaves the other run's text tower where it is.

Of the paper (§3, §4): the image tower is locked, not tuned at a low rate, and has no projection of its own; the text
tower starts fresh and reads BERT-like, both ways, at its first token; 16 text tokens; 224 px. Its optimiser is
Adafactor with lr 1e-3, decay 1e-4, first moments in bfloat16, gradients clipped to norm 1, 10,000 warm-up steps and a
cosine to 0, at batch 16,384 over 900 M pairs for its ablations: these numbers are from memory. Its decay is, in its
code (big_vision), the share that a step takes at the full rate; `weight_decay` is in units of lr: 1e-4 / 1e-3 = 0.1.
"""

import dataclasses

import ml_collections

from vlp.core.config import parse_arg
from vlp.optim.make import DEFAULT_RULES

from . import towers
from .common import pretraining, smoke


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    arg = parse_arg(arg, init="", size="B/16", path="data/pairs", smoke=False)
    model = towers.clip(arg.size)
    width, heads = model["image_tower"]["width"], model["image_tower"]["heads"]
    text = towers.text(width, 12, heads)
    model["text_tower"].update(vocab=32_000, activation="gelu", pool="first", causal=False, **text)
    c = pretraining(f"lit_{arg.size}", model | dict(embed=width, project_image=False), arg.path)
    c.init, c.init_match = arg.init, "image_tower/.*"
    c.batch = 16_384
    c.objective = dict(name="clip")
    c.data.update(image_px=224, text_len=16)
    locked = dict(match="image_tower/.*", freeze=True)
    rules = [locked, *map(dataclasses.asdict, DEFAULT_RULES)]
    c.optim = dict(name="adafactor", weight_decay=0.1, mu_dtype="bfloat16", rules=rules)
    c.schedule = dict(lr=1e-3, warmup_steps=10_000)
    c.samples = 900_000_000
    if arg.smoke and not arg.init:
        c.init_match = (
            ".*"  # the locked tower is a random one: good for nothing but to see that it runs
        )
    return smoke(c) if arg.smoke else c
