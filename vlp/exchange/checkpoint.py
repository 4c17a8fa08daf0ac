"""A model between libraries (`Exchanged`), written as a workdir of ours and read from one."""

from __future__ import annotations

import base64
import dataclasses
import os
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from vlp import __version__
from vlp.ckpt.manager import Checkpoints
from vlp.core import check, paths, tree
from vlp.core.config import build, build_named, plain
from vlp.data.config import Data
from vlp.data.tokenizer import Tokenizer
from vlp.infer import golden
from vlp.infer.average import check_out
from vlp.infer.load import load, stage_config
from vlp.models import MODELS, TOWERS
from vlp.runtime import workdir as files


@dataclasses.dataclass(frozen=True)
class Exchanged:
    """A model as we write it down: sections of a config, tokenizer, and leaves by name.

    model: `config.model`. objective: the name of what it was trained with. data: the fields of `config.data` that its
    preprocessing needs. tokenizer: None: unknown. leaves: its parameters. system, source: where it comes from.
    """

    model: Mapping[str, Any]
    objective: str
    data: Mapping[str, Any]
    tokenizer: Tokenizer | None
    leaves: Mapping[str, np.ndarray]
    system: str = ""
    source: str = ""

    def build(self) -> Any:
        """The flax module."""
        return build_named(MODELS, dict(self.model), "config.model", more=TOWERS)


def _all_of(model: Any, image: jax.Array, text: jax.Array) -> None:
    """Asks a model for all that it answers."""
    seen, read = model.image(image), model.text(text)
    if "feats" in seen:
        model.decode(read["tokens"], seen["feats"])
    if model.embed:
        model.scale_bias()


def shapes(model: Any, image_px: int, text_len: int) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes of a model's parameters by name; nothing is computed."""
    import flax.linen as nn

    image = jnp.zeros((1, image_px, image_px, 3), jnp.uint8)
    text = jnp.zeros((1, text_len), jnp.int32)
    made = jax.eval_shape(lambda: model.init(jax.random.key(0), image, text, method=_all_of))
    return tree.named(nn.unbox(made)["params"])


def check_shapes(exchanged: Exchanged) -> None:
    """Raises UserError unless the leaves are those of the model: names and shapes."""
    data = exchanged.data
    if not exchanged.model.get(
        "embed"
    ):  # an image tower alone, whose text tower is yet to be trained
        return
    want = shapes(exchanged.build(), data["image_px"], data["text_len"])
    found = {n: x.shape for n, x in exchanged.leaves.items()}
    for name in sorted(want.keys() | found.keys()):
        shape = want[name].shape if name in want else "no such leaf"
        if found.get(name) != shape:
            got = f"{name} of shape {found.get(name, 'none')}"
            do = "give the config that belongs to these weights"
            raise check.error(exchanged.source, got, f"{shape}", do)


def write(exchanged: Exchanged, out: paths.Path) -> None:
    """Writes a workdir with one checkpoint, that `vlp eval`, `vlp caption`, `load` and `config.init` take.

    Raises:
        UserError: `out` holds files, or the model has no tokenizer.
    """
    check_out(out)
    if exchanged.tokenizer is None:
        do = "give its file with --tokenizer"
        raise check.error(exchanged.source, "no tokenizer", "the one of these weights", do)
    check_shapes(exchanged)
    tokenizer = exchanged.tokenizer
    file = out / "tokenizer.model"
    files.write_bytes(file, tokenizer.to_bytes())
    built = build(Data, dict(exchanged.data), "preprocessing")
    data = plain(built)
    config = {
        "name": f"imported from {exchanged.system}",
        "model": dict(exchanged.model),
        "objective": {"name": exchanged.objective},
        "data": data | {"tokenizer": str(file)},
        "evals": {},
    }
    meta = {
        "position": {"step": 0, "stage": 0, "stage_step": 0, "samples": 0},
        "config": config,
        "stage": 0,
        "tokenizer": base64.b64encode(tokenizer.to_bytes()).decode(),
        "tokenizer_sha256": tokenizer.sha256,
        "preprocessing": data,
        "versions": {"vlp": __version__},
        "cwd": os.getcwd(),
        "fingerprints": {},
        "imported": {"from": exchanged.system, "source": exchanged.source},
    }
    nested: Any = traverse_util.unflatten_dict(dict(exchanged.leaves), sep="/")
    if exchanged.model.get("embed"):
        params = {"student": nested}
        meta["golden"] = golden.describe(exchanged.build(), params, built, tokenizer, None)
    checkpoints = Checkpoints(out / "checkpoints")
    checkpoints.save(0, nested, {"step": np.int32(0)}, meta)
    checkpoints.close()


def read(workdir: str | os.PathLike, step: int | None = None) -> Exchanged:
    """Reads a checkpoint of ours: the parameters that its run evaluates."""
    loaded = load(workdir, step)
    section = stage_config(loaded.meta["config"], loaded.meta["stage"])
    leaves = {name: np.asarray(x) for name, x in tree.named(loaded.apply.params).items()}
    model, objective = dict(section["model"]), section.get("objective", {}).get("name", "")
    data = plain(loaded.data)
    return Exchanged(model, objective, data, loaded.tokenizer, leaves, "vlp", str(workdir))
