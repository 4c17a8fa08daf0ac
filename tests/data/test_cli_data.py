"""`vlp data`: builds, repeats, verifies."""

import argparse

import pytest

from vlp.cli import data as cli
from vlp.core import check


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
    assert run("verify", dataset_dir) == 2
    out = capsys.readouterr().out
    assert "changed bytes" in out and "1 problems" in out
    with pytest.raises(check.UserError, match="vlp data emoji"):
        run("verify", dataset_dir / "none")


def test_emoji_repeats(emoji_dir, capsys):
    assert run("emoji", "--out", emoji_dir, "--image-px", 16) == 0
    out = capsys.readouterr().out
    assert "same dataset was already there" in out and "CC BY-SA 4.0" in out
    assert "200 images of  200 emoji" in out
