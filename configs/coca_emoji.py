"""The demo: CoCa with FLIP masking on emoji and their names, in minutes on a laptop CPU.

`make demo` runs it. The first stage drops half of the patches, the second tunes on whole images (FLIP §3). An epoch
visits each emoji once, in one of its forms (group_by), so that the skin tones of one gesture rarely are negatives of
each other and do not crowd out the rest.

Arguments: path (the data), clip (the same towers and steps, contrastive loss alone), optim (adamw,
adafactor or lion), seed, smoke.
"""

import ml_collections

from vlp.core import check
from vlp.core.config import parse_arg

from .common import smoke


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    arg = parse_arg(arg, path="data/emoji", clip=False, seed=0, optim="adamw", smoke=False)
    c = ml_collections.ConfigDict()
    c.name, c.seed = "coca_emoji", arg.seed
    c.batch = 128
    # XLA's CPU backend runs a scanned stack at a quarter of the speed of an unrolled one.
    tower = dict(width=128, heads=4, scan=False)
    c.model = dict(
        name="two_tower",
        image_tower=dict(patch=8, depth=4, **tower),
        text_tower=dict(vocab=1500, depth=2, **tower),
        embed=128,
        decoder=dict(depth=2),
        poolers=dict(queries=16),
    )
    c.objective = dict(name="clip", keep_ratio=0.5)
    if not arg.clip:
        # the paper's weight, 2, costs 3 points of R@10 here; 0.5 costs none beside `clip`
        c.objective = dict(name="coca", caption_weight=0.5, keep_ratio=0.5)
    c.data = dict(
        path=arg.path,
        image_px=64,
        text_len=16,
        captions="uniform",  # the Unicode name or one of its aliases
        langs=("en",),  # the records have names in 14 languages
        group_by="base",
        min_area_frac=0.5,
        cache_decoded=True,
    )
    # Lion: a tenth of the rate, ten times the decay. R@10 after 150 steps: Adafactor 19 %, Lion 18 % (chance 5 %).
    optims = {
        "adamw": (dict(b2=0.98, weight_decay=0.2), 2e-3),
        "adafactor": (dict(name="adafactor", weight_decay=0.2), 2e-3),
        "lion": (dict(name="lion", weight_decay=2.0), 2e-4),
    }
    if arg.optim not in optims:
        raise check.unknown("config argument optim", arg.optim, optims)
    c.optim, lr = optims[arg.optim]
    c.schedule = dict(lr=lr, warmup_frac=0.1)
    c.stages = [
        dict(name="masked", steps=560),
        dict(name="unmasked", steps=40, objective=dict(keep_ratio=1.0), schedule=dict(lr=0.1 * lr)),
    ]
    c.evals = dict(
        retrieval=dict(split="test", batch=200),
        validation=dict(name="retrieval", split="val", batch=200, every_steps=140, gallery=0),
    )
    c.evals.skin_tone = dict(
        name="zeroshot",
        label="tone",
        classes=("none", "light", "medium-light", "medium", "medium-dark", "dark"),
        phrases=(
            "",
            *(f"{t} skin tone" for t in ("light", "medium-light", "medium", "medium-dark", "dark")),
        ),
        templates=("person {}", "woman {}", "man {}", "hand {}", "child {}", "woman {} walking"),
        split="test_variants",
        extra_splits=("test",),
        batch=200,
    )
    if arg.clip:
        c.name = "clip_emoji"
    else:
        c.evals.captions = dict(split="test", batch=200)
    c.log_every_steps, c.save_every_steps = 10, 140
    return smoke(c) if arg.smoke else c
