"""A trained model as LAION's clip_benchmark calls one. torch is imported only where it is used."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from vlp.core.types import Apply
from vlp.data.draws import Draws
from vlp.infer.load import Loaded, load


class Encoders:
    """What clip_benchmark calls: `encode_image` and `encode_text`, from and to torch tensors on the CPU."""

    def __init__(self, loaded: Loaded, torch: Any):
        self.loaded, self._torch = loaded, torch

    def eval(self) -> Encoders:
        """Returns itself: the model is always deterministic."""
        return self

    def encode_image(self, images: Any) -> Any:
        """Embeddings f32[B E] of images u8[B R R 3], as `load_model`'s transform makes them."""
        return self._run(_image, np.asarray(images.cpu(), np.uint8))

    def encode_text(self, texts: Any) -> Any:
        """Embeddings f32[B E] of texts i32[B L], as `load_model`'s tokenizer makes them."""
        return self._run(_text, np.asarray(texts.cpu(), np.int32))

    def _run(self, encode: Callable[..., jax.Array], rows: np.ndarray) -> Any:
        return self._torch.from_numpy(np.array(self.loaded.apply.jit(encode)(rows)))


def load_model(
    model_name: str, pretrained: str = "", cache_dir: str | None = None, device: Any = "cpu"
) -> tuple[Encoders, Callable[[Any], Any], Callable[[Sequence[str]], Any]]:
    """Loads a run for clip_benchmark, as `clip_benchmark.models.TYPE2FUNC` asks for it.

    Call clip_benchmark with amp=False: torch's autocast would round the scores of embeddings that it did not compute.

    Args:
        model_name: the workdir.
        pretrained: the step of a checkpoint; "": the newest.
        cache_dir, device: not used; JAX chooses the device, and tensors are on the CPU.

    Returns:
        The model, its transform (a PIL image → u8[R R 3]) and its tokenizer (texts → i32[B L]).

    Raises:
        UserError: the workdir holds no such checkpoint.
    """
    torch: Any = importlib.import_module("torch")
    loaded = load(model_name, int(pretrained) if pretrained else None)
    draws = Draws(loaded.data, loaded.tokenizer, 0, 0, 0, training=False)
    unused = np.random.default_rng(0)  # evaluations draw nothing

    def transform(image: Any) -> Any:
        pixels = np.asarray(image.convert("RGB"))
        return torch.from_numpy(np.array(draws.image(pixels, unused)))

    def tokenizer(texts: Sequence[str]) -> Any:
        rows = [loaded.tokenizer.encode(text, loaded.data.text_len) for text in texts]
        return torch.from_numpy(np.stack(rows))

    return Encoders(loaded, torch), transform, tokenizer


def register(name: str = "vlp") -> None:
    """Adds the model type `name` to clip_benchmark, for its functions and its command line."""
    models: Any = importlib.import_module("clip_benchmark.models")
    models.TYPE2FUNC[name] = load_model
    if name not in models.MODEL_TYPES:
        models.MODEL_TYPES.append(name)


def _image(apply: Apply, image: jax.Array) -> jax.Array:
    return apply("image", image)["embed"].astype(np.float32)


def _text(apply: Apply, text: jax.Array) -> jax.Array:
    return apply("text", text)["embed"].astype(np.float32)
