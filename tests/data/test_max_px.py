"""`convert --max-px N`: images whose shorter side is longer become JPEGs of N; all others stay as they are."""

import io
import json

import numpy as np
from PIL import Image

from vlp.cli import main as cli
from vlp.data import pictures, records
from vlp.data.tools import shrink


def encoded(image, ending, **options):
    out = io.BytesIO()
    image.save(out, ending, **options)
    return out.getvalue()


def smooth(height, width):
    y, x = np.mgrid[:height, :width]
    channels = [255 * y / height, 255 * x / width, 127 * (y / height + x / width)]
    return Image.fromarray(np.stack(channels, -1).astype(np.uint8))


def test_larger_images_become_jpegs_and_others_stay(tmp_path, capsys):
    turned = Image.Exif()
    turned[0x0112] = 6
    clear = Image.new("RGBA", (90, 60), (200, 0, 0, 0))
    deep = Image.fromarray(np.full((60, 60), 65535 // 2, np.uint16))
    frames = [Image.new("RGB", (80, 80), c) for c in ("red", "blue")]
    images = {
        "small.png": encoded(smooth(40, 400), "PNG"),
        "exact.jpg": encoded(smooth(41, 40), "JPEG"),
        "large.jpg": encoded(smooth(120, 300), "JPEG"),
        "turned.jpg": encoded(smooth(100, 60), "JPEG", exif=turned.tobytes()),
        "clear.png": encoded(clear, "PNG"),
        "deep.png": encoded(deep, "PNG"),
        "moving.gif": encoded(frames[0], "GIF", save_all=True, append_images=frames[1:]),
        "cut.png": encoded(smooth(300, 300), "PNG")[:-900],
    }
    (tmp_path / "in").mkdir()
    for name, data in images.items():
        (tmp_path / "in" / name).write_bytes(data)
        (tmp_path / "in" / name).with_suffix(".txt").write_text(name)
    out = tmp_path / "out"
    command = ["data", "convert", str(tmp_path / "in"), "--out", str(out), "--tokenizer", ""]
    assert cli.main([*command, "--max-px", "40"]) == 0
    assert "shrunk to a shorter side of 40: {'train': 5} images" in capsys.readouterr().out
    found = {r["captions"][0]["text"]: r["image"] for r in records.open_split(str(out), "train")}
    assert found.keys() == images.keys() - {"cut.png"}
    told = json.loads((out / "manifest.json").read_text())["info"]
    assert told["resized"] == {"max_px": 40, "jpeg_quality": 95, "records": {"train": 5}}
    assert told["left_out"] == {"image truncated": 1}
    sizes = {"large.jpg": (40, 100), "turned.jpg": (40, 67), "clear.png": (40, 60)}
    for name, data in found.items():
        if name in ("small.png", "exact.jpg"):
            assert data == images[name]
            continue
        picture = pictures.Picture(data)
        assert picture.format == "JPEG" and picture.size == sizes.get(name, (40, 40))
        whole = Image.fromarray(pictures.decode(images[name]))
        wanted = np.asarray(whole.resize(picture.size[::-1], Image.Resampling.BICUBIC), float)
        assert abs(wanted - picture.pixels()[0]).mean() < 1.5, name
    assert cli.main([*command, "--max-px", "40"]) == 0  # the same job
    assert cli.main([*command, "--max-px", "48"]) == 2


def test_an_image_too_long_for_a_jpeg_stays():
    assert shrink.shrunk(encoded(Image.new("L", (70_000, 16)), "PNG"), 15) is None
