"""Runs a model and its original on the same inputs, where the other library is installed."""

from __future__ import annotations

import importlib
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from flax import traverse_util

from vlp.core.types import Apply
from vlp.exchange.checkpoint import Exchanged

NUM = 2  # images, and texts
Outputs = dict[str, np.ndarray]


def outputs(exchanged: Exchanged, image: np.ndarray, text: np.ndarray) -> Outputs:
    """Returns our unit embeddings "image" and "text", and with a decoder "logits", in float32."""
    model = exchanged.build()
    towers = {
        name: getattr(model, name).clone(dtype="float32") for name in ("image_tower", "text_tower")
    }  # fmt: skip
    params = traverse_util.unflatten_dict(dict(exchanged.leaves), sep="/")
    apply = Apply(model.clone(**towers), params)

    def run(apply: Apply, image: jax.Array, text: jax.Array) -> dict[str, jax.Array]:
        seen, read = apply("image", image), apply("text", text)
        found = {"image": seen["embed"], "text": read["embed"]}
        if "feats" in seen:
            out = apply("decode", read["tokens"], seen["feats"])
            found["logits"] = out["hidden"] @ out["unembed"]
        return found

    return {k: np.asarray(x) for k, x in apply.jit(run)(image, text).items()}


def inputs(exchanged: Exchanged) -> tuple[np.ndarray, np.ndarray]:
    """Fixed inputs: u8[2 R R 3], and rows i32[2 L], one short and one full."""
    data, text = exchanged.data, exchanged.build().text_tower
    rng = np.random.default_rng(0)
    px, length = data["image_px"], data["text_len"]
    image = rng.integers(0, 256, (NUM, px, px, 3)).astype(np.uint8)
    rows = rng.integers(
        min(5, text.vocab // 2),
        max(6, min(text.eos_id, text.vocab) - 1 if text.eos_id > 5 else text.vocab - 1),
        (NUM, length),
    )
    rows[0, length // 2 :] = max(text.pad_id, 0)
    rows[0, length // 2] = rows[1, -1] = text.eos_id
    return image, rows.astype(np.int32)


def difference(exchanged: Exchanged, folder: pathlib.Path, system: str) -> dict[str, float] | str:
    """Returns the largest absolute difference of each output between a folder's own library and ours.

    Args:
        exchanged: our model.
        folder: the same model, of the other library.
        system: its library.

    Returns:
        The differences, or why there are none: the library is not installed, or cannot load the folder.
    """
    run = THEIRS.get(system)
    if run is None:
        return f"{system} has no package to compare with"
    image, text = inputs(exchanged)
    try:
        theirs = run(exchanged, folder, image, text)
    except ImportError as e:
        return f"not compared: {e!s:.100}"
    except Exception as e:  # whatever the other library raises is no reason to lose the conversion
        return f"not compared: {system} raised {type(e).__name__} ({str(e).splitlines()[0]:.100})"
    ours = outputs(exchanged, image, text)
    real = text != max(exchanged.build().text_tower.pad_id, 0)
    out = {}
    for name, x in theirs.items():
        y = ours[name]
        if name == "logits":
            x, y = x[real], y[:, : x.shape[1]][real]
        out[name] = float(np.abs(x - y).max())
    return out


def _pixels(exchanged: Exchanged, image: np.ndarray) -> Any:
    torch: Any = importlib.import_module("torch")
    tower = exchanged.build().image_tower
    mean, std = (np.array(v, np.float32) for v in (tower.mean, tower.std))
    x = (image.astype(np.float32) / 255 - mean) / std
    return torch.from_numpy(np.ascontiguousarray(x.transpose(0, 3, 1, 2)))


def _unit(x: Any) -> np.ndarray:
    x = x.float().numpy()
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def _open_clip(
    exchanged: Exchanged, folder: pathlib.Path, image: np.ndarray, text: np.ndarray
) -> Outputs:
    torch = _torch()
    library: Any = importlib.import_module("open_clip")
    model: Any = library.create_model(f"local-dir:{folder.absolute()}").eval()
    with torch.no_grad():
        x, rows = _pixels(exchanged, image), torch.from_numpy(text).long()
        out = {"image": _unit(model.encode_image(x)), "text": _unit(model.encode_text(rows))}
        if hasattr(model, "text_decoder"):
            out["logits"] = model(x, rows, output_labels=False)["logits"].float().numpy()
    return out


def _hugging_face(
    exchanged: Exchanged, folder: pathlib.Path, image: np.ndarray, text: np.ndarray
) -> Outputs:
    torch = _torch()
    library: Any = importlib.import_module("transformers")
    model: Any = library.AutoModel.from_pretrained(folder).eval()
    with torch.no_grad():
        rows = torch.from_numpy(text).long()
        found = model(input_ids=rows, pixel_values=_pixels(exchanged, image))
    return {"image": _unit(found.image_embeds), "text": _unit(found.text_embeds)}


def _torch() -> Any:
    """torch, with the schemas of torchvision's operators where its own do not load; nothing here calls them."""
    torch: Any = importlib.import_module("torch")
    library = torch.library.Library("torchvision", "FRAGMENT")
    for name in ("nms", "qnms"):
        try:
            torch._C._dispatch_find_schema_or_throw(f"torchvision::{name}", "")
        except RuntimeError:
            text = f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
            library.define(text)
    _KEPT.append(library)
    return torch


_KEPT: list[Any] = []  # a library's definitions go when it does
THEIRS: dict[str, Callable[..., Outputs]] = {
    "open_clip": _open_clip,
    "hugging_face": _hugging_face,
}
