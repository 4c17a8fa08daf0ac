"""Metadata costs no picture and turns none twice: the same pixels whatever stands beside them, in every format."""

import io
import json
import struct
import zlib

import numpy as np
import pytest
import test_cli_data
from PIL import Image, ImageFile, ImageOps, PngImagePlugin, TiffImagePlugin

from helpers import formats
from vlp.data import image_files, image_ops, pictures

HEIGHT, WIDTH = 40, 96
_x, _y = np.arange(WIDTH) / WIDTH, np.arange(HEIGHT)[:, None] / HEIGHT
SMOOTH = np.stack([255 * (_x + 0 * _y), 255 * (_y + 0 * _x), 127 * (_x + _y)], -1).astype(np.uint8)
PICTURE = Image.fromarray(SMOOTH)
LOSSY = {"JPEG": 12, "AVIF": 12}  # the largest difference, of 255


def encoded(image, kind, **options):
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def turned(orientation, kind, **options):
    """The picture, stored so that the orientation shows it upright, by Pillow's own operations."""
    back = (None, 0, 3, 1, 5, 2, 6, 4)[orientation - 1]
    stored = PICTURE if back is None else PICTURE.transpose(Image.Transpose(back))
    exif = Image.Exif()
    exif[0x0112] = orientation
    lossless = {"lossless": True} if kind == "WEBP" else {"quality": 95} if kind in LOSSY else {}
    return encoded(stored, kind, exif=exif, **lossless, **options)


def check_same(data, kind="PNG", shown=SMOOTH):
    picture = pictures.Picture(data)
    pixels, shrink = picture.pixels()
    assert picture.size == pixels.shape[:2] == shown.shape[:2] and shrink == 1
    assert pixels.flags.writeable and pixels.flags.c_contiguous
    assert abs(pixels.astype(int) - shown).max() <= LOSSY.get(kind, 0)
    np.testing.assert_array_equal(pictures.decode(data), pixels)


def crops_agree(data):
    whole = pictures.decode(data)
    for seed in range(4):
        for resize in ("fast", "bicubic"):
            crop = lambda x, r=resize, s=seed: image_ops.train_image(
                x, 32, np.random.default_rng(s), min_area_frac=0.3, max_aspect=1.5, resize=r
            )
            np.testing.assert_array_equal(crop(pictures.Picture(data)), crop(whole))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF", "AVIF"])
def test_orientation_is_applied_once(kind, orientation):
    if kind not in pictures.FORMATS:
        pytest.skip(f"a Pillow without {kind}")
    data = turned(orientation, kind)
    check_same(data, kind)
    crops_agree(data)


@pytest.mark.parametrize("compression", ["tiff_lzw", "tiff_adobe_deflate", "packbits", "jpeg"])
@pytest.mark.parametrize("orientation", [3, 6])
def test_compressed_tiffs(compression, orientation):
    data = turned(orientation, "TIFF", compression=compression)
    check_same(data, "JPEG" if compression == "jpeg" else "TIFF")
    assert pictures.decode(data).shape == SMOOTH.shape


@pytest.mark.parametrize("byte_order", ["II", "MM"])
def test_big_tiffs_and_many_pages(byte_order):
    stored = PICTURE.transpose(Image.Transpose.ROTATE_90)
    head = {"II": b"II*\0\x08\0\0\0", "MM": b"MM\0*\0\0\0\x08"}[byte_order]
    tags = TiffImagePlugin.ImageFileDirectory_v2(head)
    tags[0x0112], tags[270] = 6, "a description " * 1000
    pages = {"save_all": True, "append_images": [Image.new("RGB", (9, 9))]}
    for more in ({}, pages, {"big_tiff": True}):
        check_same(encoded(stored, "TIFF", tiffinfo=tags, **more))


def test_a_turned_jpeg_is_decoded_scaled():
    """The scaled picture is the whole one's, also where its sides are no multiples of the fraction."""
    for width, height, fraction in ((640, 480, 4), (643, 483, 1), (643, 480, 4)):
        stored = Image.fromarray(SMOOTH).resize((width, height), Image.Resampling.BICUBIC)
        exif = Image.Exif()
        exif[0x0112] = 6  # stored rows become columns in reverse
        picture = pictures.Picture(encoded(stored, "JPEG", quality=95, exif=exif))
        small, shrink = picture.pixels(4)
        assert picture.size == (width, height) and shrink == fraction
        whole = Image.fromarray(picture.pixels()[0])
        size = (-(-height // shrink), -(-width // shrink))
        box = (0, 0, size[0] * shrink, size[1] * shrink)
        if shrink > 1 and box[3] == width:
            wanted = np.asarray(whole.resize(size, Image.Resampling.BOX, box=box)).astype(int)
            assert abs(small - wanted).mean() < 1


def exif_bytes(value=6, kind=3, count=1, order="<", offset=8, num=1):
    """An EXIF block whose only tag is the orientation."""
    head = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(order + "I", offset)
    entry = struct.pack(order + "HHI", 0x0112, kind, count)
    entry += struct.pack(order + {1: "Bxxx", 3: "Hxx"}.get(kind, "I"), value)
    return b"Exif\0\0" + head + struct.pack(order + "H", num) + entry + bytes(4)


ODD_EXIF = {  # bytes → the orientation that they tell
    "little": (exif_bytes(), 6),
    "big": (exif_bytes(order=">"), 6),
    "long": (exif_bytes(kind=4), 6),
    "byte": (exif_bytes(kind=1), 6),
    "zero": (exif_bytes(0), 1),
    "nine": (exif_bytes(9), 1),
    "text": (exif_bytes(kind=2), 1),
    "offset far away": (exif_bytes(offset=10**9), 1),
    "offset to itself": (exif_bytes(offset=0), 1),
    "many entries": (exif_bytes(num=60_000), 1),
    "cut": (exif_bytes()[:20], 1),
    "only the name": (b"Exif\0\0", 1),
    "no tiff": (b"Exif\0\0" + bytes(range(256)), 1),
    "huge": (exif_bytes() + bytes(60_000), 6),
}


def jpeg_with(*segments):
    data = encoded(PICTURE, "JPEG", quality=95)
    blocks = [b"\xff" + bytes([m]) + struct.pack(">H", len(b) + 2) + b for m, b in segments]
    return data[:2] + b"".join(blocks) + data[2:]


def chunk(name, body, crc=None):
    crc = zlib.crc32(name + body) if crc is None else crc
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", crc)


def png_with(*chunks, image=PICTURE, at=b"IDAT", **options):
    data = encoded(image, "PNG", **options)
    place = data.index(at) - 4
    return data[:place] + b"".join(chunks) + data[place:]


def webp_with(*chunks):
    """VP8X with all flags of metadata set, whether or not such a chunk is there."""
    inner = encoded(PICTURE, "WEBP", lossless=True)[12:]
    parts = [(b"VP8X", struct.pack("<I", 0x2C) + struct.pack("<I", WIDTH - 1)[:3]
              + struct.pack("<I", HEIGHT - 1)[:3])]  # fmt: skip
    pack = lambda n, b: n + struct.pack("<I", len(b)) + b + bytes(len(b) % 2)
    body = b"".join(pack(*p) for p in parts) + inner + b"".join(pack(*c) for c in chunks)
    return b"RIFF" + struct.pack("<I", 4 + len(body)) + b"WEBP" + body


@pytest.mark.parametrize("name", list(ODD_EXIF))
def test_odd_exif_costs_no_picture(name):
    exif, orientation = ODD_EXIF[name]
    shown = SMOOTH if orientation == 1 else np.rot90(SMOOTH, -1)
    check_same(jpeg_with((0xE1, exif)), "JPEG", shown)
    check_same(png_with(chunk(b"eXIf", exif[6:])), "PNG", shown)
    check_same(webp_with((b"EXIF", exif)), "WEBP", shown)
    check_same(webp_with((b"EXIF", exif[6:])), "WEBP", shown)
    cmyk = encoded(PICTURE.convert("CMYK"), "JPEG", quality=95)  # not libjpeg-turbo's
    block = b"\xff\xe1" + struct.pack(">H", len(exif) + 2) + exif
    picture = pictures.Picture(cmyk[:2] + block + cmyk[2:])
    assert picture.size == picture.pixels()[0].shape[:2] == shown.shape[:2]


def test_odd_exif_of_avif():
    if "AVIF" not in pictures.FORMATS:
        pytest.skip("a Pillow without AVIF")
    exif = Image.Exif()
    exif[0x0112], exif[270] = 6, "a description"
    stored = PICTURE.transpose(Image.Transpose.ROTATE_90)
    data = encoded(stored, "AVIF", exif=exif, quality=95)
    at = data.index(b"II*\0") if b"II*\0" in data else data.index(b"MM\0*")
    check_same(data[:at] + b"no EXIF " + data[at + 8 :], "AVIF")


JFIF_CUT = (0xE0, b"JFIF\0\1")
METADATA = {
    "comment": jpeg_with((0xFE, b"\xff" * 60_000)),
    "profile without a number": jpeg_with((0xE2, b"ICC_PROFILE\0")),
    "profile of other parts": jpeg_with((0xE2, b"ICC_PROFILE\0\7\7abc"), (0xE2, b"ICC_PROFILE\0\0\0")),
    "profile, long": jpeg_with(*((0xE2, b"ICC_PROFILE\0" + bytes([i, 40]) + bytes(60_000)) for i in range(40))),
    "photoshop": jpeg_with((0xED, b"Photoshop 3.0\0" + b"8BIM\3\xed\xff" + b"\xff" * 9)),
    "photoshop resolution": jpeg_with((0xED, b"Photoshop 3.0\0" + b"8BIM\3\xed\0\0\0\0\0\1x")),
    "JFIF cut": jpeg_with(JFIF_CUT),
    "adobe cut": jpeg_with((0xEE, b"Adobe\0")),
    "pictures": jpeg_with((0xE2, b"MPF\0II*\0\x08\0\0\0\xff\xff")),
    "flashpix, empty": jpeg_with((0xE2, b"FPXR\0"), (0xE5, b"")),
    "XMP that turns": jpeg_with((0xE1, b'http://ns.adobe.com/xap/1.0/\0<x tiff:Orientation="6"/>')),
}  # fmt: skip


@pytest.mark.parametrize("name", list(METADATA))
def test_broken_jpeg_metadata_costs_no_picture(name):
    check_same(METADATA[name], "JPEG")


def test_jpeg_segments_of_no_length_and_stray_bytes():
    data = encoded(PICTURE, "JPEG", quality=95)
    for stray in (b"\xff\xe5\0\0", b"\xff\xfe\0\1", b"\xff\xff\xff", b"\0\0\0\0", b"\xff\xe1\0\2"):
        check_same(data[:20] + stray + data[20:], "JPEG")  # behind JFIF's


def bad_png_metadata():
    text = PngImagePlugin.PngInfo()
    text.add_text("parameters", "x" * (2 << 20), zip=True)
    many = PngImagePlugin.PngInfo()
    for i in range(40):
        many.add_itxt(f"k{i}", "é" * (1 << 19), zip=True)
    late = encoded(PICTURE, "PNG")
    late = late[:-12] + chunk(b"tRNS", b"\0\0\0\0\0\0") + chunk(b"zTXt", b"k\0\0bad") + late[-12:]
    animated = chunk(b"acTL", b"\0\0\0\2\0\0\0\0")
    return {
        "long text": png_with(pnginfo=text),
        "much text": png_with(pnginfo=many),
        "long profile": png_with(icc_profile=bytes(2 << 20)),
        "text with a wrong CRC": png_with(chunk(b"tEXt", b"Comment\0hi", crc=1)),
        "profile of another method": png_with(chunk(b"iCCP", b"p\0\7xx")),
        "empty chunks": png_with(*(chunk(n, b"") for n in (b"iCCP", b"gAMA", b"cHRM", b"pHYs", b"sRGB"))),
        "text without a name": png_with(chunk(b"iTXt", b""), chunk(b"zTXt", b""), chunk(b"tEXt", b"")),
        "unknown compression": png_with(chunk(b"zTXt", b"k\0\5abc"), chunk(b"iTXt", b"k\0\1\7\0\0abc")),
        "transparency cut": png_with(chunk(b"tRNS", b"\0")),
        "transparency with a wrong CRC": png_with(chunk(b"tRNS", bytes(SMOOTH[0, 0, [0, 0, 1, 1, 2, 2]]), crc=5)),
        "chunks behind the pixels": late,
        "an animation's control": png_with(animated, chunk(b"fcTL", b"\0")),
        "a frame out of order": png_with(animated, chunk(b"fdAT", b"\0\0\0\7ab"), at=b"IEND"),
        "an orientation with a wrong CRC": png_with(chunk(b"eXIf", exif_bytes()[6:], crc=3)),
        "garbage behind the end": encoded(PICTURE, "PNG") + b"\0garbage" * 9,
    }  # fmt: skip


def test_broken_png_metadata_costs_no_picture():
    for name, data in bad_png_metadata().items():
        try:
            check_same(data)
        except pictures.BadImage as e:
            raise AssertionError(f"{name}: {e}") from e


def test_broken_webp_metadata_costs_no_picture():
    check_same(webp_with((b"ICCP", b""), (b"XMP ", b"\xff" * 9), (b"ABCD", b"own")))
    cut = webp_with((b"XMP ", bytes(999)))
    check_same(cut[:-500])
    gif = encoded(PICTURE.convert("P"), "GIF", comment=b"\0\xff" * 9999)
    assert pictures.decode(gif).shape == SMOOTH.shape


def test_broken_tiff_metadata_costs_no_picture(recwarn):
    """Tags that point outside of the file, of wrong types, private directories of garbage."""
    info = TiffImagePlugin.ImageFileDirectory_v2()
    info[270], info[34675], info[700] = "x" * 9, b"profile" * 9, b"xmp" * 9
    data = encoded(PICTURE, "TIFF", tiffinfo=info)
    order, _, entries = image_files._directory(data)
    for entry in entries:
        if (tag := int.from_bytes(entry[:2], order)) in (270, 34675, 700):
            for other in (struct.pack("<HHII", tag, 2, 10**9, 10**9), struct.pack("<HHII", tag, 99, 7, 7),
                          struct.pack("<HHII", 0x8769, 4, 1, 3), struct.pack("<HHII", 0x8825, 13, 1, 10**9),
                          struct.pack("<HHII", 330, 4, 99, 9)):  # fmt: skip
                check_same(data.replace(entry, other))
    at = data.index(b"".join(entries)) + 12 * len(entries)  # the next directory
    check_same(data[:at] + struct.pack("<I", 10**9) + data[at + 4 :])
    assert not recwarn.list


def test_inspect_and_filter_see_what_is_decoded(tmp_path, capsys):
    files = [*bad_png_metadata().values(), *METADATA.values()]
    pairs = [{"key": f"k{i}", "jpg": d, "caption": f"this is {i}"} for i, d in enumerate(files)]
    formats.tar(tmp_path / "a.tar", pairs)
    assert test_cli_data.run("inspect", tmp_path / "a.tar", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["shorter_side_px"][-1] == HEIGHT and "image header" not in str(found)
    loose = ("--min-side-px", 0, "--min-words", 1, "--out", tmp_path / "out")
    assert test_cli_data.run("filter", tmp_path / "a.tar", *loose) == 0
    assert f'"records_kept": {len(files)},' in capsys.readouterr().out


def test_metadata_takes_no_memory(monkeypatch):
    """Pillow's limits need not be raised: its handlers never see a text or a profile."""
    for name in ("chunk_zTXt", "chunk_iTXt", "chunk_tEXt", "chunk_iCCP", "chunk_eXIf"):
        monkeypatch.setattr(PngImagePlugin.PngStream, name, lambda *_: pytest.fail("read"))
    for data in bad_png_metadata().values():
        pictures.decode(data)
    assert not ImageFile.LOAD_TRUNCATED_IMAGES


def sixteen(values, byte_order="little"):
    return np.asarray(values, ">u2" if byte_order == "big" else "<u2")


def raw_png(depth, color, rows, *chunks):
    """A PNG of one colour type and depth from rows of packed bytes."""
    width = {1: 8, 2: 4, 4: 2, 8: 1, 16: 1}[depth]
    per = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[color] * max(depth, 8) // 8
    width = len(rows[0]) * width if depth < 8 else len(rows[0]) // per
    head = struct.pack(">IIBBBBB", width, len(rows), depth, color, 0, 0, 0)
    body = zlib.compress(b"".join(b"\0" + bytes(r) for r in rows))
    parts = (chunk(b"IHDR", head), *chunks, chunk(b"IDAT", body), chunk(b"IEND", b""))
    return image_files.PNG + b"".join(parts)


def test_pixels_of_every_png():
    """Grey and colour of 1 … 16 bits, with a transparent value and with alpha, by hand."""
    row = lambda data: pictures.decode(data)[0].tolist()
    grey = lambda *values: [[v] * 3 for v in values]
    key = lambda *values: chunk(b"tRNS", struct.pack(f">{len(values)}H", *values))
    assert row(raw_png(1, 0, [[0b01000000]]))[:3] == grey(0, 255, 0)
    assert row(raw_png(1, 0, [[0b01000000]], key(0)))[:3] == grey(255, 255, 255)
    assert row(raw_png(2, 0, [[0b00011011]])) == grey(0, 85, 170, 255)
    assert row(raw_png(2, 0, [[0b00011011]], key(1))) == grey(0, 255, 170, 255)
    assert row(raw_png(4, 0, [[0x3A]])) == grey(51, 170)
    assert row(raw_png(4, 0, [[0x3A]], key(3))) == grey(255, 170)
    assert row(raw_png(8, 0, [[7, 9]], key(7))) == grey(255, 9)
    assert row(raw_png(16, 0, [[0, 0, 128, 0, 255, 255]])) == grey(0, 128, 255)
    assert row(raw_png(16, 0, [[1, 2, 128, 0]], key(0x0102))) == grey(255, 128)
    assert row(raw_png(8, 4, [[9, 255, 9, 0]])) == grey(9, 255)
    assert row(raw_png(16, 4, [[9, 0, 255, 255, 9, 0, 0, 0]])) == grey(9, 255)
    assert row(raw_png(16, 2, [[9, 0, 8, 0, 7, 0]])) == [[9, 8, 7]]
    assert row(raw_png(16, 2, [[9, 0, 8, 0, 7, 0]], key(0x900, 0x800, 0x700))) == grey(255)
    palette = chunk(b"PLTE", bytes([1, 2, 3, 40, 50, 60]))
    assert row(raw_png(4, 3, [[0x01]], palette)) == [[1, 2, 3], [40, 50, 60]]
    alpha = chunk(b"tRNS", bytes([255, 0]))
    assert row(raw_png(4, 3, [[0x01]], palette, alpha)) == [[1, 2, 3], [255] * 3]


def tiff(values, **tags):
    """A TIFF of one channel, with these values as they are."""
    return encoded(Image.fromarray(values), "TIFF", **tags)


def test_tiffs_of_more_than_8_bits_keep_their_pixels():
    grey = np.linspace(0, 240, 64 * 9).reshape(9, 64)
    same = lambda values, wanted, within=0: np.testing.assert_allclose(
        pictures.decode(tiff(values))[..., 0], wanted, atol=within
    )
    rounded = np.round(grey)
    same(rounded.astype(np.int32), rounded)
    same(rounded.astype(np.float32), rounded)
    same((rounded * 257).astype(np.uint16), rounded)
    same((rounded * 257).astype(np.int32), rounded)
    same((rounded * 257).astype(np.float32), rounded)
    same((grey * (2**31 - 1) / 255).astype(np.int32), rounded, 1)
    same((grey / 255).astype(np.float32), rounded, 1)
    over = (grey / 255).astype(np.float32)  # as sharpening leaves it
    over[0, 0], over[0, 1] = -0.02, 1.05
    assert pictures.decode(tiff(over))[0, :2, 0].tolist() == [0, 255]
    dark = np.full((4, 4), 0.001, np.float32)
    assert pictures.decode(tiff(dark)).max() == 0


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda g: np.where(g == 0, np.nan, g / 255), "NaN or infinity"),
        (lambda g: np.where(g == 0, np.inf, g), "NaN or infinity"),
        (lambda g: np.where(g == 0, -np.inf, g), "NaN or infinity"),
        (lambda g: g / 10 - 30, "values down to -30"),
        (lambda g: g / 127.5 - 1, "values down to -1"),
        (lambda g: g * 1e9, "values up to 2.4e"),
        (lambda g: g / 60, "values up to 4"),
    ],
)
def test_values_without_a_range_are_refused(spoil, said):
    grey = np.linspace(0, 240, 64 * 9, dtype=np.float32).reshape(9, 64)
    with pytest.raises(pictures.BadImage, match=said) as e:
        pictures.decode(tiff(spoil(grey).astype(np.float32)))
    assert e.value.reason == "value_range" and e.value.reason in pictures.REASONS


def test_the_reason_of_what_no_decoder_takes():
    """Neither "truncated" nor "not an image": a TIFF of complex numbers."""
    data = tiff(np.zeros((4, 4), np.float32))
    order, _, entries = image_files._directory(data)
    for entry in entries:
        if int.from_bytes(entry[:2], order) == 339:
            data = data.replace(entry, struct.pack("<HHII", 339, 3, 1, 6))
    with pytest.raises(pictures.BadImage, match="unknown pixel mode") as e:
        pictures.decode(data)
    assert e.value.reason == "unsupported"


def test_sixteen_bits_take_little_memory():
    import tracemalloc

    data = tiff(np.full((1500, 1500), 30_000, np.uint16), compression="tiff_lzw")
    picture = pictures.Picture(data)
    tracemalloc.start()
    picture.pixels()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 10 * 1500 * 1500  # the values, and 3 bytes a pixel of the result


def test_white_is_zero():
    """TIFF's other way to store grey, which Pillow heeds for 8 bits only."""
    for values in (np.array([[0, 65535, 257]], np.uint16), np.array([[0, 255, 1]], np.uint8)):
        data = tiff(values)
        order, _, entries = image_files._directory(data)
        for entry in entries:
            if int.from_bytes(entry[:2], order) == 262:
                data = data.replace(entry, struct.pack("<HHII", 262, 3, 1, 0))
        assert pictures.decode(data)[0, :, 0].tolist() == [255, 0, 254]


def test_pillows_own_turn_is_the_same():
    """Against ImageOps.exif_transpose, for files that Pillow does not turn by itself."""
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = orientation
        data = encoded(PICTURE, "PNG", exif=exif)
        wanted = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
        np.testing.assert_array_equal(pictures.decode(data), np.asarray(wanted))
