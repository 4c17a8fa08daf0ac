"""Smaller copies of images that are larger than training needs."""

import io

from PIL import Image

from vlp.data import pictures

JPEG_QUALITY = 95  # of the copies (4:2:0)
_JPEG_SIDE = 65_500  # libjpeg's limit


def shrunk(data: bytes, max_px: int) -> bytes | None:
    """Returns a JPEG of an image whose shorter side is `max_px`, or None where the image should stay as it is.

    The filter is Lanczos'. Alpha, deep and animated images become what `pictures.decode` makes of them.

    Args:
        data: an encoded image.
        max_px: the shorter side of the copy, in pixels.

    Returns:
        None if the shorter side is `max_px` or less, or if the longer one would still exceed what a JPEG can hold.

    Raises:
        BadImage: the header or, of a larger image, the pixels cannot be read.
    """
    picture = pictures.Picture(data)
    if min(picture.size) <= max_px:
        return None
    scale = max_px / min(picture.size)
    height, width = (max(max_px, round(side * scale)) for side in picture.size)
    if max(height, width) > _JPEG_SIDE:
        return None
    image, out = Image.fromarray(picture.pixels()[0]), io.BytesIO()
    image.resize((width, height), Image.Resampling.LANCZOS).save(out, "JPEG", quality=JPEG_QUALITY)
    return out.getvalue()
