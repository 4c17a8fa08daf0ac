"""Your own data, 100 to 100,000 pairs: every length is computed from the dataset that `vlp data convert` made.

    vlp data convert photos.csv --out data/mine
    vlp train --config configs/small.py:path=data/mine --workdir runs/mine

Arguments: path; model (coca, or clip: no captions, less time); size (tiny: minutes on a laptop; S/16 and B/16 for a
GPU); epochs, batch, px (0: computed here); tokenizer (a file; "": the dataset's own); seed; smoke.

Computed: the vocabulary; text_len, which holds 19 captions of 20; image_px, the images' own up to the size's; batch,
which grows with the data, since other pairs of a batch are the negatives; epochs, 10 or what makes 20,000 samples;
warm-up, logging, saving and evaluations, as shares of the run. The numbers are rules of thumb, not a paper's.
"""

import math
import os
from typing import Any

import ml_collections
import numpy as np

from vlp.core import check
from vlp.core.config import parse_arg
from vlp.data import pictures, records
from vlp.data import tokenizer as tokenizers

from . import towers
from .common import smoke

SAMPLES, EPOCHS = 20_000, (10, 100)  # samples at least, within these numbers of epochs
LOOKED_AT = 256  # records that tell of the lengths of captions and the sizes of images
SIZES = {  # image tower; text depth, decoder depth; image side in pixels, learning rate
    "tiny": (towers.image(8, 128, 4, 4), 2, 2, 64, 1e-3),
    "S/16": (towers.IMAGE["S/16"], 6, 6, 224, 5e-4),
    "B/16": (towers.IMAGE["B/16"], 6, 6, 224, 3e-4),
}
MODELS = ("coca", "clip")


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    arg = parse_arg(
        arg,
        path="data/mine",
        model="coca",
        size="tiny",
        epochs=0,
        batch=0,
        px=0,
        tokenizer="",
        seed=0,
        smoke=False,
    )
    for name, known in (("size", SIZES), ("model", MODELS)):
        if arg[name] not in known:
            raise check.unknown(f"config argument {name}", arg[name], known)
    for name in ("epochs", "batch", "px"):
        if arg[name] < 0:
            raise check.error(f"config argument {name}", arg[name], "0 or more", "correct it")
    found = {"num": 1000, "evals": "val", "num_evals": 100, "vocab": 500, "px": 64, "text_len": 16}
    found = found if arg.smoke else look(arg.path, arg.tokenizer)
    image, text_depth, depth, px, lr = SIZES[arg.size]
    num, patch = found["num"], image["patch"]
    batch = arg.batch or power_of_two(min(num / 4, max(64, 2 * math.sqrt(num))))
    least, most = EPOCHS
    epochs = arg.epochs or min(max(round(SAMPLES / num), least), most)
    steps = -(-epochs * num // batch)

    c = ml_collections.ConfigDict()
    c.name, c.seed, c.batch, c.samples = "small", arg.seed, batch, epochs * num
    # XLA's CPU backend runs a scanned stack at a quarter of the speed of an unrolled one.
    compute = dict(scan=False) if arg.size == "tiny" else towers.COMPUTE
    width, heads = image["width"], image["heads"]
    text = dict(vocab=found["vocab"], depth=text_depth, width=width, heads=heads)
    c.model = dict(
        name="two_tower",
        image_tower=dict(**image, **compute),
        text_tower=dict(**text, **compute),
        embed=width,
    )
    c.objective = dict(name=arg.model)
    if arg.model == "clip":
        c.model.image_tower.pool, c.model.text_tower.pool = "mean", "eos"
    else:
        c.model.decoder = dict(depth=depth)
        c.model.poolers = dict(queries=16)
        c.objective.caption_weight = 1.0
    c.data = dict(
        path=arg.path,
        tokenizer=arg.tokenizer,
        captions="uniform",  # one of an image's captions, drawn anew each time
        image_px=arg.px or max(32, min(px, found["px"]) // patch * patch),
        text_len=found["text_len"],
        min_area_frac=0.5,
        bad_records="replace",  # a broken photograph is no reason to stop; they are counted and listed
    )
    c.optim = dict(b2=0.98, weight_decay=0.2)
    c.schedule = dict(lr=lr, warmup_frac=0.1)
    often = -(-steps // 4)
    if found["evals"]:
        of = dict(split=found["evals"], batch=max(8, min(64, power_of_two(2 * found["num_evals"]))))
        c.evals = dict(retrieval=dict(every_steps=often, **of))
        if arg.model == "coca":
            c.evals.captions = dict(of)
    c.log_every_steps, c.save_every_steps = min(max(steps // 50, 1), 100), often
    return smoke(c) if arg.smoke else c


def look(path: str, tokenizer: str) -> dict[str, Any]:
    """What the config needs to know of a dataset. Raises: `UserError` that says how to make one."""
    try:
        splits = records.read_manifest(path)["splits"]
    except check.UserError:
        new = not path or os.path.isfile(path) or os.path.isdir(path) and os.listdir(path)
        do = f"make one: vlp data convert photos.csv --out {'data/mine' if new else path}"
        expected = "a directory that vlp data convert wrote"
        raise check.error("config argument path", repr(path), expected, do) from None
    source = records.open_split(path, "train", hashed=False)
    try:
        words = tokenizers.load(tokenizer) if tokenizer else source.tokenizer()
    except check.UserError:
        where = f"{tokenizer!r}" if tokenizer else f"none in {path}"
        do = "convert without --tokenizer '', or make one by `vlp data tokenizer`"
        raise check.error("tokenizer of the data", where, "a tokenizer", do) from None
    lengths, sides = [], []
    for i in np.linspace(0, len(source) - 1, min(LOOKED_AT, len(source))).astype(int).tolist():
        record = source[i]
        lengths += [np.count_nonzero(words.encode(c["text"], 64)) for c in record["captions"]]
        try:
            sides.append(min(pictures.Picture(record["image"]).size))
        except pictures.BadImage:
            pass  # training counts them
    if not lengths or not sides:
        what = "captions" if not lengths else "images"
        do = (
            "labels alone can be evaluated, not trained on"
            if not lengths
            else "see vlp data verify"
        )
        raise check.error(f"data {path}", f"records without {what}", what, do)
    evals = next((s for s in ("val", "validation", "test") if s in splits), "")
    return {
        "num": len(source),
        "evals": evals,
        "num_evals": splits[evals]["num_records"] if evals else 0,
        "vocab": words.vocab_size,
        "px": int(np.median(sides)),
        "text_len": max(8, int(-(-np.quantile(lengths, 0.95) // 4)) * 4),
    }


def power_of_two(x: float) -> int:
    """The largest one up to x, 2 at least."""
    return 2 ** max(1, int(math.log2(max(x, 1))))
