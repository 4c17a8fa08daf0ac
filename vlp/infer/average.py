"""Averages the parameters of several models of the same shapes, and writes the mean as a checkpoint."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import numpy as np

from vlp.ckpt.manager import Checkpoints
from vlp.core import check, paths, tree
from vlp.infer import golden
from vlp.infer.load import Loaded

PyTree = Any


def mean(trees: Sequence[PyTree], weights: Sequence[float]) -> PyTree:
    """Returns Σ weight · leaf, summed in float64, in the types of the first tree.

    Weights (0.5, 0.5) for a model before and after fine-tuning give the midpoint of WiSE-FT (Wortsman et al. 2022,
    arXiv:2109.01903, eq. 1); equal weights for several fine-tuned models give a uniform soup (arXiv:2203.05482).

    Raises:
        UserError: the models differ in the names or shapes of their parameters.
    """
    first, *others = (tree.named(t) for t in trees)
    for k, other in enumerate(others, 2):
        shape = lambda leaves, name: leaves[name].shape if name in leaves else "none"
        for name in sorted(first.keys() | other.keys()):
            a, b = shape(first, name), shape(other, name)
            if a != b:
                do = "average runs of the same model and image size"
                raise check.error(f"model {k}: {name}", f"shape {b}", f"the first's {a}", do)

    def one(name: str, leaf: Any) -> np.ndarray:
        leaves = [leaf, *(other[name] for other in others)]
        total = sum(w * np.asarray(x, np.float64) for w, x in zip(weights, leaves, strict=True))
        return np.asarray(total).astype(leaf.dtype)

    return tree.map_named(one, trees[0])


def check_out(out: paths.Path) -> None:
    """Raises UserError unless `out` can become a new workdir. Call it before models are loaded."""
    if paths.exists(out) and (not paths.is_dir(out) or paths.listing(out)):
        raise check.error(
            f"--out {out}", "something that exists", "a new directory", "give --out another path"
        )
    if not paths.is_remote(out):
        check.output_dir("--out", out)


def write(out: paths.Path, models: Sequence[Loaded], weights: Sequence[float]) -> None:
    """Writes the mean as the checkpoint of a new workdir, with the config, tokenizer and data of the first model.

    Averages the parameters that each run evaluates (its `eval_params`). The checkpoint has no optimiser state: a run
    can start from it (`init`), but not continue it.

    Args:
        out: a directory that does not exist yet, or is empty.
        models: the runs.
        weights: one number per model.

    Raises:
        UserError: `out` holds files, or the models differ in the names or shapes of their parameters.
    """
    check_out(out)
    params = mean([model.apply.params for model in models], weights)
    meta = copy.deepcopy(dict(models[0].meta))
    for section in (meta["config"], *meta["config"].get("stages", [])):
        section.pop("eval_params", None)
    first = models[0]
    meta["golden"] = golden.describe(
        first.apply.model, {"student": params}, first.data, first.tokenizer, None
    )
    meta.pop("scores", None)  # of the first model
    checkpoints = Checkpoints(out / "checkpoints")
    checkpoints.save(models[0].step, params, {"step": np.int32(models[0].step)}, meta)
    checkpoints.close()
