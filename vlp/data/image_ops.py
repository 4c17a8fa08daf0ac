"""Images: encoded bytes → u8[H, W, 3], and the train and eval geometry → u8[R, R, 3].

Every random choice is drawn from the generator handed in, in one fixed order. Values stay 0 … 255;
scaling to floats belongs to the model. Not here: which image (loader.py).
"""

import io

import numpy as np
from PIL import Image, ImageOps

from vlp.core import check

FILTERS = {
    "box": Image.Resampling.BOX,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}  # Pillow's filters widen when shrinking: all are antialiased
MAX_PIXELS = (
    2**27
)  # 134 megapixels (402 MB decoded): beyond it a file is taken for a decompression bomb
LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601


class BadImage(ValueError):
    """Bytes that are no usable image."""


def decode(data: bytes) -> np.ndarray:
    """Returns u8[H, W, 3] of any file Pillow reads, alpha on white, EXIF rotation applied.

    Raises: `BadImage` for truncated, foreign or oversized files.
    """
    try:
        image = Image.open(io.BytesIO(data))
        if image.width * image.height > MAX_PIXELS:
            raise BadImage(f"{image.width}×{image.height} pixels, more than {MAX_PIXELS}")
        turned = image.getexif().get(0x0112, 1) != 1  # 0x0112: the EXIF tag Orientation
        if turned:
            image = ImageOps.exif_transpose(image)
        return np.array(_to_rgb(image))
    except BadImage:
        raise
    except (
        Exception
    ) as e:  # Pillow raises OSError, SyntaxError, struct.error, ValueError … by format
        raise BadImage(f"{type(e).__name__}: {e}") from e


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode.startswith("I") or image.mode == "F":  # 16-bit grey; Pillow would clip it to 255
        grey = np.asarray(image).astype(np.float64)
        top = 65535.0 if image.mode.startswith("I") else max(float(grey.max()), 1.0)
        grey = np.round(grey.clip(0, top) * (255.0 / top)).astype(np.uint8)
        return Image.fromarray(grey).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")


def train_image(
    image: np.ndarray,
    size_px: int,
    rng: np.random.Generator,
    *,
    min_area_frac: float = 1.0,
    max_area_frac: float = 1.0,
    max_aspect: float = 1.0,
    translate_frac: float = 0.0,
    flip: bool = False,
    jitter: float = 0.0,
    resize: str = "bicubic",
) -> np.ndarray:
    """Returns u8[size_px, size_px, 3]: a random resized crop, colour change, mirror.

    The crop covers a uniform share of the area with a log-uniform aspect ratio in [1/max_aspect,
    max_aspect] (Szegedy et al. 2015, arXiv:1409.4842, §6). `translate_frac` first adds a white
    border of that share of the shorter side, so that the crop may also look past the edge. `jitter`
    is the largest relative change of brightness, contrast and saturation.
    """
    draws = rng.random(
        8
    )  # always eight, so that switching one option on leaves the others' draws alone
    if translate_frac:
        image = _bordered(image, round(translate_frac * min(image.shape[:2])))
    height, width = image.shape[:2]
    area = (min_area_frac + draws[0] * (max_area_frac - min_area_frac)) * height * width
    aspect = max_aspect ** (2 * draws[1] - 1)
    crop_w = min(width, (area * aspect) ** 0.5)
    crop_h = min(height, (area / aspect) ** 0.5)
    if max_aspect == 1.0:
        crop_w = crop_h = min(crop_w, crop_h)
    left, top = draws[2] * (width - crop_w), draws[3] * (height - crop_h)
    small = _resized(image, size_px, (left, top, left + crop_w, top + crop_h), resize)
    if jitter:
        small = _jittered(small, *(1 + jitter * (2 * draws[5:8] - 1)))
    out_RRC = np.asarray(small)
    return out_RRC[:, ::-1] if flip and draws[4] < 0.5 else out_RRC


def eval_image(image: np.ndarray, size_px: int, *, resize: str = "bicubic") -> np.ndarray:
    """Returns u8[size_px, size_px, 3]: the centre square, resized in one step."""
    height, width = image.shape[:2]
    if height == width == size_px:
        return image  # equal size: bit for bit
    side = min(height, width)
    left, top = (width - side) / 2, (height - side) / 2
    return np.asarray(_resized(image, size_px, (left, top, left + side, top + side), resize))


def _resized(image: np.ndarray, size_px: int, box: tuple, resize: str) -> Image.Image:
    return Image.fromarray(image).resize((size_px, size_px), FILTERS[resize], box=box)


def _bordered(image: np.ndarray, border_px: int) -> np.ndarray:
    height, width = image.shape[:2]
    out = np.full((height + 2 * border_px, width + 2 * border_px, 3), 255, np.uint8)
    out[border_px : border_px + height, border_px : border_px + width] = image
    return out


def _jittered(
    image: Image.Image, brightness: float, contrast: float, saturation: float
) -> Image.Image:
    """Brightness, contrast (about the mean luma), saturation: one affine map of colours."""
    pixel_11C = np.asarray(image.resize((1, 1), Image.Resampling.BOX))
    mean = float(np.dot(LUMA, pixel_11C[0, 0]))
    gain, shift = brightness * contrast, brightness * (1 - contrast) * mean
    rows = (
        (
            *(gain * ((1 - saturation) * w + saturation * (c == k)) for k, w in enumerate(LUMA)),
            shift,
        )
        for c in range(3)
    )
    return image.convert("RGB", sum(rows, ()))


def check_filter(where: str, name: str) -> None:
    """Raises a `UserError` unless `name` is one of `FILTERS`."""
    if name not in FILTERS:
        raise check.unknown(where, name, FILTERS)
