"""Parameters of a model without an objective: of all that it answers."""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from vlp.core import tree
from vlp.core.types import Ctx, Out, Term
from vlp.train import state as states


@dataclasses.dataclass(frozen=True)
class Everything:
    """An objective without a loss that asks a model all that it answers. heads: name and input width of each."""

    reads: ClassVar[frozenset[str]] = frozenset({"image", "text"})
    heads: tuple[tuple[str, int], ...] = ()

    def __call__(self, ctx: Ctx) -> Out:
        image = ctx.student("image", ctx.batch["image"])
        text = ctx.student("text", ctx.batch["text"])
        if "feats" in image:
            ctx.student("decode", text["tokens"], image["feats"])
        if "embed" in image and hasattr(ctx.apply.model, "scale_bias"):
            ctx.student("scale_bias")
        for name, width in self.heads:
            ctx.head(name, jnp.zeros((ctx.batch["text"].shape[0], width)))
        return Out({"nothing": Term(jnp.float32(0), 1)})


def shapes(batch: Any) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes of a batch of arrays."""
    return {k: jax.ShapeDtypeStruct(x.shape, x.dtype) for k, x in batch.items()}


def pairs(image_px: int, text_len: int, num: int = 1) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes of a batch of pairs."""
    return {
        "image": jax.ShapeDtypeStruct((num, image_px, image_px, 3), np.uint8),
        "text": jax.ShapeDtypeStruct((num, text_len), np.int32),
        "index": jax.ShapeDtypeStruct((num, 2), np.uint32),
    }


def abstract(
    model: Any, image_px: int, text_len: int, heads: tuple[tuple[str, int], ...] = ()
) -> Any:
    """Shapes of the model's parameters with the names of their axes."""
    return states.abstract_params(model, Everything(heads), pairs(image_px, text_len))


def random_like(abstract: Any, seed: int = 0) -> Any:
    """Parameters of these shapes, drawn by NumPy, none of them zero.

    Costs no compilation, which `init` does; biases and norms are not at their special starting points.
    """
    rng = np.random.default_rng(seed)

    def one(name: str, leaf: Any) -> Any:
        noise = rng.normal(size=leaf.shape).astype(np.float32)
        if name.endswith("/scale"):
            return 1 + 0.1 * noise
        if name.endswith(("/stat_share", "/stat_var")):
            return np.abs(0.5 * noise * name.endswith("var")) + 1
        return 0.25 * noise if leaf.ndim else np.float32(2.0)

    return tree.map_named(one, abstract)
