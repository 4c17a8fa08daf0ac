"""torchvision's crops: evaluation's to the pixel, training's in distribution."""

import numpy as np
import pytest
from PIL import Image

from vlp.data import image_ops


def noise(height, width, seed=0):
    rng = np.random.default_rng(seed)
    small = rng.integers(0, 256, (height // 4 + 1, width // 4 + 1, 3)).astype(np.uint8)
    return np.asarray(Image.fromarray(small).resize((width, height)))


SIZES = [(50, 71), (71, 50), (33, 100), (64, 64), (40, 41), (97, 37), (31, 31), (20, 23)]


@pytest.mark.parametrize("size", SIZES)
def test_evaluation_has_the_pixels_of_resize_and_centre_crop(size):
    """Resize(px): the longer side is int(px · long / short); CenterCrop: edges are rounded halves. Within 2/255."""
    px, image = 32, noise(*size)
    height, width = size
    short = min(size)
    new = int(px * width / short), int(px * height / short)
    whole = Image.fromarray(image).resize(new, Image.Resampling.BICUBIC)
    left, top = round((new[0] - px) / 2), round((new[1] - px) / 2)
    want = np.asarray(whole.crop((left, top, left + px, top + px))).astype(int)
    got = image_ops.eval_image(image, px, how="torchvision").astype(int)
    assert np.abs(got - want).max() <= 2


def test_squash_shows_the_whole_image():
    image = noise(40, 60)
    want = np.asarray(Image.fromarray(image).resize((32, 32), Image.Resampling.BICUBIC))
    np.testing.assert_array_equal(image_ops.eval_image(image, 32, how="squash"), want)
    assert image_ops.eval_crop((40, 60), 32, "squash").box == (0, 0, 60, 40)


def boxes(size, how, num=4000, **options):
    draws = np.random.default_rng(0).random((num, 5))
    options = dict(min_area_frac=0.3, max_aspect=4 / 3) | options
    return np.array([image_ops.train_box(size, 8, d, how=how, **options)[0] for d in draws])


def reference(size, num=4000, area=(0.3, 1.0), ratio=4 / 3):
    """RandomResizedCrop.get_params, with NumPy's draws."""
    rng, (height, width), out = np.random.default_rng(1), size, []
    for _ in range(num):
        for _ in range(10):
            target = height * width * rng.uniform(*area)
            aspect = np.exp(rng.uniform(-np.log(ratio), np.log(ratio)))
            w, h = round((target * aspect) ** 0.5), round((target / aspect) ** 0.5)
            if 0 < w <= width and 0 < h <= height:
                top, left = rng.integers(0, height - h + 1), rng.integers(0, width - w + 1)
                break
        else:
            if width / height < 1 / ratio:
                w, h = width, round(width * ratio)
            elif width / height > ratio:
                w, h = round(height * ratio), height
            else:
                w, h = width, height
            top, left = (height - h) // 2, (width - w) // 2
        out.append((left, top, left + w, top + h))
    return np.array(out)


@pytest.mark.parametrize("size", [(60, 80), (20, 90)])
def test_training_has_torchvisions_distribution(size):
    """Whole pixels; the same quantiles of every edge and of the area, to a pixel or 3 %."""
    got, want = boxes(size, "torchvision"), reference(size)
    assert (got == np.round(got)).all()
    at = np.linspace(0.02, 0.98, 25)
    for edge in range(4):
        assert np.abs(np.quantile(got[:, edge], at) - np.quantile(want[:, edge], at)).max() <= 2.5
    area = lambda b: (b[:, 2] - b[:, 0]) * (b[:, 3] - b[:, 1]) / (size[0] * size[1])
    assert np.abs(np.quantile(area(got), at) - np.quantile(area(want), at)).max() <= 0.03


def test_an_image_too_long_for_any_crop_gives_the_centre():
    got = boxes((10, 100), "torchvision", num=8, min_area_frac=0.9)
    np.testing.assert_array_equal(got, [[43, 0, 56, 10]] * 8)
