"""What a model can be asked: its methods, and what `image` and `text` return."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Set
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from vlp.core import check


def check_needs(
    model: Any, needs: Set[str], image_px: int, text_len: int, where: str, do: str
) -> None:
    """Raises UserError unless the model gives all of `needs`: "decode", "image.embed", "text.tokens" …"""
    missing = sorted(needs - answers(model, image_px, text_len))
    if missing:
        got = f"a {type(model).__name__} without {', '.join(missing)}"
        raise check.error(where, got, "a model that gives it", do)


DTYPES = ("float32", "bfloat16", "float16", "float64")
_SIZES = {  # the largest of each: what is beyond would only fill the memory, or take hours to trace
    "depth": 2**10, "heads": 2**12, "patch": 2**12, "vocab": 2**24, "width": 2**17,
}  # fmt: skip
_COUNTS = {"embed": 2**17, "mlp": 2**19, "queries": 2**16, "registers": 2**12}  # may be 0


def check_fields(module: Any, where: str) -> None:
    """Raises UserError for a size, rate, scale or dtype that cannot be, in a model or in one of its parts."""
    for field in dataclasses.fields(module):
        name = f"{where}.{field.name}"
        value: Any = getattr(module, field.name)
        if field.name in ("parent", "name"):
            continue
        if dataclasses.is_dataclass(value):
            check_fields(value, name)
        elif field.name in _SIZES and isinstance(value, int) and value < 1:
            raise check.error(name, value, "1 or more", "change it")
        elif field.name in _COUNTS and isinstance(value, int) and value < 0:
            raise check.error(name, value, "at least 0", "change it")
        elif isinstance(value, int) and value > (_SIZES | _COUNTS).get(field.name, value):
            most = (_SIZES | _COUNTS)[field.name]
            raise check.error(name, value, f"at most {most:,}", "change it")
        elif field.name in ("dropout", "drop_path") and not 0 <= (value or 0) < 1:
            raise check.error(name, value, "in [0, 1)", "change it")
        elif field.name == "scale" and isinstance(value, float) and not 0 < value < math.inf:
            raise check.error(name, value, "above 0: the factor of the logits", "change it")
        elif field.name in ("mean", "std") and isinstance(value, tuple):
            if len(value) != 3 or (field.name == "std" and min(value) <= 0):
                expected = "a number of each colour" + ", above 0" * (field.name == "std")
                raise check.error(name, value, expected, "change it")
        elif field.name == "dtype" and value not in DTYPES:
            raise check.unknown(name, str(value), DTYPES)


def with_fields(module: Any, **values: Any) -> Any:
    """The model with these fields changed wherever a part of it has them (remat, scan, dtype)."""
    changes = {k: v for k, v in values.items() if hasattr(module, k)}
    for field in dataclasses.fields(module):
        part = getattr(module, field.name)
        if field.name not in ("parent", "name") and dataclasses.is_dataclass(part):
            changes[field.name] = with_fields(part, **values)
    return dataclasses.replace(module, **changes)


@functools.lru_cache(maxsize=16)
def answers(model: Any, image_px: int, text_len: int) -> frozenset[str]:
    """The model's optional methods, "bias" if its logits have one, and every leaf of what `image` and `text` return.

    Computes nothing.
    """
    out = {name for name in ("decode", "head", "scale_bias") if hasattr(model, name)}
    if getattr(model, "bias", None) is not None:
        out.add("bias")
    variables = {"params": nn.unbox(abstract_params(model, image_px, text_len))}
    for method, x in zip(("image", "text"), _inputs(image_px, text_len)):
        answer = functools.partial(model.apply, method=method)
        out |= {f"{method}.{name}" for name in jax.eval_shape(answer, variables, x)}
    if "image.feats" not in out:  # a model whose class can decode, without the part that does
        out -= {"decode"}
    return frozenset(out)


@functools.lru_cache(maxsize=16)  # a trace of the whole model, asked for often
def abstract_params(model: Any, image_px: int, text_len: int) -> Any:
    """Shapes of the parameters, still carrying the names of their axes. Costs no memory and no compilation."""
    init = lambda *x: model.init(
        jax.random.key(0), *x
    )  # a key of its own: the mesh may be of no devices
    return jax.eval_shape(init, *_inputs(image_px, text_len))["params"]


def _inputs(image_px: int, text_len: int) -> tuple[jax.ShapeDtypeStruct, jax.ShapeDtypeStruct]:
    image = jax.ShapeDtypeStruct((1, image_px, image_px, 3), jnp.uint8)
    return image, jax.ShapeDtypeStruct((1, text_len), jnp.int32)
