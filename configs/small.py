"""A model of your own data (100 to 100,000 pairs): the config is computed from the output of `vlp data convert`.

    vlp data convert photos.csv --out data/mine
    vlp train --config configs/small.py:path=data/mine --workdir runs/mine

Arguments:
    path: the dataset.
    model: coca, or clip (no captions, less time).
    size: tiny (minutes on a laptop), S/16 or B/16 (for a GPU).
    epochs, batch, px: 0 computes them as below.
    tokenizer: a file; "" uses the dataset's own.
    seed, smoke: as in every config.

Computed values, which are rules of thumb and not from a paper:
    vocab: size of the tokenizer.
    text_len: 95th percentile of the captions' lengths.
    image_px: median of the images' shorter sides, at most the image side of `size`.
    batch: grows with the number of pairs, since the other pairs of a batch are the negatives.
    epochs: 20,000 samples, but at least 10 and at most 100 epochs.
    warm-up, logging, saving, evaluations: fractions of the run's length.
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

NUM_SAMPLES = 20_000  # wanted length of the run, if MIN_EPOCHS and MAX_EPOCHS allow it
MIN_EPOCHS, MAX_EPOCHS = 10, 100
NUM_INSPECTED = 256  # records read to measure caption lengths and image sizes
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
            raise check.error(
                f"config argument {name}", arg[name], "0 or more", "use 0 to compute it"
            )
    stats = {"num": 1000, "evals": "val", "num_evals": 100, "vocab": 500, "px": 64, "text_len": 16}
    stats = stats if arg.smoke else dataset_stats(arg.path, arg.tokenizer)
    image, text_depth, depth, px, lr = SIZES[arg.size]
    num, patch = stats["num"], image["patch"]
    batch = arg.batch or power_of_two(min(num / 4, max(64, 2 * math.sqrt(num))))
    epochs = arg.epochs or min(max(round(NUM_SAMPLES / num), MIN_EPOCHS), MAX_EPOCHS)
    steps = -(-epochs * num // batch)

    c = ml_collections.ConfigDict()
    c.name, c.seed, c.batch, c.samples = "small", arg.seed, batch, epochs * num
    # XLA's CPU backend runs a scanned stack at a quarter of the speed of an unrolled one.
    compute = dict(scan=False) if arg.size == "tiny" else towers.COMPUTE
    width, heads = image["width"], image["heads"]
    text = dict(vocab=stats["vocab"], depth=text_depth, width=width, heads=heads)
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
        captions="uniform",  # draws one of an image's captions for each sample
        image_px=arg.px or max(32, min(px, stats["px"]) // patch * patch),
        text_len=stats["text_len"],
        min_area_frac=0.5,
        bad_records="replace",  # broken images are replaced, counted and listed
    )
    c.optim = dict(b2=0.98, weight_decay=0.2)
    c.schedule = dict(lr=lr, warmup_frac=0.1)
    quarter = -(-steps // 4)
    if stats["evals"]:
        eval_batch = max(8, min(64, power_of_two(2 * stats["num_evals"])))
        common = dict(split=stats["evals"], batch=eval_batch)
        c.evals = dict(retrieval=dict(every_steps=quarter, **common))
        if arg.model == "coca":
            c.evals.captions = dict(common)
    c.log_every_steps, c.save_every_steps = min(max(steps // 50, 1), 100), quarter
    return smoke(c) if arg.smoke else c


def dataset_stats(path: str, tokenizer: str) -> dict[str, Any]:
    """Returns the numbers of a dataset that the config depends on.

    Args:
        path: output of `vlp data convert`.
        tokenizer: a file; "" uses the dataset's own.

    Returns:
        `num`: training records. `evals`: name of the evaluation split ("" without one). `num_evals`: its records.
        `vocab`: size of the tokenizer. `px`: median of the images' shorter sides. `text_len`: 95th percentile of the
        captions' lengths in tokens, rounded up to a multiple of 4.

    Raises:
        UserError: the path is not a dataset, has no tokenizer, or has no captions or no readable images.
    """
    try:
        splits = records.read_manifest(path)["splits"]
    except check.UserError:
        taken = not path or os.path.isfile(path) or os.path.isdir(path) and os.listdir(path)
        do = f"make one: vlp data convert photos.csv --out {'data/mine' if taken else path}"
        expected = "a directory that vlp data convert wrote"
        raise check.error("config argument path", repr(path), expected, do) from None
    source = records.open_split(path, "train", hashed=False)
    try:
        words = tokenizers.load(tokenizer) if tokenizer else source.tokenizer()
    except check.UserError:
        where = f"{tokenizer!r}" if tokenizer else f"none in {path}"
        do = "convert without --tokenizer '', or make one with `vlp data tokenizer`"
        raise check.error("tokenizer of the data", where, "a tokenizer", do) from None
    lengths, sides = [], []
    for i in np.linspace(0, len(source) - 1, min(NUM_INSPECTED, len(source))).astype(int).tolist():
        record = source[i]
        lengths += [np.count_nonzero(words.encode(c["text"], 64)) for c in record["captions"]]
        try:
            sides.append(min(pictures.Picture(record["image"]).size))
        except pictures.BadImage:
            pass  # training replaces and counts them
    if not lengths or not sides:
        what = "captions" if not lengths else "images"
        do = (
            "datasets with only labels are for evaluation, not for training"
            if not lengths
            else f"list the broken ones: vlp data verify {path}"
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
    """Returns the largest power of two that is at most x, but at least 2."""
    return 2 ** max(1, int(math.log2(max(x, 1))))
