"""A trained model, ready to use, from a run's workdir: parameters, config, tokenizer and preprocessing together."""

from __future__ import annotations

import base64
import dataclasses
import functools
import pathlib
from collections.abc import Mapping
from typing import Any

from vlp.ckpt.manager import Checkpoints, select
from vlp.core.config import build, build_named, overlay
from vlp.core.types import Apply
from vlp.data.loader import Data
from vlp.data.tokenizer import Tokenizer
from vlp.models import MODELS


@dataclasses.dataclass(frozen=True)
class Loaded:
    """apply("image", x) and so on, with the parameters that the run evaluates (its `eval_params`); data: how images
    and texts were prepared in training."""

    apply: Apply
    tokenizer: Tokenizer
    data: Data
    step: int
    meta: Mapping[str, Any]


def load(workdir: str | pathlib.Path, step: int | None = None) -> Loaded:
    """Loads a checkpoint (the newest by default) on any machine, with no optimiser and no data.

    Raises UserError if the workdir holds no such checkpoint.
    """
    checkpoints = Checkpoints(pathlib.Path(workdir) / "checkpoints", create=False)
    step = select(checkpoints, workdir, step)
    return _load(str(pathlib.Path(workdir).absolute()), step)


@functools.lru_cache(maxsize=4)
def _load(workdir: str, step: int) -> Loaded:
    checkpoints = Checkpoints(pathlib.Path(workdir) / "checkpoints", create=False)
    meta = checkpoints.meta(step)
    section = stage_config(meta["config"], meta["stage"])
    model = build_named(MODELS, section["model"], "config.model")
    tokenizer = Tokenizer.from_bytes(base64.b64decode(meta["tokenizer"]))
    data = build(Data, meta["preprocessing"], "preprocessing")
    which = section.get("eval_params", "student")
    params = checkpoints.params(step, teacher="" if which == "student" else which)
    return Loaded(Apply(model, params), tokenizer, data, step, meta)


def stage_config(config: Mapping[str, Any], index: int) -> dict[str, Any]:
    """The config of one stage: the base with the stage's overlay."""
    stages = config.get("stages") or [{}]
    return overlay({k: v for k, v in config.items() if k != "stages"}, stages[index])
