"""A trained model, ready to use, from a run's workdir: parameters, config, tokenizer and preprocessing together."""

from __future__ import annotations

import base64
import dataclasses
import functools
import os
from collections.abc import Mapping
from typing import Any

from vlp.ckpt.manager import Checkpoints, select
from vlp.core import check, paths, plugins
from vlp.core.config import build, build_named, overlay
from vlp.core.plugins import Plugin
from vlp.core.types import Apply
from vlp.data.config import Data
from vlp.data.tokenizer import Tokenizer
from vlp.infer import golden as golden_pair
from vlp.models import MODELS, TOWERS
from vlp.models.heads import HEADS
from vlp.models.heads import build as build_heads


@dataclasses.dataclass(frozen=True)
class Loaded:
    """A trained model with its tokenizer and preprocessing.

    apply: calls the model, apply("image", x) for instance, with the parameters that the run evaluates (`eval_params`).
    data: how images and texts were prepared in training; relative paths are resolved as there (see `located`).
    """

    apply: Apply
    tokenizer: Tokenizer
    data: Data
    step: int
    meta: Mapping[str, Any]


def load(
    workdir: str | os.PathLike,
    step: int | None = None,
    eval_params: str | None = None,
    golden: bool = True,
) -> Loaded:
    """Loads a checkpoint on any machine; needs neither the optimiser, nor the objective, nor the data.

    Args:
        workdir: of the run.
        step: of the checkpoint; None: the newest whole one.
        eval_params: "student" or the name of an averaging teacher, instead of the run's own choice.
        golden: compute the golden pair of the checkpoint again (`infer.golden`).

    Raises:
        UserError: the workdir holds no such checkpoint, the plugin that defines the model is missing, or the golden
            pair gives other numbers than in training.
    """
    where = paths.parse("workdir", workdir)
    checkpoints = Checkpoints(where / "checkpoints", create=False)
    step = select(checkpoints, workdir, step)
    loaded = _load(os.fspath(where), step, eval_params)
    if golden:
        _verify(os.fspath(where), step, eval_params)
    return loaded


@functools.lru_cache(maxsize=4)
def _verify(workdir: str, step: int, eval_params: str | None) -> None:
    """Raises the UserError of a golden pair; once per checkpoint."""
    loaded = _load(workdir, step, eval_params)
    section = stage_config(loaded.meta["config"], loaded.meta["stage"])
    which = eval_params or section.get("eval_params", "student")
    golden_pair.verify(
        f"{workdir}, step {step}", loaded.meta.get("golden", {}), loaded.apply, loaded.data,
        loaded.tokenizer, which,
    )  # fmt: skip


@functools.lru_cache(maxsize=4)
def _load(workdir: str, step: int, eval_params: str | None) -> Loaded:
    checkpoints = Checkpoints(paths.of(workdir) / "checkpoints", create=False)
    meta = checkpoints.meta(step)
    section = stage_config(meta["config"], meta["stage"])
    named = section["model"].get("name", "")
    parts = [v.get("name", "vit") for v in section["model"].values() if isinstance(v, Mapping)]
    added = plugins_of(section)
    models = plugins.extended("MODELS", MODELS, added, [named])
    towers = plugins.extended("TOWERS", TOWERS, added, parts)
    model = build_named(models, section["model"], "config.model", more=towers)
    if declared := meta.get("heads"):
        names = [spec.get("name", "") for spec in declared.values()]
        table = plugins.extended("HEADS", HEADS, added, names)
        model = model.clone(heads=build_heads(declared, "the checkpoint's heads", table))
    tokenizer = Tokenizer.from_bytes(base64.b64decode(meta["tokenizer"]))
    data = located(build(Data, meta["preprocessing"], "preprocessing"), meta.get("cwd", ""))
    which = eval_params or section.get("eval_params", "student")
    averages = [k for k, t in section.get("teachers", {}).items() if t.get("decay") is not None]
    if which not in ("student", *averages):
        raise check.unknown("config.eval_params", str(which), ("student", *averages))
    params = checkpoints.params(step, teacher="" if which == "student" else which)
    return Loaded(Apply(model, params), tokenizer, data, step, meta)


def plugins_of(section: Mapping[str, Any]) -> tuple[Plugin, ...]:
    """Returns the plugins that a config names."""
    return tuple(Plugin(**entry) for entry in plugins.resolve(section.get("plugins", [])))


def located(data: Data, cwd: str) -> Data:
    """Returns `data` with relative paths resolved against `cwd`, as far as the files are still there."""

    one = functools.partial(paths.found_from, cwd)
    parts = tuple(dataclasses.replace(p, path=one(p.path), skip=one(p.skip)) for p in data.mixture)
    named = {name: one(getattr(data, name)) for name in ("path", "tokenizer", "skip")}
    return dataclasses.replace(data, mixture=parts, **named)


def stage_config(config: Mapping[str, Any], index: int) -> dict[str, Any]:
    """Returns the config of one stage: the base with the stage's overlay."""
    stages = config.get("stages") or [{}]
    return overlay({k: v for k, v in config.items() if k != "stages"}, stages[index])
