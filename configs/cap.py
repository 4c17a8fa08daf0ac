"""Captioning alone on CoCa's base towers, as the LCap-only row of its table 8a: batch 4,096, no contrastive parts.

The decoder has the 12 layers of the paper's ablations, 6 of them with cross-attention.
"""

import ml_collections

from vlp.core.config import parse_arg

from . import coca
from .common import smoke


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    arg = parse_arg(arg, path="data/pairs", keep_ratio=1.0, smoke=False)
    c = coca.get_config(f"size=base,path={arg.path}")
    c.name = "cap_base"
    c.batch = 4_096
    c.model.embed = 0  # no joint space
    c.model.text_tower.depth = c.model.decoder.depth = 6
    c.model.text_tower.pool = "none"  # no embedding, so no CLS
    c.objective = dict(name="cap", keep_ratio=arg.keep_ratio)
    del c.evals["retrieval"]
    return smoke(c) if arg.smoke else c
