"""ALBEF on emoji and their names: the demo's towers and data, two blocks that fuse, in minutes on a laptop CPU.

    vlp train --config configs/albef_emoji.py --workdir runs/albef_emoji

Arguments: path (the data), seed, smoke. Not of the paper: the sizes, a queue of four batches, and an average that
follows 300 steps (decay 0.98; the paper's 0.995 is for a run of a million).
"""

import ml_collections

from vlp.core.config import parse_arg

from .coca_emoji import get_config as demo
from .common import smoke


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    arg = parse_arg(arg, path="data/emoji", seed=0, smoke=False)
    c = demo("clip")
    c.name, c.seed, c.data.path = "albef_emoji", arg.seed, arg.path
    c.model.image_tower.pool = "cls"
    # one more id than the demo's tokenizer has: the mask
    c.model.text_tower.update(pool="first", causal=False, vocab=c.model.text_tower.vocab + 1)
    del c.model["decoder"], c.model["poolers"]
    c.objective = dict(name="albef", queue=512, fusion_depth=2)
    c.teachers = dict(ema=dict(decay=0.98))
    del c["stages"]
    c.steps = 300
    if arg.smoke:
        c = smoke(c)
        c.model.text_tower.vocab += 1  # the mask's id
        c.objective.update(queue=16, fusion_depth=1)
    return c
