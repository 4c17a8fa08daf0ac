"""The image zoo decodes to what a viewer shows; the geometry is exact where it can be."""

import io

import numpy as np
import pytest
from PIL import Image

from vlp.data import image_ops, order, pictures, randaugment

RAMP = np.linspace(0, 255, 12 * 16 * 3).reshape(12, 16, 3).astype(np.uint8)


def encoded(image: Image.Image, kind: str = "PNG", **kw) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **kw)
    return out.getvalue()


def test_plain_rgb_is_exact():
    out = pictures.decode(encoded(Image.fromarray(RAMP)))
    assert out.dtype == np.uint8 and out.flags.writeable
    np.testing.assert_array_equal(out, RAMP)


def test_grey_and_one_bit():
    grey = Image.fromarray(RAMP[..., 0])
    np.testing.assert_array_equal(pictures.decode(encoded(grey))[..., 1], RAMP[..., 0])
    assert set(np.unique(pictures.decode(encoded(grey.convert("1"))))) <= {0, 255}


def test_palette_with_and_without_transparency():
    image = Image.new("P", (4, 4), 0)
    image.putpalette([10, 20, 30, 200, 100, 50])
    image.putpixel((1, 0), 1)
    out = pictures.decode(encoded(image))
    assert out[0, 0].tolist() == [10, 20, 30] and out[0, 1].tolist() == [200, 100, 50]
    out = pictures.decode(encoded(image, transparency=0))
    assert out[0, 0].tolist() == [255, 255, 255] and out[0, 1].tolist() == [200, 100, 50]


def test_alpha_is_composited_on_white():
    image = Image.new("RGBA", (3, 1), (255, 0, 0, 255))
    image.putpixel((1, 0), (255, 0, 0, 0))
    image.putpixel((2, 0), (0, 0, 0, 128))
    out = pictures.decode(encoded(image))
    assert out[0].tolist() == [[255, 0, 0], [255, 255, 255], [127, 127, 127]]
    grey = Image.new("LA", (1, 1), (0, 0))
    assert pictures.decode(encoded(grey))[0, 0].tolist() == [255, 255, 255]
    keyed = encoded(Image.new("RGB", (2, 2), (1, 2, 3)), transparency=(1, 2, 3))
    assert pictures.decode(keyed)[0, 0].tolist() == [255, 255, 255]


def test_sixteen_bit_is_scaled_not_clipped():
    deep = Image.fromarray(np.array([[0, 257 * 100, 65535]], np.uint16))
    assert pictures.decode(encoded(deep))[0, :, 0].tolist() == [0, 100, 255]


def test_cmyk_jpegs_become_rgb():
    image = Image.new("CMYK", (16, 16), (0, 255, 255, 0))
    out = pictures.decode(encoded(image, "JPEG", quality=95))
    assert abs(out[8, 8].astype(int) - [255, 0, 0]).max() < 20


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_images_are_rotated_as_exif_says(kind):
    pixels = np.zeros((16, 32, 3), np.uint8)
    pixels[:, :16] = 255  # the left half is white
    exif = Image.Exif()
    exif[0x0112] = 6  # show rotated by 90° clockwise: left becomes top
    out = pictures.decode(encoded(Image.fromarray(pixels), kind, exif=exif))
    assert out.shape == (32, 16, 3) and out[4].mean() > 240 and out[28].mean() < 15


@pytest.mark.parametrize("data", [b"", b"<html>404</html>", encoded(Image.fromarray(RAMP))[:60]])
def test_bad_bytes_raise_one_kind_of_error(data):
    with pytest.raises(pictures.BadImage):
        pictures.decode(data)


def test_bombs_are_refused(monkeypatch):
    monkeypatch.setattr(pictures, "MAX_PIXELS", 100)
    with pytest.raises(pictures.BadImage, match="16×12 pixels"):
        pictures.decode(encoded(Image.fromarray(RAMP)))


def test_eval_takes_the_centre_square():
    image = np.zeros((20, 60, 3), np.uint8)
    image[:, 20:40] = 255
    assert (image_ops.eval_image(image, 20) == 255).all()
    assert (image_ops.eval_image(image.transpose(1, 0, 2), 10, resize="box") == 255).all()
    same = RAMP[:, :12]
    np.testing.assert_array_equal(image_ops.eval_image(same, 12), same)


def test_shrinking_is_antialiased():
    stripes = np.zeros((64, 64, 3), np.uint8)
    stripes[:, ::2] = 255
    for name in image_ops.FILTERS:
        inner = image_ops.eval_image(stripes, 8, resize=name)[:, 1:-1].astype(int)
        assert abs(inner - 127).max() <= 3, name


def test_without_options_train_is_eval():
    image = np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    out = image_ops.train_image(image, 32, order.sample_rng(0, "image", 0))
    np.testing.assert_array_equal(out, image_ops.eval_image(image, 32))


def test_crops_stay_within_their_area():
    """On an image whose pixels tell their place, the crop's sides can be read off the result."""
    place = np.zeros((256, 256, 3), np.uint8)
    place[..., 0], place[..., 1] = np.arange(256)[:, None], np.arange(256)[None]
    areas, aspects, corners = [], [], set()
    for p in range(200):
        out = image_ops.train_image(
            place,
            32,
            order.sample_rng(0, "i", p),
            min_area_frac=0.3,
            max_area_frac=0.7,
            max_aspect=1.5,
        ).astype(int)
        high, wide = np.ptp(out[..., 0]) * 32 / 31, np.ptp(out[..., 1]) * 32 / 31
        areas.append(high * wide / 256**2)
        corners.add((out[0, 0, 0] // 40, out[0, 0, 1] // 40))
        aspects.append(high / wide)
    assert 1 / 1.6 < min(aspects) < 0.75 and 1.35 < max(aspects) < 1.6
    assert 0.27 < min(areas) < 0.36 and 0.62 < max(areas) < 0.73 and len(corners) >= 6


def torchvision_crop(rng, height, width, areas, aspects):
    """torchvision's RandomResizedCrop.get_params: top, left, height, width, and whether ten tries failed."""
    for _ in range(10):
        area = height * width * rng.uniform(*areas)
        aspect = np.exp(rng.uniform(*np.log(aspects)))
        w, h = round((area * aspect) ** 0.5), round((area / aspect) ** 0.5)
        if 0 < w <= width and 0 < h <= height:
            return rng.integers(height - h + 1), rng.integers(width - w + 1), h, w, False
    w, h = width, height
    if width / height < aspects[0]:
        h = round(w / aspects[0])
    elif width / height > aspects[1]:
        w = round(h * aspects[1])
    return (height - h) // 2, (width - w) // 2, h, w, True


@pytest.mark.parametrize(
    ("size", "areas", "max_aspect"),
    [
        ((500, 1000), (0.6, 1.0), 1.25),
        ((1000, 500), (0.3, 0.9), 4 / 3),
        ((700, 700), (0.9, 1.0), 4 / 3),
        ((400, 1000), (0.08, 1.0), 4 / 3),
        ((900, 1000), (0.5, 0.7), 1.0),
    ],
)
def test_crops_are_drawn_as_in_torchvision(size, areas, max_aspect):
    """Quantiles of area, aspect ratio and place, of 3,000 crops each."""
    height, width = size
    ours, theirs, rng = [], [], np.random.default_rng(0)
    for p in range(3000):
        (left, top, right, bottom), _ = image_ops.train_box(
            size,
            32,
            order.sample_rng(0, "image", p).random(8),
            min_area_frac=areas[0],
            max_area_frac=areas[1],
            max_aspect=max_aspect,
        )
        assert 0 <= left < right <= width + 1e-6 and 0 <= top < bottom <= height + 1e-6
        ours.append((bottom - top, right - left, top, left))
        *box, failed = torchvision_crop(rng, height, width, areas, (1 / max_aspect, max_aspect))
        h, w = box[2:]
        place = (rng.uniform(0, height - h), rng.uniform(0, width - w)) if failed else box[:2]
        theirs.append((h, w, *place))  # a place is drawn in the end, too: ours differs in this
    ours, theirs = np.array(ours), np.array(theirs)
    share, wanted = (x[:, 0] * x[:, 1] / (height * width) for x in (ours, theirs))
    assert abs((share < areas[0] - 1e-6).mean() - (wanted < areas[0] - 0.002).mean()) < 0.02
    q = np.linspace(0.05, 0.95, 13)
    np.testing.assert_allclose(np.quantile(share, q), np.quantile(wanted, q), atol=0.025)
    log_aspect = [np.quantile(np.log(x[:, 1] / x[:, 0]), q) for x in (ours, theirs)]
    np.testing.assert_allclose(*log_aspect, atol=0.05)
    for axis, side in ((2, height), (3, width)):
        placed = [np.quantile(x[:, axis] / side, q) for x in (ours, theirs)]
        np.testing.assert_allclose(*placed, atol=0.035)


@pytest.mark.parametrize("size", [(500, 1000), (1000, 400), (640, 640), (37, 51)])
def test_the_drawn_share_is_honoured(size):
    """Never below the least where a crop of an allowed shape can have it; else the largest one."""
    for least, most, max_aspect in (
        (0.6, 1.0, 1.25),
        (0.1, 0.3, 1.5),
        (0.62, 0.624, 1.25),
        (1.0, 1.0, 1.0),
    ):
        height, width = size
        largest = min(width, height * max_aspect) * min(height, width * max_aspect)
        for p in range(300):
            draws = order.sample_rng(1, "image", p).random(8)
            options = dict(min_area_frac=least, max_area_frac=most, max_aspect=max_aspect)
            (left, top, right, bottom), _ = image_ops.train_box(size, 32, draws, **options)
            share = (right - left) * (bottom - top) / (height * width)
            possible = min(least, largest / (height * width))
            assert possible - 1e-9 <= share <= most + 1e-9
            assert 1 / max_aspect - 1e-9 <= (right - left) / (bottom - top) <= max_aspect + 1e-9


def test_new_tries_leave_the_other_draws_alone():
    """A wide picture, whose first draws fit for few samples: flips and operations are those of a square one's."""
    wide, square = photograph(40, 80), photograph(40, 40)
    drawn = lambda image, p, **k: image_ops.train_image(
        image, 16, order.sample_rng(0, "image", p), min_area_frac=0.6, max_aspect=1.25, **k
    )
    flips = lambda image: [
        not np.array_equal(drawn(image, p, flip=True), drawn(image, p)) for p in range(30)
    ]
    assert flips(wide) == flips(square)
    for p in range(30):
        rng = order.sample_rng(0, "image", p)
        image_ops.train_image(wide, 16, rng, min_area_frac=0.6, max_aspect=1.25)
        other = order.sample_rng(0, "image", p)
        other.random(8)
        assert rng.random() == other.random()
        np.testing.assert_array_equal(drawn(wide, p), drawn(wide, p))


def test_flip_is_a_mirror_half_the_time():
    image = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    outs = [
        image_ops.train_image(image, 16, order.sample_rng(0, "i", p), flip=True) for p in range(200)
    ]
    flipped = [np.array_equal(o, image[:, ::-1]) for o in outs]
    assert 70 < sum(flipped) < 130
    assert all(f or np.array_equal(o, image) for o, f in zip(outs, flipped, strict=True))


def test_translation_shows_a_white_border():
    black = np.zeros((32, 32, 3), np.uint8)
    outs = [
        image_ops.train_image(
            black, 32, order.sample_rng(0, "i", p), min_area_frac=0.5, translate_frac=0.2
        )
        for p in range(30)
    ]
    assert any(o[0].min() == 255 for o in outs) and any(o[:, -1].min() == 255 for o in outs)


def test_jitter_zero_brightness_means_the_same_picture():
    image = Image.fromarray(RAMP)
    same = np.asarray(image_ops._jittered(image, 1.0, 1.0, 1.0)).astype(int)
    assert abs(same - RAMP).max() <= 1
    darker = np.asarray(image_ops._jittered(image, 0.5, 1.0, 1.0)).astype(int)
    assert abs(darker - RAMP / 2).max() <= 1
    grey = np.asarray(image_ops._jittered(image, 1.0, 1.0, 0.0)).astype(int)
    assert np.ptp(grey, axis=-1).max() <= 1
    assert abs(grey[..., 0] - RAMP @ np.array(image_ops.LUMA)).max() <= 1
    flat = np.asarray(image_ops._jittered(image, 1.0, 0.0, 1.0)).astype(int)
    assert np.ptp(flat) <= 1
    outs = [
        image_ops.train_image(RAMP[:, :12], 12, order.sample_rng(0, "i", p), jitter=0.4)
        for p in (0, 1)
    ]
    assert (outs[0] != outs[1]).any()


def photograph(height, width, seed=0):
    """A field with a natural image's falling spectrum: amplitude 1 / f^1.4, correlated colours."""
    rng = np.random.default_rng(seed)
    f = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None])
    f[0, 0] = 1 / max(height, width)
    noise = rng.standard_normal((3, *f.shape)) + 1j * rng.standard_normal((3, *f.shape))
    x = np.fft.irfft2(noise / f**1.4, (height, width))
    x = x / x.std((1, 2), keepdims=True)
    rgb = np.stack([x[0] + 0.3 * x[1], x[0], x[0] + 0.3 * x[2]], -1) * 50 + 120
    return rgb.clip(0, 255).astype(np.uint8)


@pytest.mark.parametrize(
    ("height", "width"), [(375, 500), (600, 800), (768, 1024), (1601, 1203), (2300, 2100)]
)
@pytest.mark.parametrize("resize", ["fast", "bicubic"])
def test_scaled_decoding_is_close_to_pillows_bicubic(height, width, resize):
    """Random crops, at every fraction, against Pillow on the same crop of the whole image."""
    data = encoded(Image.fromarray(photograph(height, width)), "JPEG", quality=85)
    picture, whole = pictures.Picture(data), Image.open(io.BytesIO(data))
    assert picture.size == (height, width)
    out, seen = np.empty((224, 224, 3), np.uint8), set()
    for p in range(4):
        draws = order.sample_rng(0, "image", p).random(8)
        options = dict(min_area_frac=0.5, max_aspect=4 / 3)
        box, shrink = image_ops.train_box(picture.size, 224, draws, **options)
        seen.add(shrink)
        if resize == "fast":  # whole pixels of what is decoded
            box = [shrink * round(edge / shrink) for edge in box]
            box[2:] = min(box[2], width), min(box[3], height)
        expected = whole.resize((224, 224), Image.Resampling.BICUBIC, box=tuple(box))
        rng = order.sample_rng(0, "image", p)
        found = image_ops.train_image(picture, 224, rng, resize=resize, out=out, **options)
        assert found is out
        assert abs(out.astype(int) - np.asarray(expected)).mean() < 1.6
    assert max(seen) == {375: 1, 600: 2, 768: 2, 1601: 4, 2300: 4}[height]
    small, shrink = picture.pixels(2)
    assert shrink == 2 and small.shape == (-(-height // 2), -(-width // 2), 3)


@pytest.mark.parametrize("px", [40, 97, 224, 375])
def test_fast_is_close_to_pillows_bicubic_without_scaled_decoding(px):
    image = photograph(375, 375)
    found = image_ops.eval_image(image, px, resize="fast").astype(int)
    assert abs(found - image_ops.eval_image(image, px)).mean() < 1.8
    tall = image_ops._fast(image, px, (0, 0, 60, 375), None).astype(int)  # one side enlarged
    wanted = Image.fromarray(image).resize((px, px), Image.Resampling.BICUBIC, box=(0, 0, 60, 375))
    assert abs(tall - np.asarray(wanted)).mean() < 1.8


def test_randaugment_draws_from_the_generator_alone():
    image = photograph(32, 32)
    draw = lambda p, **k: image_ops.train_image(
        image, 32, order.sample_rng(0, "image", p), **{"randaugment": 2, "magnitude": 9.0} | k
    )
    outs = [draw(p) for p in range(60)]
    np.testing.assert_array_equal(outs[7], draw(7))
    assert len({o.tobytes() for o in outs}) > 40 and all(o.dtype == np.uint8 for o in outs)
    np.testing.assert_array_equal(draw(3, randaugment=0), image)
    flipped = [(draw(p, flip=True) != draw(p)).any() for p in range(30)]  # other draws stay
    plain = [(draw(p, flip=True, randaugment=0) != image).any() for p in range(30)]
    assert flipped == plain and 5 < sum(flipped) < 25


@pytest.mark.parametrize("name", list(randaugment.OPERATIONS))
def test_randaugment_operations(name):
    """Magnitude 0 changes nothing (but for the two that have no magnitude); more changes more."""
    image = Image.fromarray(photograph(32, 32) // 2 + 40)
    apply = lambda share, sign=1: np.asarray(randaugment.OPERATIONS[name](image, share, sign))
    change = [abs(apply(share).astype(int) - np.asarray(image)).mean() for share in (0, 0.5, 1)]
    if name in ("autocontrast", "equalize"):
        assert change[0] == change[2] > 0
    elif name == "identity":
        assert change == [0, 0, 0]
    else:
        assert change[0] < 0.1 and change[1] < change[2] and change[2] > 2
    signed = ("rotate", "color", "contrast", "brightness", "sharpness")
    assert (apply(1) != apply(1, -1)).any() == (name in signed or "_" in name)


def test_only_jpegs_are_decoded_scaled():
    pixels, shrink = pictures.Picture(encoded(Image.fromarray(RAMP))).pixels(2)
    assert shrink == 1 and pixels.shape == RAMP.shape


@pytest.mark.parametrize("resize", list(image_ops.FILTERS))
@pytest.mark.parametrize("size", [7, 40])
def test_every_filter_writes_into_the_buffer(resize, size):
    options = dict(min_area_frac=0.5, max_aspect=1.5, flip=True, jitter=0.2, resize=resize)
    image = photograph(30, 25)
    for p in range(6):
        out = np.zeros((2, size, size, 3), np.uint8)
        rngs = [order.sample_rng(0, "image", p) for _ in range(2)]
        alone = image_ops.train_image(image, size, rngs[0], **options)
        image_ops.train_image(image, size, rngs[1], out=out[1], **options)
        np.testing.assert_array_equal(out[1], alone)
        assert not out[0].any() and alone.any()


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda d: b"", "empty"),
        (lambda d: bytes(300), "empty"),
        (lambda d: b"<!DOCTYPE html><html></html>", "not_an_image"),
        (lambda d: d[: len(d) // 2], "truncated"),
        (lambda d: b"%!PS-Adobe-3.0 EPSF-3.0\n", "not_an_image"),
    ],
)
def test_each_broken_image_has_its_reason(spoil, reason):
    good = encoded(Image.fromarray(photograph(60, 80)), "JPEG")
    with pytest.raises(pictures.BadImage) as e:
        pictures.decode(spoil(good))
    assert e.value.reason == reason
