"""Every config of configs/evals, by `vlp eval`, on the public layouts that it is for."""

import io
import json

import numpy as np
import pytest
from PIL import Image

from helpers import runs
from vlp.core import config as configs
from vlp.data import records, tokenizer
from vlp.train import stages

FOLDER = runs.ROOT / "configs" / "evals"
NAMES = sorted(p.stem for p in FOLDER.glob("*.py"))


def jpeg(seed):
    pixels = np.random.default_rng(seed).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels).resize((40, 32)).save(out, "JPEG", quality=95)
    return out.getvalue()


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The workdir of a toy run on pictures with English and German captions."""
    runs.register_toy()
    root = tmp_path_factory.mktemp("suites")
    words = tokenizer.train([f"number {i}" for i in range(30)], vocab_size=64)
    both = lambda i: [
        {"text": f"number {i}", "source": "", "lang": "en"},
        {"text": f"nummer {i}", "source": "", "lang": "de"},
    ]
    rows = lambda num: [
        {"key": str(i), "image": jpeg(i), "captions": both(i), "label": i % 3} for i in range(num)
    ]
    files = {"tokenizer.model": words.to_bytes()}
    splits = {"train": rows(9), "test": rows(7)}
    records.write(str(root / "data"), splits, name="d", info={}, files=files)
    records.write(str(root / "other"), {"test": rows(5)}, name="o", info={})
    data = {"path": str(root / "data"), "image_px": 16, "text_len": 16}
    assert runs.train(runs.TOY | {"steps": 2, "data": data}, root / "run") == 0
    return root / "run"


@pytest.fixture
def evaluate(run, tmp_path, toy):
    """The function (config, argument) → rows of the results."""

    def results(name, arg):
        out = tmp_path / "out.jsonl"
        spec = f"{FOLDER / name}.py:{arg}"
        assert runs.vlp("eval", "--workdir", run, "--evals", spec, "--json", out) == 0
        return [json.loads(line) for line in out.read_text().splitlines()]

    return results


def test_imagenets_folders(evaluate, tmp_path):
    """test/<class>/*.jpg: the folders' names, or classnames.txt in their order, also with one name twice."""
    for name in ("named", "plain"):
        for k, label in enumerate(("number_1", "number_2", "number_3")):
            folder = tmp_path / "sets" / name / "test" / label
            folder.mkdir(parents=True)
            for i in range(2 + k):
                (folder / f"{i}.jpg").write_bytes(jpeg(10 * k + i))
    (tmp_path / "sets" / "named" / "classnames.txt").write_text("number 1\n2 number\n2 number\n")
    rows = evaluate("zeroshot_suite", f"root={tmp_path / 'sets'},batch=8,templates=photo")
    assert {(r["eval"], r["num"], r["num_classes"]) for r in rows} == {
        ("named", 9, 3),
        ("plain", 9, 3),
    }
    assert len({r["classes"] for r in rows}) == 2 and len({r["templates"] for r in rows}) == 1


def test_karpathys_json_by_ids(evaluate, tmp_path):
    """Five captions an image, the test split alone, and folds of it by the images' ids."""
    (tmp_path / "val2014").mkdir()
    images = []
    for i in range(8):
        (tmp_path / "val2014" / f"{i}.jpg").write_bytes(jpeg(i))
        sentences = [{"raw": f"number {i} of {k}"} for k in range(6 if i == 3 else 5)]
        images.append({
            "filename": f"{i}.jpg", "filepath": "val2014", "cocoid": 100 + i,
            "split": "test" if i < 6 else "restval", "sentences": sentences,
        })  # fmt: skip
    (tmp_path / "dataset_coco.json").write_text(json.dumps({"images": images}))
    (tmp_path / "fold1.txt").write_text("105\n103\n")
    path = f"path={tmp_path / 'dataset_coco.json'},batch=4"
    rows = evaluate("retrieval", path)
    assert {(r["eval"], r["num"], r["num_captions"]) for r in rows} == {("retrieval", 6, 30)}
    rows += evaluate("retrieval", f"{path},ids={tmp_path / 'fold1.txt'}")
    assert {(r["num"], r["num_captions"]) for r in rows if r["eval"] == "fold1"} == {(2, 10)}
    assert len({r["fingerprint"] for r in rows}) == 2


def test_other_datasets_and_languages(evaluate, run):
    data = run.parent
    rows = evaluate("other_data", f"paths={data / 'data'}+{data / 'other'},langs=en+de,batch=8")
    assert {(r["eval"], r["num"], r["langs"]) for r in rows} == {
        (f"{name}_{lang}", num, lang) for name, num in (("data", 7), ("other", 5)) for lang in ("en", "de")
    }  # fmt: skip
    english, german = (
        [r["value"] for r in rows if r["eval"] == f"data_{lang}"] for lang in ("en", "de")
    )
    assert len(english) == len(german) == 8


def test_sugarcrepe_and_winoground_files(evaluate, tmp_path):
    for i in range(3):
        (tmp_path / f"{i}.jpg").write_bytes(jpeg(i))
    row = {"filename": "0.jpg", "caption": "number 1", "negative_caption": "number 2"}
    (tmp_path / "swap_att.json").write_text(
        json.dumps({"0": row, "1": row | {"filename": "1.jpg"}})
    )
    row = {
        "id": 0,
        "image_0": "1",
        "image_1": "2",
        "caption_0": "number 3",
        "caption_1": "3 number",
    }
    (tmp_path / "winoground.jsonl").write_text(json.dumps(row))
    rows = evaluate("compositional", f"root={tmp_path},batch=2")
    found = {(r["eval"], r["metric"]) for r in rows}
    assert {("swap_att", "accuracy"), ("winoground", "group_score")} <= found


def test_frozen_features(evaluate, toy, monkeypatch):
    """The toy has no pooled output: its embeddings; without a path, the run's own data."""
    rows = evaluate("features", "features=embed,batch=8")
    assert {r["eval"] for r in rows} == {"fewshot", "linear_probe", "knn"}
    assert {r["num"] for r in rows} == {7} and {r["num_classes"] for r in rows} == {3}


@pytest.mark.parametrize("name", NAMES)
def test_every_config_of_evaluations_builds_or_says_what_it_needs(name, capsys, run):
    """Without an argument; test_shipped configs are those of training."""
    try:
        section = configs.load(str(FOLDER / f"{name}.py"))
    except configs.check.UserError as e:
        assert f"{name}.py:root=DIR" in str(e) and "\n" not in str(e)
    else:
        assert stages.evaluators(section)
