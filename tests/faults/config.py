"""The run that run.py kills: a tiny model with a moving average, data as slow as a busy disk, and a slow evaluation.

PACE_MS in the environment: milliseconds that a step's data and a tenth of an evaluation take. No number of the run
depends on it.
"""

from __future__ import annotations

import dataclasses
import os
import time
from typing import ClassVar

import flax.linen as nn
import jax.numpy as jnp
import numpy as np

from vlp.core.mesh import logical
from vlp.core.types import Out, Result, Term

BATCH = 8
PACE_SECS = float(os.environ.get("PACE_MS", "0")) / 1000


class Pair(nn.Module):
    """Mean colour and bag of words, both embedded."""

    embed: int = 4

    def setup(self):
        init = lambda *names: logical(nn.initializers.normal(0.5), *names)
        self.colour = self.param("colour", init("pixels", "embed"), (3, self.embed))
        self.words = self.param("words", init("vocab", "embed"), (128, self.embed))

    def image(self, image, *, keep_ratio=1.0, keys=None):
        return {"embed": image.astype(jnp.float32).mean(axis=(1, 2)) / 255 @ self.colour}

    def text(self, text, *, keys=None):
        return {"embed": self.words[text].mean(axis=1)}


@dataclasses.dataclass(frozen=True)
class Distance:
    """Squared distance of a pair's embeddings."""

    reads: ClassVar = frozenset({"image", "text", "pace"})

    def __call__(self, ctx):
        zi_BE, zt_BE = ctx.map(self.encode)
        return Out({"distance": Term(((zi_BE - zt_BE) ** 2).sum(), zi_BE.shape[0])})

    def encode(self, ctx):
        image = ctx.student("image", ctx.batch["image"])
        return image["embed"], ctx.student("text", ctx.batch["text"])["embed"]


@dataclasses.dataclass(frozen=True)
class Pace:
    """A leaf that takes its time."""

    def spec(self, data, batch):
        return {"pace": ((batch,), np.uint8)}

    def fill(self, record, draws, row):
        time.sleep(PACE_SECS / BATCH)
        row["pace"][...] = 0


@dataclasses.dataclass(frozen=True)
class Norm:
    """The norm of the embeddings of one batch."""

    split: str = "test"
    batch: int = BATCH
    every_steps: int = 0

    def asks(self, apply, image, text):
        return apply("image", image)["embed"]

    def __call__(self, apply, mesh, io):
        dataset = io.open(self.split)
        zi_BE = apply("image", jnp.asarray(dataset.eval_batch(0, self.batch)["image"]))["embed"]
        time.sleep(10 * PACE_SECS)
        yield Result("norm", float(jnp.linalg.norm(zi_BE)), io.provenance(dataset))


MODELS = {"pair": Pair}
OBJECTIVES = {"distance": Distance}
LEAVES = {"pace": Pace}
EVALS = {"norm": Norm}


def get_config(arg=None):
    return {
        "name": "faults", "batch": BATCH, "steps": int(arg or 60),
        "model": {"name": "pair"},
        "objective": {"name": "distance"},
        "data": {
            "source": "shapes", "num_records": 21, "image_px": 16, "text_len": 8,
            "captions": "uniform", "read_threads": 1, "prefetch": 1,
        },
        "schedule": {"lr": 1e-2, "shape": "constant"},
        "teachers": {"ema": {"decay": 0.9}},
        "evals": {"norm": {"every_steps": 7}},
        "log_every_steps": 1, "save_every_steps": 10, "keep_checkpoints": 2,
    }  # fmt: skip
