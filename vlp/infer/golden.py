"""The golden pair: one drawn image and one text, with all that training made of them, stored in each checkpoint.

Whoever loads the checkpoint makes it again: pixels, tokens, embeddings, likelihood of the caption. A difference means
that other numbers would be computed than those that were trained: another resize filter, tokenizer, activation,
epsilon. The first stage that differs is an error that names the likely field: a warning would be read after the
results.
"""

from __future__ import annotations

import base64
import contextlib
import functools
import importlib.metadata
import io
import logging
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from PIL import Image

from vlp.core import check
from vlp.core import mesh as meshes
from vlp.core.config import difference, plain
from vlp.core.types import Apply
from vlp.data import image_ops
from vlp.data.config import Data
from vlp.data.tokenizer import Tokenizer
from vlp.models import layers
from vlp.models.interface import with_fields

log = logging.getLogger(__name__)
PyTree = Any
TEXT = "Two RED squares, a café & 3 dogs – on blue; the end."
# Of 255, between pixels that one filter makes on two machines: each rounds once. Another filter: 15 and more.
PIXELS = 2
# Relative l2 norm of the difference of two answers. Devices of one kind differ by the order of sums, devices of two
# kinds also by the precision of products (TF32, bfloat16 passes); computing in 16 bits rounds at every layer.
SAME_DEVICE, OTHER_DEVICE, HALF = 1e-3, 2e-2, 5e-2
_ANSWERS = ("image", "text", "caption")  # a caption comes from the other two
_PACKAGES = ("pillow", "opencv-python-headless", "sentencepiece", "tokenizers", "jax", "flax")


# ---- making it


def pair(data: Data, tokenizer: Tokenizer) -> dict[str, Any]:
    """Returns the part that the parameters do not change, JSON-able: image, text, pixels, tokens. Made once."""
    return _pair(data.image_px, data.text_len, data.resize, tokenizer)


@functools.lru_cache(maxsize=4)
def _pair(image_px: int, text_len: int, resize: str, tokenizer: Tokenizer) -> dict[str, Any]:
    image = picture(image_px)
    return {
        "image": _png(image),
        "text": TEXT,
        "pixels": _png(image_ops.eval_image(image, image_px, resize=resize)),
        "tokens": tokenizer.encode(TEXT, text_len).tolist(),
        "resize": resize,
    }


def picture(image_px: int) -> np.ndarray:
    """u8[1.5 px, 1.9 px, 3]: coloured rings that get finer, whose edges every resize filter renders differently."""
    height, width = int(1.5 * image_px), int(1.9 * image_px)
    y, x = np.mgrid[:height, :width] / max(image_px, 1)
    rings = np.sin(40 * ((x - 0.9) ** 2 + (y - 0.7) ** 2)) > 0
    colours = np.stack([x < 0.7, y < 0.9, x + y > 1.4], -1)
    return np.where(rings[..., None], 255 * colours, 40 + 120 * ~colours).astype(np.uint8)


def describe(
    model: Any, params: Mapping[str, PyTree], data: Data, tokenizer: Tokenizer, mesh: Mesh | None
) -> dict[str, Any]:
    """Returns the golden pair of a checkpoint, JSON-able.

    A small jitted call per tree of parameters, on the whole mesh, with the same input on every process: all call it.

    Args:
        model: the model.
        params: trees of parameters by name ("student", a teacher).
        data, tokenizer: as in training.
        mesh: of the parameters; None: NumPy arrays.
    """
    found = pair(data, tokenizer)
    asked = {name: answers(model, tree, found, mesh) for name, tree in params.items()}
    return found | {
        "answers": {
            name: {k: _array(v) for k, v in answer.items()} for name, answer in asked.items()
        },
        "fields": _fields(model),
        "device": jax.devices()[0].device_kind,
        "packages": _packages(),
    }


def compiled(model: Any, mesh: Mesh | None) -> bool:
    """Whether `answers` was called for this model before, and need not be compiled."""
    return (model, mesh) in _ASKED


_ASKED: set[Any] = set()


def answers(
    model: Any, params: PyTree, golden: Mapping[str, Any], mesh: Mesh | None
) -> dict[str, np.ndarray]:
    """Returns what the model says of the pair, f32: "image" [E], "text" [E], "caption" [L - 1] (log-likelihoods).

    What the model cannot answer, or has no parameters for, is left out.
    """
    _ASKED.add((model, mesh))
    image_1RR3 = _pixels(golden["pixels"])[None]
    text_1L = np.asarray(golden["tokens"], np.int32)[None]
    found = _compiled(model, mesh)(params, image_1RR3, text_1L)
    return {name: meshes.to_host(x)[0] for name, x in found.items()}


@functools.lru_cache(maxsize=16)
def _compiled(model: Any, mesh: Mesh | None) -> Any:
    out: dict[str, Any] = {} if mesh is None else {"out_shardings": meshes.replicated(mesh)}
    return jax.jit(lambda params, *batch: _ask(Apply(model, params), *batch), **out)


def _ask(apply: Apply, image_1RR3: jax.Array, text_1L: jax.Array) -> dict[str, jax.Array]:
    """Traced: an answer that the model lacks raises while it is traced."""
    out: dict[str, jax.Array] = {}
    image: Any = None
    text: Any = None
    with _left_out("image"):
        image = apply("image", image_1RR3)
        out["image"] = _vector(image)
    with _left_out("text"):
        text = apply("text", text_1L)
        out["text"] = _vector(text)
    if image and text and "feats" in image:
        with _left_out("caption"):
            decoded = apply("decode", text["tokens"], image["feats"])
            logits_1LV = decoded["hidden"].astype(jnp.float32) @ decoded["unembed"]
            logs_1LV = jax.nn.log_softmax(logits_1LV[:, :-1].astype(jnp.float32))
            out["caption"] = jnp.take_along_axis(logs_1LV, text_1L[:, 1:, None], -1)[..., 0]
    return out


@contextlib.contextmanager
def _left_out(name: str) -> Any:
    try:
        yield
    except Exception as e:  # a plugin's model may raise anything
        log.debug("golden pair: no answer %r (%s)", name, e)


def _vector(out: Mapping[str, Any]) -> jax.Array:
    """The embedding, f32[1 E]; of a model without one the mean of the tokens."""
    x = out["embed"] if "embed" in out else out["tokens"].mean(axis=1)
    return x.astype(jnp.float32)


# ---- checking it


def verify(
    where: str,
    golden: Mapping[str, Any],
    apply: Apply,
    data: Data,
    tokenizer: Tokenizer,
    which: str = "student",
) -> None:
    """Raises UserError for the first stage whose result is not that of training; the error names the likely field.

    Args:
        where: the checkpoint.
        golden: of the checkpoint; {}: one without.
        apply: the model with the parameters `which`.
        data, tokenizer: as they would be used.
        which: "student" or a teacher's name.
    """
    if not golden:
        return
    _check_pixels(where, golden, data)
    tokens = tokenizer.encode(golden["text"], len(golden["tokens"])).tolist()
    if tokens != golden["tokens"]:
        at = next(i for i, (a, b) in enumerate(zip(tokens, golden["tokens"])) if a != b)
        got = f"token {at} of {golden['text']!r}: {tokens[at]}, not {golden['tokens'][at]}"
        raise _error(where, "tokens", got, _likely(golden, "the tokenizer"))
    stored = golden["answers"].get(which, {})
    if not stored:
        return
    found = answers(apply.model, apply.params, golden, None)
    limit = _limit(golden, apply.model)
    for name in (n for n in _ANSWERS if n in stored):
        wanted = _values(stored[name])
        error = _distance(found.get(name), wanted)
        if not error <= limit:
            got = f"a relative difference of {error:.2g} of {name}, above {limit:g}"
            raise _error(where, f"answer {name!r}", got, _cause(golden, apply, name, wanted, limit))


def _check_pixels(where: str, golden: Mapping[str, Any], data: Data) -> None:
    image, wanted = _pixels(golden["image"]), _pixels(golden["pixels"])
    made = lambda resize: image_ops.eval_image(image, data.image_px, resize=resize)
    if data.image_px != len(wanted):
        likely = f"config.data.image_px: {data.image_px}, not {len(wanted)}"
        raise _error(where, "pixels", "another size", likely)
    if (most := _most(made(data.resize), wanted)) <= PIXELS:
        return
    likely = _likely(golden, "config.data.resize")
    for name in image_ops.FILTERS:
        with contextlib.suppress(check.UserError):  # "fast" may not be installed
            if name != data.resize and _most(made(name), wanted) <= PIXELS:
                likely = f"config.data.resize: {data.resize!r}, not {name!r}"
    raise _error(where, "pixels", f"pixels that differ by up to {most} of 255", likely)


def _cause(
    golden: Mapping[str, Any], apply: Apply, name: str, wanted: np.ndarray, limit: float
) -> str:
    """The field that explains other answers: one that differs from training's, or that gives training's if changed."""
    if changes := difference(golden["fields"], _fields(apply.model)):
        return "; ".join(f"config.model.{change}" for change in changes[:3])
    errors = {}
    for activation in layers.ACTIVATIONS:
        other = with_fields(apply.model, activation=activation)
        found = answers(other, apply.params, golden, None).get(name)
        errors[activation] = _distance(found, wanted)
    if errors[best := min(errors, key=lambda name: errors[name])] <= limit:
        return f"config.model activation: {best!r} gives the checkpoint's numbers"
    return _likely(golden, "the model's code: activation, eps, pooling")


def _likely(golden: Mapping[str, Any], text: str) -> str:
    """The text, and the packages that have another version than in training."""
    packages = difference(golden.get("packages", {}), _packages())
    return f"{text} (packages: {', '.join(packages)})" if packages else text


def _error(where: str, stage: str, got: str, likely: str) -> check.UserError:
    do = f"likely cause: {likely}; bring it back, or skip this check with --no-golden"
    return check.error(f"{where}: golden {stage}", got, "what training computed", do)


def _limit(golden: Mapping[str, Any], model: Any) -> float:
    if "float16" in str(_fields(model)):  # and bfloat16
        return HALF
    return SAME_DEVICE if golden["device"] == jax.devices()[0].device_kind else OTHER_DEVICE


def _distance(found: np.ndarray | None, wanted: np.ndarray) -> float:
    if found is None or found.shape != wanted.shape:
        return float("inf")
    return float(np.linalg.norm(found - wanted) / max(np.linalg.norm(wanted), 1e-12))


def _most(a: np.ndarray, b: np.ndarray) -> int:
    return int(np.abs(a.astype(np.int32) - b).max())


def _fields(model: Any) -> dict[str, Any]:
    """Every field of the model, also those that a config leaves at their defaults, and constants of its layers."""
    eps = {"layer_norm_eps": layers.Norm.eps, "batch_norm_eps": layers.BatchNorm.eps}
    try:
        return plain(model) | eps
    except check.UserError:  # a plugin's model with other fields
        return eps


def _packages() -> dict[str, str]:
    found = {}
    for name in _PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def _png(image: np.ndarray) -> str:
    out = io.BytesIO()
    Image.fromarray(image).save(out, "PNG")
    return base64.b64encode(out.getvalue()).decode()


def _pixels(text: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(text))))


def _array(x: np.ndarray) -> str:
    return base64.b64encode(np.asarray(x, "<f4").tobytes()).decode()


def _values(text: str) -> np.ndarray:
    return np.frombuffer(base64.b64decode(text), "<f4")
