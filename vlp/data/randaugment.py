"""RandAugment (Cubuk et al. 2020, arXiv:1909.13719): N random operations with one magnitude.

Operations and ranges are those of the authors' list (its §3.1 and the reference code's, Posterize to
4 bits, Solarize from 256, shifts of up to 100 of 331 pixels), their order of signs drawn from the
generator handed in. Unlike there, what moves in from outside is mid grey in every channel.
"""

from collections.abc import Callable

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

MAX_MAGNITUDE = 10.0
GREY = (128, 128, 128)


def apply(image: np.ndarray, rng: np.random.Generator, num: int, magnitude: float) -> np.ndarray:
    """Returns u8[H, W, 3]: `num` operations drawn with replacement, at `magnitude` of 10."""
    changed = Image.fromarray(image)
    share, names = magnitude / MAX_MAGNITUDE, list(OPERATIONS)
    for _ in range(num):
        name = names[int(rng.integers(len(names)))]
        sign = 1 if rng.random() < 0.5 else -1
        changed = OPERATIONS[name](changed, share, sign)
    return np.asarray(changed)


def _moved(image: Image.Image, *matrix: float | int) -> Image.Image:
    return image.transform(
        image.size, Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR, fillcolor=GREY
    )


def _enhance(kind: type) -> Callable[[Image.Image, float, int], Image.Image]:
    return lambda image, share, sign: kind(image).enhance(1 + 0.9 * share * sign)


# name → function of the image, the share of the operation's range, and a sign where it has one
OPERATIONS: dict[str, Callable[[Image.Image, float, int], Image.Image]] = {
    "identity": lambda image, share, sign: image,
    "autocontrast": lambda image, share, sign: ImageOps.autocontrast(image),
    "equalize": lambda image, share, sign: ImageOps.equalize(image),
    "rotate": lambda image, share, sign: image.rotate(
        30 * share * sign, Image.Resampling.BILINEAR, fillcolor=GREY
    ),
    "solarize": lambda image, share, sign: ImageOps.solarize(image, round(256 * (1 - share))),
    "posterize": lambda image, share, sign: ImageOps.posterize(image, 8 - round(4 * share)),
    "color": _enhance(ImageEnhance.Color),
    "contrast": _enhance(ImageEnhance.Contrast),
    "brightness": _enhance(ImageEnhance.Brightness),
    "sharpness": _enhance(ImageEnhance.Sharpness),
    "shear_x": lambda image, share, sign: _moved(image, 1, 0.3 * share * sign, 0, 0, 1, 0),
    "shear_y": lambda image, share, sign: _moved(image, 1, 0, 0, 0.3 * share * sign, 1, 0),
    "translate_x": lambda image, share, sign: _moved(
        image, 1, 0, 0.3 * share * sign * image.size[0], 0, 1, 0
    ),
    "translate_y": lambda image, share, sign: _moved(
        image, 1, 0, 0, 0, 1, 0.3 * share * sign * image.size[1]
    ),
}
