"""The demo: CoCa with FLIP masking on emoji and their names; minutes on a laptop CPU.

`make demo` runs it. Arguments: smoke (seconds), path (the data), clip (the same towers, contrastive only).
"""

import ml_collections

from vlp.core.config import parse_arg

NUM_TRAIN = 3_300  # about; an epoch


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    arg = parse_arg(
        arg,
        smoke=False,
        clip=False,
        path="data/emoji",
        seed=0,
        steps=600,
        batch=256,
        width=128,
        depth=4,
        lr=1e-3,
        keep=0.5,
        tune=60,
        dropout=0.0,
        vocab=1500,
    )
    tower = dict(width=arg.width, depth=arg.depth, heads=arg.width // 32, dropout=arg.dropout)
    c = ml_collections.ConfigDict()
    c.name, c.seed = "coca_emoji", arg.seed
    c.batch = arg.batch
    c.model = dict(
        name="captioner",
        image_tower=dict(patch=8, pos="learned", **tower),
        text_tower=dict(vocab=arg.vocab, **tower),
        multimodal=dict(depth=2),
        embed=128,
        queries=16,
    )
    c.objective = dict(name="clip" if arg.clip else "coca", keep=arg.keep)
    if arg.clip:
        c.model.multimodal.depth = 1
    c.data = dict(
        path=arg.path,
        image_px=64,
        text_len=16,
        captions="uniform",
        min_area_frac=0.5,
        cache_decoded=True,
    )
    c.optim = dict(weight_decay=0.2, b2=0.98)
    c.schedule = dict(lr=arg.lr, warmup_frac=0.1)
    c.stages = [
        dict(name="masked", steps=arg.steps),
        dict(
            name="unmasked", steps=arg.tune, objective=dict(keep=1.0), schedule=dict(lr=arg.lr / 10)
        ),
    ]
    c.evals = dict(
        retrieval=dict(split="val", every_steps=200),
        retrieval_test=dict(name="retrieval", split="test"),
        captions=dict(split="test"),
    )
    if arg.clip:
        del c.evals["captions"]
    c.log_every_steps, c.save_every_steps = 20, 200
    if arg.smoke:
        c.batch = 8
        tiny = dict(width=32, depth=1, heads=2)
        c.model.image_tower.update(tiny)
        c.model.text_tower.update(tiny)
        for s in c.stages:
            s.steps = 1
    return c
