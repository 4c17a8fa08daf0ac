"""Evaluation's pixels are those of OpenCLIP's transform."""

import numpy as np
import pytest
from PIL import Image

from parity import originals
from vlp.data import image_ops

assert originals  # defines the operators that torchvision may lack
pytest.importorskip("open_clip")
pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore")]
SIZES = [
    (480, 640),
    (640, 427),
    (333, 500),
    (224, 224),
    (225, 223),
    (1000, 301),
    (97, 400),
    (229, 1023),
]


@pytest.mark.parametrize(("mode", "how"), [("shortest", "torchvision"), ("squash", "squash")])
def test_evaluation_pixels_are_openclips(mode, how):
    """Within 2/255, at sizes with every rounding."""
    transform = pytest.importorskip("open_clip.transform").image_transform(
        224,
        is_train=False,
        mean=(0.0,) * 3,
        std=(1.0,) * 3,
        resize_mode=mode,
        interpolation="bicubic",
    )
    rng, worst = np.random.default_rng(0), 0
    for height, width in SIZES:
        small = Image.fromarray(rng.integers(0, 256, (height // 8, width // 8, 3)).astype(np.uint8))
        image = small.resize((width, height), Image.Resampling.BICUBIC)
        want = transform(image).numpy().transpose(1, 2, 0) * 255
        got = image_ops.eval_image(np.asarray(image), 224, how=how)
        worst = max(worst, np.abs(got - want).max())
    assert worst <= 2
    print(mode, "largest difference", worst)
