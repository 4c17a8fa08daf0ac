"""What evaluators are given: names of artefacts, and data at relative paths."""

import dataclasses

import pytest

from vlp.core import check
from vlp.data import records
from vlp.data import tokenizer as tokenizers
from vlp.data.config import Data
from vlp.evals import io
from vlp.evals.retrieval import Retrieval
from vlp.evals.zeroshot import Zeroshot


def test_two_evaluations_of_one_kind_keep_their_artefacts():
    zeroshot = Zeroshot(label="shape", classes=("circle", "square"), batch=8)
    evals = {
        "a": zeroshot,
        "b": dataclasses.replace(zeroshot, templates=("a {}",)),
        "other": dataclasses.replace(zeroshot, label="color"),
        "retrieval": Retrieval(batch=8),
    }
    written = []
    words = tokenizers.train(["number one"], vocab_size=40)
    given = io.IO(Data(), words, lambda *artefact: written.append(artefact))
    for label in evals:
        io.own(evals, label, given).write("x", {})
    assert written == [("x_a", {"eval": "a"}), ("x_b", {"eval": "b"}), ("x", {}), ("x", {})]


def test_a_relative_path_starts_at_the_working_directory(tmp_path, monkeypatch):
    words = tokenizers.train(["number one"], vocab_size=40)
    for name, num in (("a", 1), ("b", 2)):
        rows = [
            {"key": str(i), "image": b"x", "captions": [{"text": "one", "source": "", "lang": ""}]}
            for i in range(num)
        ]
        records.write(str(tmp_path / name / "set"), {"val": rows}, name="n", info={})
        monkeypatch.chdir(tmp_path / name)
        data = Data(path="set", image_px=8, text_len=8, split="val")
        assert io.IO(data, words).open("val").num_records == num
    monkeypatch.chdir(tmp_path)
    with pytest.raises(check.UserError):
        io.IO(data, words).open("val")
