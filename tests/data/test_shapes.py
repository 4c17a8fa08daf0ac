"""The in-memory source: distinct, deterministic, disjoint splits."""

import numpy as np
import pytest

from vlp.core import check
from vlp.data import records, toy_shapes


def test_records_are_distinct_and_splits_disjoint():
    keys = {s: [toy_shapes.Shapes(300, s)[i]["key"] for i in range(300)] for s in toy_shapes.SPLITS}
    assert len(set().union(*keys.values())) == 900
    images = {toy_shapes.Shapes(300)[i]["image"].tobytes() for i in range(300)}
    assert len(images) == 300
    assert isinstance(toy_shapes.Shapes(), records.Source)


def test_captions_tell_the_picture():
    source = toy_shapes.Shapes(200)
    for i in range(200):
        r = source[i]
        _, color, _, ground, _ = r["key"].split("-")
        assert color in r["captions"][0]["text"] and f"on {ground}" in r["captions"][0]["text"]
        colors = np.unique(r["image"].reshape(-1, 3), axis=0).tolist()
        assert sorted(colors) == sorted(
            [list(toy_shapes.COLORS[color]), list(toy_shapes.COLORS[ground])]
        )


def test_tokenizer_keeps_captions_short():
    t = toy_shapes.Shapes(8, "val").tokenizer()
    source = toy_shapes.Shapes(300, "test")
    row = np.empty(16, np.int32)
    assert not any(t.encode_into(source[i]["captions"][0]["text"], row) for i in range(300))


def test_drawn_shapes_stay_within_the_image():
    for num in (0, 10**6):
        with pytest.raises(check.UserError, match="config.data.num_records"):
            toy_shapes.Shapes(num)
    with pytest.raises(check.UserError, match="did you mean 'test'"):
        toy_shapes.Shapes(3, "tset")
    with pytest.raises(IndexError):
        toy_shapes.Shapes(3)[3]
