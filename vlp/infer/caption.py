"""Captions for image files."""

from __future__ import annotations

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np

from vlp.core import check
from vlp.data import image_ops
from vlp.infer.load import Loaded
from vlp.ops import decoding


def caption(loaded: Loaded, images: Sequence[np.ndarray]) -> list[str]:
    """Returns greedy captions of images, u8[H W 3] of any size, which are prepared as in training.

    Raises:
        UserError: the model has no decoder.
    """
    if not hasattr(loaded.apply.model, "decode"):
        raise check.error(
            "caption",
            f"a {type(loaded.apply.model).__name__}",
            "a model with a decoder",
            "give the workdir of a captioner, such as CoCa",
        )
    px, resize = loaded.data.image_px, loaded.data.resize
    pixels = [image_ops.eval_image(image, px, resize=resize) for image in images]
    vocab_size = loaded.tokenizer.vocab_size
    generate = loaded.apply.jit(
        decoding.captions, length=loaded.data.text_len, vocab_size=vocab_size
    )
    tokens = generate(jnp.asarray(np.stack(pixels)))
    return [loaded.tokenizer.decode(row) for row in np.asarray(tokens)]
