"""Crops and augmentation: an image of any size → u8[R, R, 3], for training and for evaluation.

Every random choice is drawn from the generator handed in, in one fixed order. Values stay 0 … 255;
scaling to floats belongs to the model. Not here: decoding (pictures.py), which image (samples.py).
"""

import dataclasses
import functools
import types
from collections.abc import Iterator, Sequence

import numpy as np
from PIL import Image, ImageFilter

from vlp.core import check
from vlp.data import randaugment as randaugment_lib
from vlp.data.pictures import Picture

FILTERS = {
    "box": Image.Resampling.BOX,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
    "fast": None,  # OpenCV's Gaussian, then its cubic: near "bicubic", at a quarter of its time
}  # Pillow's filters widen when shrinking: all are antialiased
CROPS = ("exact", "torchvision")  # of training (`train_box`)
EVAL_CROPS = ("exact", "torchvision", "squash")  # of evaluation (`eval_crop`)
LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601
_MARGIN = (
    1.25  # with it, scaled decoding stays within 1.5/255 of Pillow's bicubic; with 1, within 3
)
_BLUR = 0.35  # of the Gaussian, per pixel that one pixel covers: nearest to Pillow's bicubic (same images)


@dataclasses.dataclass(frozen=True)
class Crop:
    """Which part of an image becomes a sample, and whether it is mirrored.

    box: left, top, right, bottom in pixels of the image, a white border of `border_px` included; shrink: the fraction
    1/1 … 1/8 at which the image may be decoded for it.
    """

    box: tuple[float, float, float, float]
    shrink: int = 1
    border_px: int = 0
    flip: bool = False

    def shares(self, size: tuple[int, ...]) -> np.ndarray:
        """Returns f32[4]: left, top, right, bottom as shares of the sides of an image of (height, width).

        Outside of [0, 1] where the crop looks past the image's edge.
        """
        sides_4 = np.array([size[1], size[0], size[1], size[0]], np.float64)
        return ((np.array(self.box) - self.border_px) / sides_4).astype(np.float32)


def draw_crop(
    size: tuple[int, ...],
    size_px: int,
    draws: np.ndarray,
    *,
    min_area_frac: float = 1.0,
    max_area_frac: float = 1.0,
    max_aspect: float = 1.0,
    translate_frac: float = 0.0,
    flip: bool = False,
    how: str = "exact",
) -> Crop:
    """Returns the crop that draws[:5], uniform in [0, 1), choose in an image of (height, width) (`train_image`)."""
    border_px = round(translate_frac * min(size)) if translate_frac else 0
    box, shrink = train_box(
        (size[0] + 2 * border_px, size[1] + 2 * border_px),
        size_px,
        draws,
        min_area_frac=min_area_frac,
        max_area_frac=max_area_frac,
        max_aspect=max_aspect,
        how=how,
    )
    return Crop(box, shrink, border_px, bool(flip and draws[4] < 0.5))


def crop_of_shares(
    shares: Sequence[float], flip: bool, size: tuple[int, ...], size_px: int
) -> Crop:
    """Returns a crop from left, top, right, bottom as shares of the sides of an image of (height, width)."""
    height, width = size
    left, top, right, bottom = (float(s) * side for s, side in zip(shares, (width, height) * 2))
    return Crop((left, top, right, bottom), _shrink(right - left, bottom - top, size_px), 0, flip)


def eval_crop(size: tuple[int, ...], size_px: int = 0, how: str = "exact") -> Crop:
    """Returns the crop of evaluations: the centre square of the whole image.

    "torchvision": its Resize of the shorter side to `size_px`, which cuts a fraction of a pixel off the longer one, and
    its CenterCrop, which rounds the edges (OpenCLIP). "squash": the whole image, whatever its aspect ratio (SigLIP).
    """
    height, width = size
    if how == "squash":
        return Crop((0.0, 0.0, float(width), float(height)))
    side = min(height, width)
    if how == "torchvision":
        new_h, new_w = (int(size_px * edge / side) for edge in (height, width))
        top, left = (round((edge - size_px) / 2) for edge in (new_h, new_w))
        y, x = height / new_h, width / new_w
        return Crop((left * x, top * y, (left + size_px) * x, (top + size_px) * y))
    left, top = (width - side) / 2, (height - side) / 2
    return Crop((left, top, left + side, top + side))


def size_of(image: np.ndarray | Picture) -> tuple[int, ...]:
    """Returns (height, width)."""
    return image.size if isinstance(image, Picture) else image.shape[:2]


def train_image(
    image: np.ndarray | Picture,
    size_px: int,
    rng: np.random.Generator,
    *,
    min_area_frac: float = 1.0,
    max_area_frac: float = 1.0,
    max_aspect: float = 1.0,
    translate_frac: float = 0.0,
    flip: bool = False,
    how: str = "exact",
    jitter: float = 0.0,
    randaugment: int = 0,
    magnitude: float = 0.0,
    grey_frac: float = 0.0,
    blur_frac: float = 0.0,
    resize: str = "bicubic",
    crop: Crop | None = None,
    out: np.ndarray | None = None,
) -> np.ndarray:
    """Returns u8[size_px, size_px, 3], in `out` if given: a random resized crop, changed and mirrored.

    The crop covers a uniform share of the area with a log-uniform aspect ratio in [1/max_aspect,
    max_aspect] (`train_box`); `crop` replaces it. `translate_frac` first adds a white
    border of that share of the shorter side, so that the crop may also look past the edge. `jitter`
    is the largest relative change of brightness, contrast and saturation; `randaugment` is the
    number of its operations (randaugment.py). Then, with the probabilities `grey_frac` and `blur_frac`, the image is
    made grey and blurred by a Gaussian of 0.1 … 2 pixels at 224 (Chen et al. 2020, arXiv:2002.05709, appendix A).
    A `Picture` is decoded at the smallest power-of-two fraction at which the crop has 1.25 times `size_px` pixels a
    side. With resize="fast" the crop is made of whole pixels of what was decoded.
    """
    # always eight, so that an option does not change the draws of the others
    draws = rng.random(8)
    if crop is None:
        crop = draw_crop(
            size_of(image),
            size_px,
            draws,
            min_area_frac=min_area_frac,
            max_area_frac=max_area_frac,
            max_aspect=max_aspect,
            translate_frac=translate_frac,
            flip=flip,
            how=how,
        )
    box = crop.box
    if crop.border_px or translate_frac:
        image = _bordered(_pixels(image), crop.border_px)
    if isinstance(image, Picture):
        image, shrink = image.pixels(crop.shrink)
        box = tuple(edge / shrink for edge in box)
    small_RRC = _resized(image, size_px, box, resize, out)
    if jitter:
        changes = 1 + jitter * (2 * draws[5:8] - 1)
        small_RRC = np.asarray(_jittered(Image.fromarray(small_RRC), *changes))
    if randaugment:
        small_RRC = randaugment_lib.apply(small_RRC, rng, randaugment, magnitude)
    if grey_frac or blur_frac:
        small_RRC = _grey_and_blur(small_RRC, rng.random(3), grey_frac, blur_frac)
    if crop.flip:
        small_RRC = small_RRC[:, ::-1]
    return small_RRC if out is None or small_RRC is out else _put(small_RRC, out)


def _grey_and_blur(
    image: np.ndarray, draws: np.ndarray, grey_frac: float, blur_frac: float
) -> np.ndarray:
    changed = Image.fromarray(image)
    if draws[0] < grey_frac:
        changed = changed.convert("L").convert("RGB")
    if draws[1] < blur_frac:
        radius = (0.1 + 1.9 * draws[2]) * len(image) / 224
        changed = changed.filter(ImageFilter.GaussianBlur(radius))
    return np.asarray(changed)


def train_box(
    size: tuple[int, ...],
    size_px: int,
    draws: np.ndarray,
    *,
    min_area_frac: float = 1.0,
    max_area_frac: float = 1.0,
    max_aspect: float = 1.0,
    how: str = "exact",
) -> tuple[tuple[float, float, float, float], int]:
    """Returns the crop (left, top, right, bottom) that four draws choose in an image of (height,
    width), and the fraction 1/1 … 1/8 at which it may be decoded.

    Area and aspect ratio are drawn until the crop lies within the image, ten times at most; then it
    is the largest crop of an allowed aspect ratio (and area), at a place that is drawn as well (a
    random square crop, where only squares are allowed). Source: Szegedy et al. 2015,
    arXiv:1409.4842, §6. All further draws are a function of the first two. how="torchvision": the
    distribution of its RandomResizedCrop, which has whole pixels and takes the centre in the end.
    """
    height, width = size
    if how == "torchvision":
        box = _torchvision_box(size, draws, (min_area_frac, max_area_frac), max_aspect)
        return box, _shrink(box[2] - box[0], box[3] - box[1], size_px)
    largest_w, largest_h = min(width, height * max_aspect), min(height, width * max_aspect)
    crop_w, crop_h = float(largest_w), float(largest_h)
    if min_area_frac * height * width <= largest_w * largest_h:
        for area_draw, aspect_draw in _tries(draws):
            area_frac = min_area_frac + area_draw * (max_area_frac - min_area_frac)
            area, aspect = area_frac * height * width, max_aspect ** (2 * aspect_draw - 1)
            crop_w, crop_h = (area * aspect) ** 0.5, (area / aspect) ** 0.5
            if crop_w <= width and crop_h <= height:
                break
        else:
            smaller = min(1.0, (max_area_frac * height * width / (largest_w * largest_h)) ** 0.5)
            crop_w, crop_h = smaller * largest_w, smaller * largest_h
    left, top = draws[2] * (width - crop_w), draws[3] * (height - crop_h)
    return (left, top, left + crop_w, top + crop_h), _shrink(crop_w, crop_h, size_px)


def _torchvision_box(
    size: tuple[int, ...], draws: np.ndarray, area_frac: tuple[float, float], max_aspect: float
) -> tuple[float, float, float, float]:
    """As torchvision 0.29, `RandomResizedCrop.get_params`, with ratio (1/max_aspect, max_aspect)."""
    height, width = size
    for area_draw, aspect_draw in _tries(draws):
        area = (area_frac[0] + area_draw * (area_frac[1] - area_frac[0])) * height * width
        aspect = max_aspect ** (2 * aspect_draw - 1)
        crop_w, crop_h = round((area * aspect) ** 0.5), round((area / aspect) ** 0.5)
        if 0 < crop_w <= width and 0 < crop_h <= height:
            left, top = int(draws[2] * (width - crop_w + 1)), int(draws[3] * (height - crop_h + 1))
            return float(left), float(top), float(left + crop_w), float(top + crop_h)
    crop_w = round(min(width, height * max_aspect))
    crop_h = round(min(height, width * max_aspect))
    left, top = float((width - crop_w) // 2), float((height - crop_h) // 2)
    return left, top, left + crop_w, top + crop_h


def _shrink(crop_w: float, crop_h: float, size_px: int) -> int:
    """The smallest fraction 1/1 … 1/8 at which a crop has `_MARGIN` times `size_px` pixels a side."""
    return next((s for s in (8, 4, 2) if min(crop_w, crop_h) >= _MARGIN * s * size_px), 1)


def _tries(draws: np.ndarray) -> Iterator[tuple[float, float]]:
    """The first two draws, and nine pairs that follow from them."""
    yield float(draws[0]), float(draws[1])
    key = np.array(draws[:2], np.float64).view(np.uint64)
    yield from np.random.Generator(np.random.Philox(key=key)).random((9, 2)).tolist()


def eval_image(
    image: np.ndarray | Picture,
    size_px: int,
    *,
    resize: str = "bicubic",
    how: str = "exact",
    out: np.ndarray | None = None,
) -> np.ndarray:
    """Returns u8[size_px, size_px, 3]: the crop `eval_crop` of the whole image, resized in one step."""
    image = _pixels(image)
    height, width = image.shape[:2]
    if height == width == size_px:  # equal size: bit for bit
        return image if out is None else _put(image, out)
    return _resized(image, size_px, eval_crop((height, width), size_px, how).box, resize, out)


def _pixels(image: np.ndarray | Picture) -> np.ndarray:
    return image.pixels()[0] if isinstance(image, Picture) else image


def _put(image: np.ndarray, out: np.ndarray) -> np.ndarray:
    out[:] = image
    return out


def _resized(
    image: np.ndarray, size_px: int, box: tuple, resize: str, out: np.ndarray | None
) -> np.ndarray:
    if resize == "fast":
        return _fast(image, size_px, box, out)
    small = Image.fromarray(image).resize((size_px, size_px), FILTERS[resize], box=box)
    return np.asarray(small) if out is None else _put(np.asarray(small), out)


def _fast(image: np.ndarray, size_px: int, box: tuple, out: np.ndarray | None) -> np.ndarray:
    """The box, its edges rounded to whole pixels, in the size asked for."""
    cv = _opencv()
    left, top, right, bottom = (round(float(edge)) for edge in box)
    left, top = min(left, image.shape[1] - 1), min(top, image.shape[0] - 1)
    crop = image[top : max(bottom, top + 1), left : max(right, left + 1)]
    y, x = (_blur(side / size_px) for side in crop.shape[:2])
    if x or y:
        sides = [2 * round(2 * sigma) + 1 for sigma in (x, y)]
        sigmas = {"sigmaX": x or 0.1, "sigmaY": y or 0.1}  # of a side of 1, any
        crop = cv.GaussianBlur(crop, sides, borderType=cv.BORDER_REPLICATE, **sigmas)
    return cv.resize(crop, (size_px, size_px), dst=out, interpolation=cv.INTER_CUBIC)


def _blur(scale: float) -> float:
    """The Gaussian's width before shrinking by `scale`; 0 = none, nearest to bicubic up to 1.1."""
    return _BLUR * scale if scale > 1.1 else 0.0


@functools.cache
def _opencv() -> types.ModuleType:
    try:
        import cv2  # here, because only this filter needs it
    except ImportError:
        got = "'fast', which needs OpenCV"
        do = "pip install 'vlp[fast]', or choose another filter"
        raise check.error("config.data.resize", got, "OpenCV installed", do) from None
    cv2.setNumThreads(1)  # the loader has its own threads
    return cv2


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
    if name == "fast":
        _opencv()
