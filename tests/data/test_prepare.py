"""What `vlp data convert` adds for training: a held-out val and a tokenizer."""

import csv
import json
import os
import random
import shutil

import numpy as np
import pytest
import test_cli_data
from hypothesis import given
from hypothesis import strategies as st

from helpers import formats
from vlp.core import check
from vlp.data import records, sources, tokenizer
from vlp.data.config import Data
from vlp.data.dataset import open_dataset
from vlp.data.tools import convert, prepare


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("VLP_CACHE", str(tmp_path_factory.mktemp("cache")))


WORDS = "red green blue cat dog bird sits runs sleeps on under the table tree".split()


def rows(num, seed=0):
    draws = random.Random(seed)
    texts = [" ".join(draws.choices(WORDS, k=6)) for _ in range(num)]
    return [r | {"caption": t} for r, t in zip(formats.rows(num), texts)]


def table(path, pairs, name="photos.csv"):
    """Writes photos/ beside a CSV of paths and captions; returns the CSV."""
    (path / "photos").mkdir(parents=True, exist_ok=True)
    with open(path / name, "w", newline="") as f:
        writer = csv.writer(f)
        writer.writerow(["image_path", "caption"])
        for r in pairs:
            (path / "photos" / f"{r['key']}.jpg").write_bytes(r["jpg"])
            writer.writerow([f"photos/{r['key']}.jpg", r["caption"]])
    return path / name


def run_as_is(*argv):
    """`vlp data argv`; a conversion of an input without val holds a tenth out."""
    own = {"--val-fraction", "--splits"} & set(argv)
    if argv[0] == "convert" and not own and tuple(sources.held(str(argv[1]))) == ("train",):
        argv += ("--val-fraction", 0.1)
    return test_cli_data.run_as_is(*argv)


def images(out, split):
    source = records.open_split(out, split)
    return {source[i]["image"] for i in range(len(source))}


def tree(directory):
    return {p.name: p.read_bytes() for p in sorted(directory.iterdir())}


def test_what_convert_writes_can_be_trained_on(tmp_path, capsys):
    out = tmp_path / "mine"
    assert run_as_is("convert", table(tmp_path, rows(40)), "--out", out, "--val-fraction", 0.1) == 0
    told = capsys.readouterr().out
    assert "train: 36 records" in told and "val: 4 records" in told and "held out of train" in told
    assert "tokenizer: " in told and "trained on the captions of train" in told
    assert f"next: vlp train --config configs/small.py:path={out} --workdir runs/mine" in told
    manifest = records.read_manifest(out)
    assert manifest["files"][records.TOKENIZER]["sha256"] == manifest["info"]["tokenizer"]["sha256"]
    for split in ("train", "val"):  # captions of no known language pass
        dataset = open_dataset(Data(path=str(out), split=split, image_px=16))
        batch = dataset.batch_at(0, 4, 0)
        text = dataset.tokenizer.decode(batch["text"][0])
        assert text and set(text.split()) <= set(WORDS)
    assert not images(out, "train") & images(out, "val")
    assert run_as_is("verify", out) == 0


def test_val_depends_on_the_images_alone(tmp_path):
    pairs = rows(30)
    again = [r | {"key": f"copy{r['key']}", "caption": "the same again"} for r in pairs[:20]]
    shuffled = pairs + again
    random.Random(1).shuffle(shuffled)
    renamed = [r | {"key": f"z{99 - k}"} for k, r in enumerate(reversed(pairs))]
    flags = ("--val-fraction", 0.2, "--tokenizer", "")
    for name, some, *more in (
        ("a", pairs),
        ("b", renamed),
        ("c", shuffled, "--no-group"),
    ):
        file = table(tmp_path / name, some)
        assert run_as_is("convert", file, "--out", tmp_path / name / "out", *flags, *more) == 0
    val = {name: images(tmp_path / name / "out", "val") for name in "abc"}
    assert val["a"] == val["b"] and len(val["a"]) == 6
    assert len(val["a"] & val["c"]) >= 5  # 10 rows: as many images as these have copies
    for name in "abc":
        assert not val[name] & images(tmp_path / name / "out", "train")


@given(
    st.lists(st.lists(st.integers(0, 12), min_size=1, max_size=9), min_size=1, max_size=5),
    st.floats(0.01, 0.9),
    st.integers(0, 6),
)
def test_held_out_rows_are_a_function_of_their_content(blocks, frac, limit):
    """0 stands for a row without an image; other numbers are digests."""
    arrays = [np.array([x or prepare.NO_IMAGE for x in b], np.uint64) for b in blocks]
    flat = np.concatenate(arrays)
    held = prepare.hold_out(arrays, frac, limit)
    assert np.array_equal(held, np.sort(held)) and len(set(held.tolist())) == len(held)
    val, train = set(flat[held].tolist()), set(np.delete(flat, held).tolist())
    none = int(prepare.NO_IMAGE)
    assert none not in val and not val & train  # copies never straddle
    distinct = set(flat.tolist()) - {none}
    if len(distinct) < 2:
        assert not len(held)
        return
    wanted = max(1, round(frac * int((flat != prepare.NO_IMAGE).sum())))
    assert 1 <= len(val) < len(distinct)
    assert len(held) <= (min(wanted, limit) if limit else wanted) or len(val) == 1
    joined = prepare.hold_out([flat], frac, limit)  # blocks change nothing
    assert np.array_equal(held, joined)


@given(st.sets(st.integers(0, 30), max_size=30))
def test_a_subset_and_its_rest_are_all(chosen):
    class Numbers:
        fingerprint = "x"

        def __len__(self):
            return 31

        def __getitem__(self, i):
            return {"key": i}

    ids = np.array(sorted(chosen), np.int64)
    part, rest = prepare.Subset(Numbers(), ids), prepare.Subset(Numbers(), ids, others=True)
    assert [part[i]["key"] for i in range(len(part))] == sorted(chosen)
    left = [rest.read(i)[0]["key"] for i in range(len(rest))]
    assert left == sorted(set(range(31)) - chosen)
    assert [rest.place(i)["row"] for i in range(len(rest))] == left
    assert part.fingerprint != rest.fingerprint
    with pytest.raises(IndexError):
        part[len(part)]


def damaged(path):
    """Forty rows of which three have no image and two no text."""
    file = table(path, rows(40))
    for key in ("id003", "id017", "id018"):
        (path / "photos" / f"{key}.jpg").unlink()
    lines = file.read_text().splitlines()
    for k in (5, 30):
        lines[k + 1] = f"photos/id{k:03d}.jpg, "
    file.write_text("\n".join(lines))
    return file


JOB = {"rows_per_shard": 16, "val_frac": 0.1, "tokenizer": "auto"}


def test_killed_anywhere_it_resumes_to_the_same_bytes(tmp_path, monkeypatch):
    file = damaged(tmp_path / "in")
    convert.run(convert.Job(str(file), str(tmp_path / "true"), **JOB), workers=2)
    true = tree(tmp_path / "true")
    true["manifest.json"] = true["manifest.json"].replace(b'"true"', b'"out"')
    job = convert.Job(str(file), str(tmp_path / "out"), **JOB)
    left = [json.loads(x) for x in true[convert.LEFT_OUT].splitlines()]
    assert sorted(r["row"] for r in left) == [3, 5, 17, 18, 30]  # of the input

    class Kill(BaseException):
        pass

    for doomed in range(40):
        calls = 0

        def replace(a, b, *, doomed=doomed, real=os.replace):
            nonlocal calls
            calls += 1
            if calls == doomed + 1:
                raise Kill
            real(a, b)

        killed = False
        with monkeypatch.context() as m:
            m.setattr(os, "replace", replace)
            try:
                convert.run(job)
            except Kill:
                killed = True
        convert.run(job)
        assert tree(tmp_path / "out") == true and not (tmp_path / ".out.convert").exists()
        shutil.rmtree(tmp_path / "out")
        if not killed:
            break
    assert doomed >= 14  # plan, three looks, val, four shards twice, the dataset


def test_convert_takes_or_trains_a_tokenizer(tmp_path, small_tokenizer, capsys):
    """None, of a size, a file, the one beside the input; no captions, no tokenizer."""
    file = table(tmp_path, rows(60))
    model = tmp_path / "own.model"
    model.write_bytes(small_tokenizer.to_bytes())

    def made(name, *flags, path=file):
        assert run_as_is("convert", path, "--out", tmp_path / name, *flags) == 0
        found = tmp_path / name / records.TOKENIZER
        return tokenizer.load(found) if found.exists() else None

    assert made("none", "--tokenizer", "") is None
    assert made("some", "--tokenizer", 40).vocab_size == 40
    assert 20 < made("characters", "--tokenizer", 1).vocab_size < 40
    assert made("file", "--tokenizer", model) == small_tokenizer
    assert "pieces, given," in capsys.readouterr().out
    auto = made("auto")
    assert auto.vocab_size > 40 and auto == made("again")
    shutil.copy(model, tmp_path / records.TOKENIZER)
    assert made("beside") == small_tokenizer
    assert made("ours", path=tmp_path / "auto") == auto  # from records to records
    assert records.read_manifest(tmp_path / "ours")["splits"].keys() == {"train", "val"}
    for kind in ("cat", "dog"):
        (tmp_path / "classes" / kind).mkdir(parents=True)
        for k in range(3):
            (tmp_path / "classes" / kind / f"{k}.jpg").write_bytes(
                formats.jpeg(hash((kind, k)) % 99)
            )
    assert made("labels", path=tmp_path / "classes") is None
    with pytest.raises(check.UserError, match="--tokenizer: got 'no.model', which is no file"):
        made("x", "--tokenizer", "no.model")
    with pytest.raises(check.UserError, match="--tokenizer: got '0'"):
        made("x", "--tokenizer", "0")
    with pytest.raises(check.UserError, match="another dataset there already"):
        made("some", "--tokenizer", 50)


def test_a_tokenizer_is_trained_on_a_sample_of_train_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(prepare, "MAX_RECORDS", 9)
    seen = []
    monkeypatch.setattr(prepare, "train_tokenizer", lambda texts, _: seen.extend(texts))
    convert.run(convert.Job(str(table(tmp_path, rows(40))), str(tmp_path / "out"), **JOB))
    source = records.open_split(tmp_path / "out", "train")
    texts = [source[i]["captions"][0]["text"] for i in range(len(source))]
    assert len(seen) == 9 and set(seen) <= set(texts)


def test_the_size_follows_the_texts():
    size = {n: prepare.train_tokenizer([r["caption"] for r in rows(n)], "auto") for n in (3, 1000)}
    assert size[3].vocab_size < 50 < size[1000].vocab_size
    assert prepare.train_tokenizer([" "], "auto") is None
    emoji = prepare.train_tokenizer(["😀 猫 が いる", "Ärger"], "auto")
    assert emoji.decode(emoji.encode("猫 😀", 16)) == "猫 😀"


def test_splits_that_the_input_has_are_taken(tmp_path, capsys):
    pairs = rows(12)
    for split, part in (("train", pairs[:8]), ("validation", pairs[8:])):
        (tmp_path / "in" / split).mkdir(parents=True)
        formats.tar(tmp_path / "in" / split / "a.tar", part)
    assert run_as_is("convert", tmp_path / "in", "--out", tmp_path / "out") == 0
    told = capsys.readouterr().out
    assert "val: 4 records in 1 shards\n" in told and "not asked for" not in told
    with pytest.raises(check.UserError, match="--val-fraction: got 0.1 beside the splits"):
        run_as_is("convert", tmp_path / "in", "--out", tmp_path / "x", "--val-fraction", 0.1)
    only = ("--splits", "train")
    assert run_as_is("convert", tmp_path / "in", "--out", tmp_path / "some", *only) == 0
    assert "not asked for: val (name them" in capsys.readouterr().out
    images_ = [
        {"filename": f"{r['key']}.jpg", "split": s, "sentences": [{"raw": r["caption"]}]}
        for r, s in zip(pairs, ["train"] * 8 + ["val"] * 2 + ["test"] * 2)
    ]
    (tmp_path / "karpathy").mkdir()
    for r in pairs:
        (tmp_path / "karpathy" / f"{r['key']}.jpg").write_bytes(r["jpg"])
    (tmp_path / "karpathy" / "dataset.json").write_text(json.dumps({"images": images_}))
    path = tmp_path / "karpathy" / "dataset.json"
    assert run_as_is("convert", path, "--out", tmp_path / "k") == 0
    counts = {
        k: v["num_records"] for k, v in records.read_manifest(tmp_path / "k")["splits"].items()
    }
    assert counts == {"train": 8, "val": 2, "test": 2}


def test_names_of_files_that_sound_like_splits(tmp_path, capsys):
    for k in range(6):
        name = f"{'test' if k % 2 else 'train'}-{k}"
        (tmp_path / f"{name}.jpg").write_bytes(formats.jpeg(k))
        (tmp_path / f"{name}.txt").write_text("a cat")
    assert run_as_is("convert", tmp_path, "--out", f"{tmp_path}.out") == 0
    assert "train: 5 records" in capsys.readouterr().out


def test_too_few_images_for_a_val(tmp_path, capsys):
    file = table(tmp_path, rows(1))
    val = ("--val-fraction", 0.1)
    assert run_as_is("convert", file, "--out", tmp_path / "out", *val) == 0
    assert "val: none, because train has fewer than two different images" in capsys.readouterr().out
    assert records.read_manifest(tmp_path / "out")["splits"].keys() == {"train"}
    (tmp_path / "photos" / "id000.jpg").unlink()
    with pytest.raises(check.UserError, match=r"split 'train' of .*: got 0 records .*id000.jpg"):
        run_as_is("convert", file, "--out", tmp_path / "none")
    for wrong in ("1", "-0.1", "half"):
        with pytest.raises(SystemExit):
            run_as_is("convert", file, "--out", tmp_path / "x", "--val-fraction", wrong)
    assert sorted(os.listdir(tmp_path)) == ["out", "photos", "photos.csv"]
    capsys.readouterr()


def test_what_filter_writes_can_be_trained_on(tmp_path, capsys):
    file = table(tmp_path, rows(40))
    assert run_as_is("convert", file, "--out", tmp_path / "all") == 0
    loose = ("--min-side-px", 0, "--min-words", 1, "--max-images-per-text", 99)
    out = tmp_path / "clean"
    assert run_as_is("filter", tmp_path / "all", "--out", out, *loose) == 0
    assert "not asked for" not in capsys.readouterr().out
    for split in ("train", "val"):
        assert open_dataset(Data(path=str(out), split=split)).batch_at(0, 2, 0)


def test_relative_paths_after_a_change_of_directory(tmp_path, monkeypatch):
    for name in "ab":
        table(tmp_path / name, rows(3))
        monkeypatch.chdir(tmp_path / name)
        assert test_cli_data.run("convert", "photos.csv", "--out", "out") == 0
