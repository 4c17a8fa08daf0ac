"""Captions for image files."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

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
    data, tokenizer = loaded.data, loaded.tokenizer
    if not tokenizer.row.bos:
        got, do = "a tokenizer whose rows have no bos", "caption with another model"
        raise check.error("caption", got, "rows that begin with bos", do)
    options: dict[str, Any] = dict(resize=data.resize, how=data.eval_crop)
    pixels = [image_ops.eval_image(image, data.image_px, **options) for image in images]
    ids = {name: getattr(tokenizer, name) for name in ("pad_id", "bos_id", "eos_id", "unk_id")}
    generate = loaded.apply.jit(
        decoding.captions, length=data.text_len, vocab_size=tokenizer.vocab_size, **ids
    )
    tokens = generate(jnp.asarray(np.stack(pixels)))
    return [loaded.tokenizer.decode(row) for row in np.asarray(tokens)]
