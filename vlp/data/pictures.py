"""Image files: encoded bytes → u8[H, W, 3]. Not here: crops and augmentation (image_ops.py)."""

import io
import struct

import numpy as np
import simplejpeg
from PIL import Image, UnidentifiedImageError

from vlp.core import check
from vlp.data import image_files

Image.init()  # loads all of Pillow's plugins, so that Image.OPEN is complete
_WANTED = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF")
FORMATS = tuple(f for f in _WANTED if f in Image.OPEN)  # none that runs another program (EPS)
MAX_PIXELS = 89_478_485  # Pillow's own limit (268 MB decoded): larger files are taken for bombs
REASONS = (
    *("missing", "outside", "empty", "not_an_image", "unsupported"),
    *("too_large", "truncated", "corrupt", "value_range"),
)
# in what decoders say of files that end too early, and of what they cannot decode
_CUT = ("truncated", "chunk b''", "not enough", "unexpected end")
_UNKNOWN = ("unknown pixel mode", "cannot handle", "support", "unrecognized", "conversion")
_LEVELS = np.round(np.arange(1 << 16) * (255 / 65535)).astype(np.uint8)  # 16 bits → 8
_ROWS = 64  # of a picture that are scaled at a time, so that the floats take little memory


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
    if isinstance(e, UnidentifiedImageError):
        return _unread(data)
    if isinstance(e, Image.DecompressionBombError | Image.DecompressionBombWarning):
        return BadImage("too_large", detail)
    said = str(e).lower()
    short = isinstance(e.__cause__ or e, EOFError | IndexError | struct.error)
    if short or any(x in said for x in _CUT):
        return BadImage("truncated", detail)
    return BadImage("unsupported" if any(x in said for x in _UNKNOWN) else "corrupt", detail)


def _unread(data: bytes) -> BadImage:
    """Asks the decoder that the first bytes name why it cannot read the file: `Image.open` does not tell."""
    for name in FORMATS:
        make, accepts = Image.OPEN[name]
        found = accepts(data[:16]) if accepts else False
        if isinstance(found, str):
            return BadImage("unsupported", found)
        if found:
            try:
                make(io.BytesIO(image_files.without_metadata(data)[0]), "")
            except Exception as e:
                return _bad(e, data)
    return BadImage("not_an_image", f"it begins with {data[:12]!r}")


class Picture:
    """An encoded image whose header was read: its size is known, its pixels are decoded when asked for.

    `size` is (height, width) of the picture as it is shown, that is of `pixels()`; `format` one of
    `FORMATS`.
    Raises: `BadImage`, at once for what the header tells and in `pixels` for the rest.
    """

    def __init__(self, data: bytes):
        self._data = data
        self._image = None  # Pillow's, opened where libjpeg-turbo alone will not do
        self._decoded: dict[int, tuple[np.ndarray, int]] = {}  # by `shrink`
        self.format, stored = "JPEG", None
        if data.startswith(image_files.JPEG):
            stored, self._orientation = _jpeg_size(data), image_files.jpeg(data)[1]
        if stored is None:
            stored = self._open()
        self.size = stored if self._orientation < 5 else stored[::-1]

    def _open(self) -> tuple[int, int]:
        """Opens the file with Pillow; returns (height, width) as stored."""
        try:
            plain, self._orientation = image_files.without_metadata(self._data)
            self._image = Image.open(io.BytesIO(plain), formats=FORMATS)
            self.format = self._image.format or "unknown"
            if self.format == "AVIF":  # what its transforms say, in Pillow's words
                exif = self._image.info.get("exif", b"")
                self._orientation = image_files.exif_orientation(exif)
            width, height = self._image.size
            if width * height > MAX_PIXELS:
                raise BadImage("too_large", f"{width}×{height} pixels, more than {MAX_PIXELS}")
        except Exception as e:
            raise _bad(e, self._data) from e
        return height, width

    def pixels(self, shrink: int = 1) -> tuple[np.ndarray, int]:
        """Returns u8[⌈H/s⌉, ⌈W/s⌉, 3] and s: alpha on white, turned as the orientation says. Do not write into it.

        s is at most `shrink` (1, 2, 4 or 8): as far as the format can be decoded at that fraction
        of its size for less work (JPEG's inverse DCT of fewer coefficients). Decodes once for each `shrink`.
        """
        if shrink not in self._decoded:
            self._decoded[shrink] = self._pixels(shrink)
        return self._decoded[shrink]

    def _pixels(self, shrink: int) -> tuple[np.ndarray, int]:
        if self._image is None:
            flips = _FLIPS[self._orientation - 1]
            while any(f and side % shrink for f, side in zip(flips, self.size)):
                shrink //= 2  # else the incomplete pixels of the last column would come first
            try:
                return _turned(self._jpeg(shrink), self._orientation), shrink
            except ValueError:  # what libjpeg warns of
                self._open()  # Pillow reads on where it can, and says why not
        try:
            assert self._image is not None
            out = _turned(_to_rgb(self._image), self._orientation)
        except Exception as e:
            raise _bad(e, self._data) from e
        if out.shape[:2] != self.size:
            found = f"pixels of {out.shape[:2]}, a header of {self.size}"
            raise BadImage("corrupt", found)
        return out, 1

    def _jpeg(self, shrink: int) -> np.ndarray:
        stored = self.size if self._orientation < 5 else self.size[::-1]
        height, width = (-(-side // shrink) for side in stored)
        out = simplejpeg.decode_jpeg(self._data, "RGB", min_height=height, min_width=width)
        if out.shape[:2] != (height, width):
            raise ValueError(f"decoded to {out.shape}, expected {height}×{width}")
        return out


def _jpeg_size(data: bytes) -> tuple[int, int] | None:
    """Returns (height, width) of a JPEG in colours that libjpeg-turbo knows; else None."""
    try:
        height, width, colors, _ = simplejpeg.decode_jpeg_header(data)
    except ValueError:
        return None
    height, width = int(height), int(width)
    good = colors in ("YCbCr", "RGB", "Gray") and height * width <= MAX_PIXELS
    return (height, width) if good else None


# orientation 1 … 8 → whether rows and columns come in reverse; from 5 on they were exchanged before
_FLIPS = (
    *((False, False), (False, True), (True, True), (True, False)),
    *((False, False), (False, True), (True, True), (True, False)),
)


def _turned(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """Returns the stored u8[H, W, 3] as it is shown (EXIF 2.3, tag 274)."""
    if orientation == 1:
        return pixels
    rows, columns = (slice(None, None, -1 if flip else 1) for flip in _FLIPS[orientation - 1])
    pixels = pixels.transpose(1, 0, 2) if orientation >= 5 else pixels
    return np.ascontiguousarray(pixels[rows, columns])


def decode(data: bytes) -> np.ndarray:
    """Returns u8[H, W, 3] of any file of `FORMATS`, alpha on white, turned as the orientation says.

    Raises: `BadImage` for truncated, foreign or oversized files.
    """
    return Picture(data).pixels()[0]


def _to_rgb(image: Image.Image) -> np.ndarray:
    if image.mode.startswith("I") or image.mode == "F":  # Pillow would clip it to 255
        return np.repeat(_grey(image)[..., None], 3, axis=2)
    if image.mode == "RGB" and "transparency" not in image.info:
        return np.array(image)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return np.array(Image.alpha_composite(white, image).convert("RGB"))
    return np.array(image.convert("RGB"))


def _grey(image: Image.Image) -> np.ndarray:
    """Returns u8[H, W] of a picture of one channel that has more than 8 bits.

    Integers of up to 16 bits are scaled from the range of their type. Those of 32 bits and floats
    have no range of their own: white is the first of 1 (floats), 255, 65535 and the type's largest
    (integers) of which the picture's maximum is at most 1.1, and, but for the first, at least 1/16.
    Values below black or above white are clipped.
    Raises: `BadImage` ("value_range") where no white fits, where values go below black by more than
    a tenth of white, and for NaN and infinity.
    """
    tags = getattr(image, "tag_v2", {})  # of TIFF: bits, photometric interpretation, format
    bits = tags.get(258, (16 if image.mode != "F" else 32,))[0]
    inverted, signed = tags.get(262) == 0, tags.get(339, (1,))[0] == 2
    grey_HW = np.asarray(image)
    if grey_HW.dtype == np.int32 and bits == 32 and not signed:
        grey_HW = grey_HW.view(np.uint32)  # as Pillow stores those
    out = np.empty(grey_HW.shape, np.uint8)
    if image.mode != "F" and bits <= 16:
        white = float(2 ** (bits - signed) - 1)
    else:
        white = _white(grey_HW)
    if grey_HW.min() < -white / 10:
        raise BadImage("value_range", f"values down to {grey_HW.min()}, expected 0 … {white:.0f}")
    for at in range(0, len(out), _ROWS):
        rows = grey_HW[at : at + _ROWS]
        if white == 65535 and rows.dtype.kind == "u":
            out[at : at + _ROWS] = _LEVELS[np.minimum(rows, 65535)]
        else:
            out[at : at + _ROWS] = np.round(rows.clip(0, white) * (255 / white))
    if inverted:
        np.subtract(255, out, out=out)
    if (hidden := image.info.get("transparency")) is not None:
        out[grey_HW == hidden] = 255
    return out


def _white(grey_HW: np.ndarray) -> float:
    """The value that is white in a picture of a type without a range (see `_grey`)."""
    is_float = grey_HW.dtype.kind == "f"
    most = float(grey_HW.max())
    whites = (1.0, 255.0, 65535.0) if is_float else (255.0, 65535.0, np.iinfo(grey_HW.dtype).max)
    if not np.isfinite(most) or not np.isfinite(grey_HW.min()):
        raise BadImage("value_range", "NaN or infinity among the values")
    for i, white in enumerate(whites):
        if most <= 1.1 * white and (i == 0 or most >= white / 16):
            return float(white)
    raise BadImage("value_range", f"values up to {most:g}, expected up to one of {whites}")
