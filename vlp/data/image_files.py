"""Image files as containers: the orientation as a number, and the file without its metadata.

Decoders disagree about metadata: some turn the pixels by themselves, some refuse a picture for a
broken comment. So they are given files without any, and the orientation that is read here is applied
once, by image_ops.py. Orientation comes from EXIF (JPEG; PNG, its text chunks too; WebP), the directory (TIFF) or the
transforms of the primary item (AVIF, by its decoder); never from XMP. Colour profiles are dropped:
values are taken as sRGB. Nothing here raises: what cannot be parsed is handed on as it is, with
orientation 1. Not here: pixels.
"""

import re
import zlib

JPEG, PNG, TIFF = b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
ORIENTATION = 0x0112  # of TIFF and EXIF
_EXIF = b"Exif\0\0"
# tags that a TIFF decoder needs to find and read the pixels (TIFF 6.0, §8 … §22, libtiff's tags.h)
_TIFF_TAGS = frozenset(
    (254, 255, 256, 257, 258, 259, 262, 266, 273, 277, 278, 279, 284, 292, 293, 317, 320, 322)
    + (323, 324, 325, 332, 338, 339, 340, 341, 347, 512, 513, 514, 515, 517, 518, 519, 520, 521)
    + (529, 530, 531, 532, 32997, 50674)
)
# the types of a directory's entry that are whole numbers: BYTE, SHORT, LONG → their bytes
_WHOLE = {1: 1, 3: 2, 4: 4}
# an item of HEIF of the type Exif: infe's version, flags, the item's id, its protection
_EXIF_ITEM = re.compile(rb"(infe(?:\x02.{7}|\x03.{9}))Exif", re.DOTALL)


def without_metadata(data: bytes) -> tuple[bytes, int]:
    """Returns the file without its metadata, and its orientation: 1 … 8 as in EXIF."""
    if data.startswith(JPEG):
        spans, orientation = jpeg(data)
        return b"".join([data[:2], *(data[i:k] for i, k in spans)]), orientation
    if data.startswith(PNG):
        return _png(data)
    if data.startswith(TIFF):
        return _tiff(data), exif_orientation(data)
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return _webp(data)
    return (_avif(data) if data[4:8] == b"ftyp" else data), 1


def jpeg(data: bytes) -> tuple[list[tuple[int, int]], int]:
    """Returns the (begin, end) of each segment behind the first marker that is no metadata, and the orientation.

    The last one begins with the first scan. Of the application segments only JFIF's and Adobe's
    are kept, as libjpeg decides the colours by them.
    """
    spans, orientation, at = [], 0, 2
    while at + 4 <= len(data):
        marker = data[at + 1]
        if data[at] != 0xFF or marker == 0xFF:  # stray bytes and fill bytes
            at = found if (found := data.find(b"\xff", at + 1)) > 0 else len(data)
            continue
        if marker <= 0x01 or 0xD0 <= marker <= 0xD8:  # markers without a segment
            at += 2
            continue
        if marker in (0xD9, 0xDA):  # the end, the pixels
            break
        end = at + 2 + max(2, data[at + 2] << 8 | data[at + 3])
        if marker == 0xE1 and not orientation and data[at + 4 : at + 9] == b"Exif\0":
            orientation = exif_orientation(data[at + 10 : end])
        kept = not (0xE0 <= marker <= 0xEF or marker == 0xFE)
        kept |= marker == 0xE0 and data[at + 4 : at + 9] == b"JFIF\0" and end - at >= 18
        kept |= marker == 0xEE and data[at + 4 : at + 9] == b"Adobe" and end - at >= 16
        if kept:
            spans.append((at, end))
        at = end
    return [*spans, (at, len(data))], orientation or 1


def exif_orientation(data: bytes) -> int:
    """Returns the orientation, 1 … 8, in EXIF's bytes or a TIFF file; 1 if there is no valid one."""
    order, _, entries = _directory(data.removeprefix(_EXIF))
    for entry in entries:
        if int.from_bytes(entry[:2], order) == ORIENTATION:
            size = _WHOLE.get(int.from_bytes(entry[2:4], order), 0)
            at = len(entry) // 2 + 2  # behind tag, type and count: 8 of 12 bytes, 12 of 20
            value = int.from_bytes(entry[at : at + size], order)
            return value if 1 <= value <= 8 else 1
    return 1


def _directory(data: bytes):
    """Byte order, size of an offset (4, or 8 in a BigTIFF) and entries of the first directory; none if cut short."""
    order = "big" if data[:2] == b"MM" else "little"
    wide = 8 if int.from_bytes(data[2:4], order) == 43 else 4
    if not data.startswith(TIFF):
        return order, wide, []
    at = int.from_bytes(data[wide : 2 * wide], order)
    behind = at + (8 if wide == 8 else 2)
    size = 20 if wide == 8 else 12
    num = int.from_bytes(data[at:behind], order)
    if at < 2 * wide or behind + num * size > len(data):
        return order, wide, []
    return order, wide, [data[behind + i * size : behind + (i + 1) * size] for i in range(num)]


def _tiff(data: bytes) -> bytes:
    """The file with a directory of the needed tags only, at its end; offsets stay right."""
    order, wide, entries = _directory(data)
    kept = [e for e in entries if int.from_bytes(e[:2], order) in _TIFF_TAGS]
    if not kept:
        return data
    data += bytes(-len(data) % wide)
    num = len(kept).to_bytes(8 if wide == 8 else 2, order)
    head = data[:wide] + len(data).to_bytes(wide, order)
    return b"".join([head, data[2 * wide :], num, *kept, bytes(wide)])


def _png(data: bytes) -> tuple[bytes, int]:
    """Keeps the critical chunks and transparency: of an animation, its default image."""
    out, orientation, in_text, at = [PNG], 0, 0, len(PNG)
    depth, color, pixels = data[24:25], data[25:26], False
    while at + 8 <= len(data):
        name = data[at + 4 : at + 8]
        end = at + 12 + int.from_bytes(data[at : at + 4], "big")
        if not name.isalpha():  # a chunk of a wrong length before it: the decoder will say so
            out.append(data[at:])
            break
        if name[:1].isupper():
            pixels |= name == b"IDAT"
            out.append(data[at:end])
        elif name in (b"eXIf", b"tRNS", b"tEXt", b"zTXt"):
            body, crc = data[at + 8 : end - 4], int.from_bytes(data[end - 4 : end], "big")
            good = end <= len(data) and crc == zlib.crc32(name + body)
            if good and name == b"eXIf":
                orientation = exif_orientation(body)
            elif good and name in (b"tEXt", b"zTXt"):  # eXIf, if there is one, is the newer word
                in_text = in_text or _text_orientation(name, body)
            elif good and not pixels and (body := _transparency(body, depth, color)):
                out += [len(body).to_bytes(4, "big"), name, body]
                out.append(zlib.crc32(name + body).to_bytes(4, "big"))
        at = end
        if name == b"IEND":
            break
    return b"".join(out), orientation or in_text or 1


def _text_orientation(name: bytes, body: bytes) -> int:
    """The orientation in EXIF that ImageMagick wrote as text ("Raw profile type exif" or "APP1"); 0 if none."""
    keyword, _, text = body.partition(b"\0")
    if keyword not in (b"Raw profile type exif", b"Raw profile type APP1"):
        return 0
    try:
        if name == b"zTXt":  # a byte that says how it is compressed
            text = zlib.decompressobj().decompress(text[1:], 2**20)
        profile = bytes.fromhex(b"".join(text.split()[2:]).decode())  # behind its type and length
    except (zlib.error, ValueError):
        return 0
    return exif_orientation(profile)


def _transparency(body: bytes, depth: bytes, color: bytes) -> bytes:
    """The chunk tRNS as Pillow applies it, to values of 8 bits (16 of 16-bit grey); b"" if it is invalid."""
    if color == b"\3":
        return body[:256]
    num = {b"\0": 2, b"\2": 6}.get(color, 0)
    values = [int.from_bytes(body[i : i + 2], "big") for i in range(0, num, 2)]
    if not num or len(body) < num:
        return b""
    top = (1 << depth[0]) - 1
    values = [v & top for v in values]
    if depth in (b"\2", b"\4"):
        values = [v * 255 // top for v in values]
    elif depth == b"\x10" and color == b"\2":
        values = [v >> 8 for v in values]
    return b"".join(v.to_bytes(2, "big") for v in values)


def _webp(data: bytes) -> tuple[bytes, int]:
    out, orientation, at = [], 1, 12
    stop = min(len(data), 8 + int.from_bytes(data[4:8], "little"))
    while at + 8 <= stop:
        name, size = data[at : at + 4], int.from_bytes(data[at + 4 : at + 8], "little")
        end = at + 8 + size + size % 2
        if name == b"EXIF":
            orientation = exif_orientation(data[at + 8 : end])
        elif name == b"VP8X" and size >= 1:  # less the flags of what is left out
            out.append(data[at : at + 8] + bytes([data[at + 8] & ~0x2C]) + data[at + 9 : end])
        elif name not in (b"ICCP", b"XMP "):
            out.append(data[at:end])
        at = end
    body = b"".join(out)
    return b"RIFF" + (4 + len(body)).to_bytes(4, "little") + b"WEBP" + body, orientation


def _avif(data: bytes) -> bytes:
    """Changes the type of the EXIF item to an unknown one, so that decoders skip it."""
    at = 0
    while at + 8 <= len(data):
        size = int.from_bytes(data[at : at + 4], "big")
        if data[at + 4 : at + 8] == b"meta":
            meta = _EXIF_ITEM.sub(rb"\1none", data[at : at + size])
            return b"".join([data[:at], meta, data[at + size :]])
        if size < 8:
            break
        at += size
    return data
