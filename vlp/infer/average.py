"""One model out of several with the same shapes: the weighted mean of their parameters, as a checkpoint to load."""

from __future__ import annotations

import copy
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from vlp.ckpt.manager import Checkpoints
from vlp.core import check, tree
from vlp.infer.load import Loaded

PyTree = Any


def mean(trees: Sequence[PyTree], weights: Sequence[float]) -> PyTree:
    """Σ weight · leaf, summed in float64 and kept in the first tree's types.

    Weights (0.5, 0.5) of a model before and after fine-tuning are WiSE-FT's middle (Wortsman et al. 2022,
    arXiv:2109.01903, eq. 1); equal weights of several fine-tuned ones a uniform soup (arXiv:2203.05482).
    Raises: UserError if the models differ in names or shapes of parameters.
    """
    first, *others = (tree.named(t) for t in trees)
    for k, other in enumerate(others, 2):
        shape = lambda leaves, name: leaves[name].shape if name in leaves else "none"
        for name in sorted(first.keys() | other.keys()):
            a, b = shape(first, name), shape(other, name)
            if a != b:
                do = "average runs of one model and one image size"
                raise check.error(f"model {k}: {name}", f"shape {b}", f"the first's {a}", do)

    def one(name: str, leaf: Any) -> np.ndarray:
        leaves = [leaf, *(other[name] for other in others)]
        total = sum(w * np.asarray(x, np.float64) for w, x in zip(weights, leaves, strict=True))
        return np.asarray(total).astype(leaf.dtype)

    return tree.map_named(one, trees[0])


def write(out: pathlib.Path, models: Sequence[Loaded], weights: Sequence[float]) -> None:
    """Writes the mean as the checkpoint of a new workdir, with the first model's config, tokenizer and data.

    What can be averaged of a run is what it evaluates (`eval_params`); there is no optimiser to go on from.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise check.error(f"--out {out}", "something that exists", "a new directory", "choose one")
    params = mean([model.apply.params for model in models], weights)
    meta = copy.deepcopy(dict(models[0].meta))
    for section in (meta["config"], *meta["config"].get("stages", [])):
        section.pop("eval_params", None)
    checkpoints = Checkpoints(out / "checkpoints")
    checkpoints.save(models[0].step, params, {"step": np.int32(models[0].step)}, meta)
    checkpoints.close()
