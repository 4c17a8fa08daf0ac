"""`vlp caption`: a line per image file, prepared as in training."""

import json

import numpy as np
import pytest
from PIL import Image

from helpers import runs
from vlp.data.config import Data
from vlp.data.dataset import open_dataset
from vlp.infer.caption import caption
from vlp.infer.load import load


@pytest.fixture
def files(tmp_path):
    """Image files of several formats and sizes, and their pixels as they must be seen."""
    pixels = np.random.default_rng(0).integers(0, 256, (40, 31, 3), dtype=np.uint8)
    picture = Image.fromarray(pixels)
    picture.save(tmp_path / "a.png")
    picture.resize((200, 90)).save(tmp_path / "b.jpg", quality=80)
    picture.convert("L").save(tmp_path / "c.webp")
    picture.convert("RGBA").save(tmp_path / "d e.png")
    return [tmp_path / name for name in ("a.png", "b.jpg", "c.webp", "d e.png")]


def test_each_image_file_gets_a_line(coca_run, files, capsys):
    assert runs.vlp("caption", "--workdir", coca_run, *files) == 0
    lines = [line.split("\t") for line in capsys.readouterr().out.splitlines()]
    assert [path for path, _ in lines] == [str(file) for file in files]
    texts = [text for _, text in lines]
    assert texts[0] == texts[3]  # the same pixels
    assert texts == caption(
        load(coca_run), [np.asarray(Image.open(f).convert("RGB")) for f in files]
    )
    assert runs.vlp("caption", "--workdir", coca_run, "--step", 8, files[0]) == 0


def test_captions_of_files_equal_those_of_the_evaluation(coca_run, tmp_path, capsys):
    """The images of the split, saved as files, get the captions that the run's evaluation gave them."""
    kept = json.loads((coca_run / "evals" / "captions_test.json").read_text())
    assert (kept["step"], len(kept["items"])) == (9, 2)
    data = open_dataset(Data(**runs.DATA | {"split": "test"}))
    for number, record in enumerate((0, 20)):
        Image.fromarray(data.record(record)["image"]).save(tmp_path / f"{number}.png")
    files = [tmp_path / "0.png", tmp_path / "1.png"]
    assert runs.vlp("caption", "--workdir", coca_run, *files) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("\t")[1] for line in lines] == [item["generated"] for item in kept["items"]]
