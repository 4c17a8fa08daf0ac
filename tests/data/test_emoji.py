"""The emoji set: its size, and that no idea of test or val is ever seen in training."""

import json
import os

import pytest

from vlp.core import check
from vlp.data import emoji, records
from vlp.data.config import Data
from vlp.data.dataset import open_dataset

EVAL_SPLITS = ("val", "val_variants", "test", "test_variants")


@pytest.fixture(scope="module")
def rows(emoji_dir):
    sources = {s: records.open_split(emoji_dir, s) for s in ("train", *EVAL_SPLITS)}
    return {s: [source[i] for i in range(len(source))] for s, source in sources.items()}


def test_the_emoji_set_has_its_known_counts(rows):
    assert sum(map(len, rows.values())) == 3953  # OpenMoji 17.0 with emoji 2.16
    assert len(rows["val"]) == len(rows["test"]) == 200
    assert all(r["primary"] for s in ("val", "test") for r in rows[s])
    assert not any(r["primary"] for s in EVAL_SPLITS if "variants" in s for r in rows[s])


def test_no_base_in_two_splits(rows):
    bases = {s: {r["base"] for r in v} for s, v in rows.items()}
    held = {"val": bases["val"], "test": bases["test"], "train": bases["train"]}
    assert bases["val_variants"] <= bases["val"] and bases["test_variants"] <= bases["test"]
    assert sum(map(len, held.values())) == len(set().union(*held.values()))
    assert len(bases["val"]) == len(bases["test"]) == 200


def test_no_text_in_two_splits_or_two_bases(rows):
    owner = {}
    for split, records_ in rows.items():
        for r in records_:
            for c in r["captions"][:1]:
                assert c["text"] not in owner, c["text"]
                owner[c["text"]] = (split.split("_")[0], r["base"])
    for split, records_ in rows.items():
        for r in records_:
            for c in r["captions"]:
                expected = (split.split("_")[0], r["base"])
                assert owner.setdefault(c["text"], expected) == expected, c["text"]


def test_no_picture_in_train_and_evaluation(rows):
    seen = {r["image"] for r in rows["train"]}
    assert not [r["key"] for s in EVAL_SPLITS for r in rows[s] if r["image"] in seen]


def test_flags_are_for_training_alone(rows):
    assert not [r["key"] for s in EVAL_SPLITS for r in rows[s] if emoji.is_flag(r["key"])]
    assert sum(emoji.is_flag(r["key"]) for r in rows["train"]) > 250


def test_emoji_captions_are_names_and_aliases(rows):
    by_key = {r["key"]: r for v in rows.values() for r in v}
    grin = by_key["1F600"]
    assert grin["captions"][0] == {"text": "grinning face", "source": "unicode", "lang": "en"}
    assert {"text": "grinsendes gesicht", "source": "unicode", "lang": "de"} in grin["captions"]
    assert all(c["text"] == c["text"].lower() for c in grin["captions"])
    assert all(r["captions"][0]["lang"] == "en" for r in by_key.values())


@pytest.mark.parametrize(
    ("key", "base"),
    [
        ("1F600", "1F600"),
        ("1F44B-1F3FD", "1F44B"),  # skin tone
        ("1F469-1F3FD-200D-1F680", "1F9D1-200D-1F680"),  # woman astronaut
        ("1F6B6-1F3FB-200D-2640-FE0F-200D-27A1-FE0F", "1F6B6"),  # woman walking facing right
        ("1F468-200D-1F9B0", "1F9D1"),  # red hair
        ("1F471-200D-2642", "1F9D1"),
        ("1F475-1F3FF", "1F9D3"),
        ("1F468-200D-1F469-200D-1F467-200D-1F466", "1F46A"),  # a family
        ("1F469-200D-1F466", "1F46A"),
        ("1F469-1F3FB-200D-1F91D-200D-1F468-1F3FC", "1F9D1-200D-1F91D-200D-1F9D1"),
        ("1F46B-1F3FB", "1F9D1-200D-1F91D-200D-1F9D1"),
        ("1F469-1F3FB-200D-2764-FE0F-200D-1F48B-200D-1F468-1F3FC", "1F48F"),
        ("1F936", "1F9D1-200D-1F384"),  # Mrs Claus
        ("1F478-1F3FB", "1FAC5"),
        ("1FAF1-1F3FB-200D-1FAF2-1F3FC", "1F91D"),
        ("2640", "2640"),  # the sign itself
        ("27A1", "27A1"),
        ("1F3FE", "1F3FB"),
        ("1F642-200D-2194", "1F642-200D-2194"),  # a nod is no direction
    ],
)
def test_forms_of_an_emoji_share_their_base(key, base):
    assert emoji.base_of(key) == base


def test_manifest_carries_the_attribution(emoji_dir):
    manifest = json.loads((emoji_dir / "manifest.json").read_text())
    assert (
        "OpenMoji" in manifest["info"]["attribution"]
        and "CC BY-SA 4.0" in manifest["info"]["license"]
    )
    assert 1000 <= manifest["info"]["vocab_size"] <= 1500
    assert records.TOKENIZER in manifest["files"] and records.TOKENIZER in os.listdir(emoji_dir)


def test_the_emoji_set_loads_as_batches(emoji_dir):
    dataset = open_dataset(Data(path=str(emoji_dir), split="test", image_px=16))
    batch = next(dataset.eval_iter(50))
    first = dataset.record(0)["captions"][0]["text"]
    assert dataset.tokenizer.decode(batch["text"][0]) == first


def test_missing_packages_name_the_extra(monkeypatch, tmp_path):
    monkeypatch.setitem(__import__("sys").modules, "resvg_py", None)
    with pytest.raises(check.UserError, match=r'pip install "vlp\[demo\]"'):
        emoji.build(tmp_path / "x")


def test_what_is_there_is_not_drawn_again(tmp_path, monkeypatch):
    """Versions, names, tokenizer and files decide; another choice of emoji is drawn, and refused."""
    import resvg_py

    from vlp.data.emoji import dataset

    found = dataset.find(*dataset.demo_packages()[:2])
    monkeypatch.setattr(dataset, "find", lambda *_: found)
    made = emoji.build(tmp_path / "e", image_px=8, vocab_size=300, limit=60)
    drawn = []
    draw = resvg_py.svg_to_bytes
    monkeypatch.setattr(resvg_py, "svg_to_bytes", lambda **k: drawn.append(1) or draw(**k))
    assert emoji.build(tmp_path / "e", image_px=8, vocab_size=300, limit=60) == made
    assert not drawn
    with pytest.raises(check.UserError, match="another dataset"):
        emoji.build(tmp_path / "e", image_px=8, vocab_size=300, limit=59)
    assert drawn
