"""configs/small.py: its lengths fit data of any size. A whole run, from photographs on: tests/test_readme.py."""

import io
import json
import random

import numpy as np
import pytest
from PIL import Image

from configs import small as recipe
from helpers import runs
from vlp.core import check
from vlp.core import config as configs
from vlp.data import records, tokenizer
from vlp.train import stages

CONFIG = runs.ROOT / "configs" / "small.py"
WORDS = "red green blue dog cat bird sits runs sleeps on under the table".split()


def photo(seed, px):
    pixels = np.random.default_rng(seed).integers(0, 256, (px, px + 9, 3), dtype=np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "JPEG")
    return out.getvalue()


def dataset(path, num, *, px=80, words=6, val=5, files=True, captions=True):
    draws = random.Random(0)

    def row(i):
        text = " ".join(draws.choices(WORDS, k=words))
        said = [{"text": text, "source": "alt", "lang": "und"}] if captions else []
        return {"key": str(i), "image": photo(i % 3, px), "captions": said, "label": "x"}

    rows = [row(i) for i in range(num)]
    model = tokenizer.train([" ".join(WORDS)], 60, model_type="bpe").to_bytes()
    splits = {"train": rows} | ({"val": rows[:val]} if val else {})
    more = {records.TOKENIZER: model} if files else {}
    records.write(path, splits, name="x", info={}, files=more)
    return path


def load(path, **args):
    words = ",".join(f"{k}={v}" for k, v in args.items())
    return configs.load(f"{CONFIG}:path={path}" + (f",{words}" if words else ""))


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return dataset(tmp_path_factory.mktemp("small") / "set", 30)


def test_lengths_come_from_the_data(small, tmp_path):
    config = load(small)
    assert json.loads(json.dumps(config)) == config
    ((stage,), other) = stages.parse(config)[1], load(small, model="clip")
    vocab = tokenizer.load(small / records.TOKENIZER).vocab_size
    assert stage.model.text_tower.vocab == vocab
    assert stage.data.image_px == 64 and stage.data.text_len >= 8
    assert stage.evals["retrieval"].split == "val" and set(stage.evals) == {"retrieval", "captions"}
    assert set(other["evals"]) == {"retrieval"} and "decoder" not in other["model"]
    assert stages.parse(other)[1]
    assert load(small, epochs=2, batch=8)["samples"] == 60
    assert load(small, size="S/16")["data"]["image_px"] == 80
    assert stages.parse(load(small, size="B/16", model="clip"))[1]
    long = load(dataset(tmp_path / "long", 4, words=90, px=40, val=0))
    assert long["data"]["text_len"] == 64 and long["data"]["image_px"] == 40
    assert "evals" not in long


@pytest.mark.parametrize("num", [1, 3, 20, 100, 270, 2_000, 10_000, 100_000])
@pytest.mark.parametrize("num_evals", [1, 1000])
def test_lengths_fit_any_number_of_pairs(monkeypatch, num, num_evals):
    found = {
        "num": num, "evals": "val", "num_evals": num_evals, "vocab": 99, "px": 300, "text_len": 20,
    }  # fmt: skip
    monkeypatch.setattr(recipe, "look", lambda *_: found)
    config = configs.plain(recipe.get_config(f"path={num}"))
    run, (stage,) = stages.parse(config)
    assert stage.batch <= max(2, num / 2) and stage.batch & (stage.batch - 1) == 0
    assert stage.schedule.warmup(stage.batch, stage.num_steps) < stage.num_steps / 2
    assert 1 <= run.log_every_steps <= max(1, stage.num_steps / 20)
    assert stage.num_steps / 5 <= run.save_every_steps <= max(1, stage.num_steps / 2)
    assert stage.evals["retrieval"].every_steps == run.save_every_steps
    assert 10 <= stage.num_steps * stage.batch / num <= 120
    assert stage.evals["retrieval"].batch in (8, 16, 32, 64)


def test_a_mistake_is_one_line_that_says_what_to_do(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos.csv").touch()
    dataset(tmp_path / "labels", 3, captions=False)
    dataset(tmp_path / "wordless", 3, files=False)
    for path, line in (
        ("data/mine", "make one: vlp data convert photos.csv --out data/mine"),
        ("photos.csv", "make one: vlp data convert photos.csv --out data/mine"),
        ("labels", "records without captions"),
        ("wordless", "convert without --tokenizer ''"),
    ):
        argv = ["train", "--config", f"{CONFIG}:path={path}", "--workdir", "run"]
        assert runs.vlp(*argv) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and line in error
        assert not (tmp_path / "run").exists()
    for wrong in ({"size": "T"}, {"model": "cocoa"}, {"px": -1}, {"batch": -2}):
        with pytest.raises(check.UserError, match=next(iter(wrong))):
            load("labels", **wrong)
