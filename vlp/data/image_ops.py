"""Images: encoded bytes → u8[H, W, 3], and the train and eval geometry → u8[R, R, 3].

Every random choice is drawn from the generator handed in, in one fixed order. Values stay 0 … 255;
scaling to floats belongs to the model. Not here: which image (loader.py).
"""

import functools
import io
import types

import numpy as np
import simplejpeg
from PIL import Image, ImageOps, UnidentifiedImageError

from vlp.core import check
from vlp.data import randaugment as randaugment_lib

FILTERS = {
    "box": Image.Resampling.BOX,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
    "fast": None,  # OpenCV's Gaussian, then its cubic: near "bicubic", at a quarter of its time
}  # Pillow's filters widen when shrinking: all are antialiased
Image.init()  # all of Pillow's plugins, so that the next line's names are known
_WANTED = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF")
FORMATS = tuple(f for f in _WANTED if f in Image.OPEN)  # none that runs another program (EPS)
MAX_PIXELS = 89_478_485  # Pillow's own limit (268 MB decoded): larger files are taken for bombs
REASONS = ("missing", "outside", "empty", "not_an_image", "too_large", "truncated", "corrupt")
_MAGIC = (b"\xff\xd8\xff", b"\x89PNG", b"GIF8", b"RIFF", b"II*\0", b"MM\0*", b"BM")
LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601
_MARGIN = (
    1.25  # with it, scaled decoding stays within 1.5/255 of Pillow's bicubic; with 1, within 3
)
_BLUR = 0.35  # of the Gaussian, per pixel that one pixel covers: nearest to Pillow's bicubic (same images)
_ORIENTATION = 0x0112  # the EXIF tag


class BadImage(ValueError):
    """Bytes that are no usable image; `reason` is one of `REASONS`, `key` the record's where known."""

    def __init__(self, reason: str, detail: str, key: str | None = None):
        super().__init__(f"{reason}: {detail}")
        self.reason, self.key = reason, key


def _bad(e: Exception, data: bytes) -> BadImage:
    """The reason behind what a decoder raised (Pillow: OSError, SyntaxError, struct.error … by format)."""
    detail = f"{type(e).__name__}: {e!s:.120}"
    if isinstance(e, BadImage):
        return e
    if isinstance(e, MemoryError) and (fault := check.machine("decoding an image", e)):
        raise fault from None
    if not data.strip(b"\0"):
        return BadImage("empty", f"{len(data)} bytes" + (", all zero" if data else ""))
    if isinstance(e, Image.DecompressionBombError | Image.DecompressionBombWarning):
        return BadImage("too_large", detail)
    if isinstance(e, UnidentifiedImageError) and data.startswith(_MAGIC):
        return BadImage("truncated", f"{len(data)} bytes, a header cut short")
    if isinstance(e, UnidentifiedImageError):
        return BadImage("not_an_image", f"it begins with {data[:12]!r}")
    if "truncated" in str(e).lower() or isinstance(e, EOFError):
        return BadImage("truncated", detail)
    return BadImage("corrupt", detail)


class Picture:
    """An encoded image whose header was read: its size is known, its pixels are decoded when asked for.

    Raises: `BadImage`, at once for what the header tells and in `pixels` for the rest.
    """

    def __init__(self, data: bytes):
        self._data = data
        self._image, self._turn = None, 1  # Pillow's, opened where libjpeg-turbo alone will not do
        if (size := _plain_jpeg(data)) is None:
            self._open()
        else:
            self.size = size

    def _open(self) -> Image.Image:
        try:
            self._image = Image.open(io.BytesIO(self._data), formats=FORMATS)
            width, height = self._image.size
            if width * height > MAX_PIXELS:
                raise BadImage("too_large", f"{width}×{height} pixels, more than {MAX_PIXELS}")
            self._turn = self._image.getexif().get(_ORIENTATION, 1)
        except Exception as e:
            raise _bad(e, self._data) from e
        self.size = (width, height) if self._turn in (5, 6, 7, 8) else (height, width)
        return self._image

    def pixels(self, shrink: int = 1) -> tuple[np.ndarray, int]:
        """Returns u8[⌈H/s⌉, ⌈W/s⌉, 3] and s: alpha on white, EXIF rotation applied.

        s is `shrink` (1, 2, 4 or 8) where the format can be decoded at that fraction of its size
        for less work (JPEG's inverse DCT of fewer coefficients), and 1 for all else.
        """
        image = self._image
        if image is None or (
            image.format == "JPEG" and image.mode in ("RGB", "L") and self._turn == 1
        ):
            try:
                return self._jpeg(shrink), shrink
            except ValueError:
                pass  # what libjpeg warns of; Pillow reads on where it can, and says why not
        image = image or self._open()
        try:
            if self._turn not in (0, 1):
                image = ImageOps.exif_transpose(image)
            return np.array(_to_rgb(image)), 1
        except Exception as e:
            raise _bad(e, self._data) from e

    def _jpeg(self, shrink: int) -> np.ndarray:
        height, width = (-(-side // shrink) for side in self.size)
        out = simplejpeg.decode_jpeg(self._data, "RGB", min_height=height, min_width=width)
        if out.shape[:2] != (height, width):
            raise ValueError(f"decoded to {out.shape}, expected {height}×{width}")
        return out


def _plain_jpeg(data: bytes) -> tuple[int, int] | None:
    """Returns (height, width) of a JPEG without EXIF, in colours that libjpeg-turbo knows; else None."""
    if data[:3] != b"\xff\xd8\xff":
        return None
    at = 2
    while data[at : at + 2] != b"\xff\xda":  # the pixels begin
        marker, length = data[at : at + 2], int.from_bytes(data[at + 2 : at + 4], "big")
        is_exif = marker == b"\xff\xe1" and data[at + 4 : at + 8] == b"Exif"
        if marker[:1] != b"\xff" or length < 2 or is_exif:
            return None
        at += 2 + length
    try:
        height, width, colors, _ = simplejpeg.decode_jpeg_header(data)
        height, width = int(height), int(width)
    except ValueError:
        return None
    good = colors in ("YCbCr", "RGB", "Gray") and height * width <= MAX_PIXELS
    return (height, width) if good else None


def decode(data: bytes) -> np.ndarray:
    """Returns u8[H, W, 3] of any file of `FORMATS`, alpha on white, EXIF rotation applied.

    Raises: `BadImage` for truncated, foreign or oversized files.
    """
    return Picture(data).pixels()[0]


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
    image: np.ndarray | Picture,
    size_px: int,
    rng: np.random.Generator,
    *,
    min_area_frac: float = 1.0,
    max_area_frac: float = 1.0,
    max_aspect: float = 1.0,
    translate_frac: float = 0.0,
    flip: bool = False,
    jitter: float = 0.0,
    randaugment: int = 0,
    magnitude: float = 0.0,
    resize: str = "bicubic",
    out: np.ndarray | None = None,
) -> np.ndarray:
    """Returns u8[size_px, size_px, 3], in `out` if given: a random resized crop, changed and mirrored.

    The crop covers a uniform share of the area with a log-uniform aspect ratio in [1/max_aspect,
    max_aspect] (Szegedy et al. 2015, arXiv:1409.4842, §6). `translate_frac` first adds a white
    border of that share of the shorter side, so that the crop may also look past the edge. `jitter`
    is the largest relative change of brightness, contrast and saturation; `randaugment` so many
    operations follow (randaugment.py). A `Picture` is decoded at the smallest power-of-two fraction
    at which the crop has 1.25 times `size_px` pixels a side. With resize="fast" the crop is made of
    whole pixels of what was decoded.
    """
    # always eight, so that switching one option on leaves the others' draws alone
    draws = rng.random(8)
    if translate_frac:
        image = _pixels(image)
        image = _bordered(image, round(translate_frac * min(image.shape[:2])))
    box, shrink = train_box(
        image.size if isinstance(image, Picture) else image.shape[:2],
        size_px,
        draws,
        min_area_frac=min_area_frac,
        max_area_frac=max_area_frac,
        max_aspect=max_aspect,
    )
    if isinstance(image, Picture):
        image, shrink = image.pixels(shrink)
        box = tuple(edge / shrink for edge in box)
    small_RRC = _resized(image, size_px, box, resize, out)
    if jitter:
        changes = 1 + jitter * (2 * draws[5:8] - 1)
        small_RRC = np.asarray(_jittered(Image.fromarray(small_RRC), *changes))
    if randaugment:
        small_RRC = randaugment_lib.apply(small_RRC, rng, randaugment, magnitude)
    if flip and draws[4] < 0.5:
        small_RRC = small_RRC[:, ::-1]
    return small_RRC if out is None or small_RRC is out else _put(small_RRC, out)


def train_box(
    size: tuple[int, ...],
    size_px: int,
    draws: np.ndarray,
    *,
    min_area_frac: float = 1.0,
    max_area_frac: float = 1.0,
    max_aspect: float = 1.0,
) -> tuple[tuple[float, float, float, float], int]:
    """Returns the crop (left, top, right, bottom) that four draws choose in an image of (height,
    width), and the fraction 1/1 … 1/8 at which it may be decoded."""
    height, width = size
    area = (min_area_frac + draws[0] * (max_area_frac - min_area_frac)) * height * width
    aspect = max_aspect ** (2 * draws[1] - 1)
    crop_w = min(width, (area * aspect) ** 0.5)
    crop_h = min(height, (area / aspect) ** 0.5)
    if max_aspect == 1.0:
        crop_w = crop_h = min(crop_w, crop_h)
    left, top = draws[2] * (width - crop_w), draws[3] * (height - crop_h)
    fits = [s for s in (8, 4, 2) if min(crop_w, crop_h) >= _MARGIN * s * size_px]
    return (left, top, left + crop_w, top + crop_h), fits[0] if fits else 1


def eval_image(
    image: np.ndarray | Picture,
    size_px: int,
    *,
    resize: str = "bicubic",
    out: np.ndarray | None = None,
) -> np.ndarray:
    """Returns u8[size_px, size_px, 3]: the centre square of the whole image, resized in one step."""
    image = _pixels(image)
    height, width = image.shape[:2]
    if height == width == size_px:  # equal size: bit for bit
        return image if out is None else _put(image, out)
    side = min(height, width)
    left, top = (width - side) / 2, (height - side) / 2
    return _resized(image, size_px, (left, top, left + side, top + side), resize, out)


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
    cv2.setNumThreads(1)  # the loader has threads of its own
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
