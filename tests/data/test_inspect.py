"""`vlp data` inspect, verify, filter, tokenizer and bench: counts that were put there are found."""

import dataclasses
import io
import json

import numpy as np
import pytest
import test_cli_data
from PIL import Image

from helpers import formats
from vlp.core import check, pages
from vlp.data import records, tokenizer
from vlp.data.sources.combined import without
from vlp.data.tools import filter as filter_lib
from vlp.data.tools import inspect


def record(key, texts, image=None, lang="en"):
    captions = [{"text": t, "source": "alt", "lang": lang} for t in texts]
    return {"key": key, "image": image or formats.jpeg(int(key), (300, 250)), "captions": captions}


def test_inspect_counts_what_was_put_there(tmp_path, capsys):
    same = formats.jpeg(99, (40, 30))
    rows = [
        record("1", ["a b c", "un"], same),
        record("2", ["a b c"], same, lang="de"),
        record("3", ["<script>"], formats.jpeg(3, (20, 10))),
        record("4", ["x"], b"<html>"),
    ]
    records.write(tmp_path / "set", {"train": rows}, name="n", info={})
    page = tmp_path / "page.html"
    assert test_cli_data.run("inspect", tmp_path / "set", "--json", "--html", page) == 0
    found = json.loads(capsys.readouterr().out.rsplit("}", 1)[0] + "}")
    assert found["records"] == 4 and found["captions"] == 5
    assert found["repeated_images"] == 0.25 and found["repeated_texts"] == 0.2
    assert found["langs"] == {"en": 4, "de": 1} and found["formats"] == {"JPEG": 3}
    assert found["shorter_side_px"] == [10, 20, 30, 30, 30]
    assert found["caption_words"] == [1, 1, 1, 3, 3] and found["bad"] == {"image header": 1}
    text = page.read_text()
    assert text.count("<img") == 3 and "&lt;script&gt;" in text and "<script>" not in text
    with pytest.raises(check.UserError, match="a new file"):
        test_cli_data.run("inspect", tmp_path / "set", "--html", page)
    assert test_cli_data.run("inspect", tmp_path / "set") == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert lines[0] == ["split", "train"] and ["Records", "4"] in lines
    assert ["min", "25", "%", "median", "75", "%", "max"] in lines
    assert ["Caption", "words", "1", "1", "1", "3", "3"] in lines
    assert ["Languages", "en", "4", "(80.0", "%),", "de", "1", "(20.0", "%)"] in lines


def test_images_that_were_padded_are_flagged(tmp_path):
    wide = Image.open(io.BytesIO(formats.jpeg(1, (64, 40)))).resize((128, 80))
    padded = Image.new("RGB", (128, 128), "white")  # as img2dataset's resize_mode="border"
    padded.paste(wide, (0, 24))
    rows = []
    for key, image in (("1", padded), ("2", wide), ("3", padded)):
        out = io.BytesIO()
        image.save(out, "JPEG")
        rows.append(record(key, ["x"], out.getvalue()))
    rows.append(record("4", ["x"], b"<html>"))
    records.write(tmp_path / "set", {"train": rows}, name="n", info={})
    source = records.open_split(tmp_path / "set", "train")
    found = inspect.numbers(source)
    assert found["uniform_borders"] == "2 of 3 looked at"
    assert inspect.page(source, found, title="t").count(">uniform border<") == 2


def test_the_page_asks_nothing_and_shows_hostile_names_harmlessly(tmp_path):
    evil = '"><script>alert(1)</script><img src=http://x.example/ onerror=alert(1)>'
    controls = "\x1b[31mred\x1b]0;t\x07 \x7f \x9b31m \u202egpj.exe"
    rows = [record("1", [evil, controls]), record("2", ["x" * 9_000])]
    rows[1]["key"] = evil + controls
    rows.append(record("3", ["y"], b"<html>", lang=evil))
    records.write(tmp_path / "set", {"train": rows}, name="n", info={})
    source = records.open_split(tmp_path / "set", "train")
    found = inspect.numbers(source)
    text = inspect.page(source, found, title=evil + controls)
    assert "default-src 'none'; img-src data:; style-src 'unsafe-inline'\"" in text
    assert pages.asset("vlp.report", "page.css") in text  # the style of `vlp report`
    assert "<script" not in text and "<img src=http" not in text
    assert "&lt;script&gt;" in text and "␛[31mred" in text and "x" * 201 not in text
    assert not set(text) & set("\x07\x1b\x7f\x9b\u202e")
    text.encode()


def test_the_page_shows_every_number_in_words(tmp_path):
    records.write(tmp_path / "set", {"train": [record("1", ["a b"])]}, name="n", info={})
    source = records.open_split(tmp_path / "set", "train")
    found = {**inspect.numbers(source), "new_count": 12_345, "new_kinds": {"a_b": 3}}
    text = inspect.page(source, found, title="t")
    for words in (
        "new count",
        "12,345",
        "New kinds",
        "a_b",
        "Shorter side, px",
        "Languages",
        "repeated keys",
    ):
        assert words in text
    assert "new_kinds" not in text and "new_count" not in text


def test_uniform_borders_are_found():
    image = np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    assert not inspect.has_uniform_border(image)
    image[:8] = image[-8:] = 255
    assert inspect.has_uniform_border(image)
    assert not inspect.has_uniform_border(np.full((40, 40, 3), 255, np.uint8))


def test_verify_lists_bad_records(tmp_path):
    rows = [record("1", ["x"]), record("2", ["y"], formats.jpeg(2)[:300]), record("3", ["z"])]
    records.write(tmp_path / "set", {"train": rows}, name="n", info={})
    bad = tmp_path / "bad.jsonl"
    assert test_cli_data.run("verify", tmp_path / "set", "--quarantine", bad) == 1
    (line,) = map(json.loads, bad.read_text().splitlines())
    assert (line["split"], line["record"], line["key"]) == ("train", 1, "2") and line["reason"]
    left = without(records.open_split(tmp_path / "set", "train"), str(bad))
    assert [left[i]["key"] for i in range(len(left))] == ["1", "3"]


def test_filter_counts_by_rule(tmp_path, capsys):
    good = "two dogs on grass"
    rows = [record(str(i), [good]) for i in range(4)]
    rows += [
        record("10", [good], formats.jpeg(10, (300, 200))),  # 200 px is not more than 200
        record("11", [good], formats.jpeg(11, (900, 300))),  # an aspect of 3 is not less than 3
        record("12", [good], b"<html>"),
        record("13", ["two dogs", good]),
        record("14", ["dogs " * 21]),
        record("15", ["two dogs on zyzzyva"]),
        record("20", ["on grass two"]),
        record("21", ["On  grass two"]),
        record("22", ["on grass two"]),
    ]
    records.write(tmp_path / "in", {"train": rows}, name="n", info={})
    source = records.open_split(tmp_path / "in", "train")
    survey = lambda **rules: filter_lib.survey(source, filter_lib.Rules(**rules))
    numbers = [len(survey(max_images_per_text=n).shared_texts) for n in (1, 2, 3, 7, 8)]
    assert numbers == [2, 2, 1, 1, 0]  # [1, 1, 1, 3, 8] images of the texts, however written
    # of unigrams and bigrams all are kept but zyzzyva's two, which come last
    grams = {g for r in rows for c in r["captions"] for g in filter_lib._grams(c["text"])}
    num_kept = len(grams) - 2
    frequent = survey(num_frequent=num_kept).frequent
    assert frequent.has(sorted(grams)).tolist() == ["zyzzyva" not in g for g in sorted(grams)]
    assert survey(num_frequent=len(grams)).frequent is None
    flags = ("--max-images-per-text", 8, "--num-frequent", num_kept)
    assert test_cli_data.run("filter", tmp_path / "in", "--out", tmp_path / "out", *flags) == 0
    counts = json.loads(capsys.readouterr().out.splitlines()[0])
    assert {k: counts.get(k, 0) for k in filter_lib.RULES} == {
        "image_unreadable": 0,
        "row_unreadable": 0,
        "image_small": 1,
        "image_aspect": 1,
        "image_many_texts": 0,
        "text_short": 1,
        "text_long": 1,
        "text_shared": 0,
        "text_rare": 1,
    } | {"image_unreadable": 1}
    assert counts["records"] == 13 and counts["records_kept"] == 8 and counts["no_text"] == 2
    kept = records.open_split(tmp_path / "out", "train")
    assert [kept[i]["key"] for i in range(8)] == ["0", "1", "2", "3", "13", "20", "21", "22"]
    assert [c["text"] for c in kept[4]["captions"]] == [good]


def test_filter_by_repetition(tmp_path):
    same = formats.jpeg(7, (300, 250))
    rows = [record(str(i), ["on grass two"], same) for i in range(3)] + [record("8", ["a b c"])]
    records.write(tmp_path / "in", {"train": rows}, name="n", info={})
    source = records.open_split(tmp_path / "in", "train")
    for rule, limits in (
        ("image_many_texts", {"max_texts_per_image": 2}),
        ("text_shared", {"max_images_per_text": 2}),
    ):
        rules, counts = (
            dataclasses.replace(filter_lib.Rules(), **limits),
            filter_lib.collections.Counter(),
        )
        kept = list(filter_lib.apply(source, filter_lib.survey(source, rules), rules, counts))
        assert [r["key"] for r in kept] == ["8"] and counts[rule] == 3


def test_flags_and_rules_agree():
    from vlp.cli import data_options

    rules = {k.replace("_", "-"): v for k, v in dataclasses.asdict(filter_lib.Rules()).items()}
    assert data_options.RULES == rules


def test_tokenizer_and_bench(dataset_dir, tmp_path, capsys):
    out = tmp_path / "tok.model"
    flags = ("--vocab-size", 60, "--model-type", "bpe", "--langs", "en")
    assert test_cli_data.run("tokenizer", dataset_dir, "--out", out, *flags) == 0
    assert tokenizer.load(out).vocab_size <= 60
    capsys.readouterr()
    flags = ("--num-images", 20, "--batch", 4, "--image-px", 16)
    assert test_cli_data.run("bench", dataset_dir, *flags) == 0
    text = capsys.readouterr().out
    assert [line.split()[0] for line in text.splitlines()] == [
        "read", "image", "text", "all", "limits:", "loader",
    ]  # fmt: skip


def test_bench_of_a_bad_row(tmp_path, capsys):
    """Half of a surrogate pair, which no UTF-8 can hold: it costs what it costs, as in training."""
    for i in range(3):
        (tmp_path / f"{i}.jpg").write_bytes(formats.jpeg(i))
    captions = ("a cat", "half \ud800", "a dog")
    rows = [{"image": f"{i}.jpg", "caption": c} for i, c in enumerate(captions)]
    (tmp_path / "t.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    argv = ("bench", tmp_path / "t.jsonl", "--num-images", 3, "--batch", 2, "--image-px", 16)
    assert test_cli_data.run(*argv) == 0 and "limits:" in capsys.readouterr().out
