"""`vlp data`: builds the demo dataset, converts, verifies."""

import argparse
import os
import time

from vlp.core import check


def add_parser(subparsers) -> None:
    """Adds the subcommand `data` to the subparsers of `vlp`."""
    parser = subparsers.add_parser("data", help="build or verify a dataset", description=__doc__)
    parser.set_defaults(run=run)
    actions = parser.add_subparsers(dest="action", required=True)
    emoji = actions.add_parser("emoji", help="build the emoji demo dataset (no download)")
    emoji.add_argument("--out", required=True, metavar="DIR", help="a new or empty directory")
    emoji.add_argument("--image-px", type=int, default=72, help="side of the images (default 72)")
    emoji.add_argument("--vocab-size", type=int, default=1500, help="ceiling of the vocabulary")
    convert = actions.add_parser(
        "convert", help="folder, CSV, TSV, JSONL, Parquet, tar shards or TFDS → records"
    )
    _add_input(convert)
    convert.add_argument("--out", required=True, metavar="DIR", help="a new or empty directory")
    convert.add_argument("--rows-per-shard", type=int, default=16384, help="default 16384")
    convert.add_argument("--workers", type=int, default=1, help="processes (default 1)")
    convert.add_argument("--strict", action="store_true", help="refuse tars with damaged tails")
    convert.add_argument("--check-images", action="store_true", help="leave out what cannot decode")
    convert.add_argument("--runner", default="", help="of Apache Beam, instead of this machine")
    convert.add_argument("--runner-args", nargs="*", default=[], help="options of the runner")
    verify = actions.add_parser("verify", help="check digests and decode every image")
    verify.add_argument("dir", metavar="DIR")


def _add_input(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("input", metavar="PATH", help="a directory, shard or table")
    parser.add_argument("--splits", nargs="+", default=["train"], help="default: train")
    for name in ("key", "image", "lang", "label"):
        parser.add_argument(f"--{name}", default="", metavar="COLUMN")
    parser.add_argument("--captions", nargs="+", default=[], metavar="COLUMN")
    parser.add_argument("--default-lang", default="und", help="where no column says it")


def _fields(args: argparse.Namespace):
    from vlp.data.sources import fields

    return fields.Fields(
        args.key, args.image, tuple(args.captions), args.lang, args.label, args.default_lang
    )


def run(args: argparse.Namespace) -> int:
    """Runs `vlp data`; returns the exit code."""
    return {"emoji": _emoji, "convert": _convert, "verify": _verify}[args.action](args)


def _emoji(args: argparse.Namespace) -> int:
    from vlp.data import emoji, records

    begin = time.monotonic()
    existed = os.path.isfile(os.path.join(args.out, records.MANIFEST))
    manifest = emoji.build(args.out, image_px=args.image_px, vocab_size=args.vocab_size)
    for split, entry in manifest["splits"].items():
        bases = manifest["info"]["num_bases"][split]
        print(f"{split:14} {entry['num_records']:5d} images of {bases:4d} emoji")
    print(f"{'vocabulary':14} {manifest['info']['vocab_size']:5d} pieces")
    state = "the same dataset was already there" if existed else "written"
    print(f"{args.out}: {state}, {time.monotonic() - begin:.1f} s")
    print(f"{manifest['info']['attribution']} ({manifest['info']['license']})")
    return 0


def _convert(args: argparse.Namespace) -> int:
    from vlp.data import convert, sources

    begin = time.monotonic()
    job = convert.Job(
        args.input,
        args.out,
        splits=tuple(args.splits),
        given=_fields(args),
        rows_per_shard=args.rows_per_shard,
        strict=args.strict,
        check_images=args.check_images,
    )
    for split in job.splits:
        source = job.source(split)
        kind, _ = sources.find(args.input, split)
        shown = convert.shown(source, job.given)
        separator = getattr(source, "separator", "")
        note = f" separator={separator!r}" if separator else ""
        print(f"{split}: {len(source)} rows of {kind}, {shown}{note}")
    manifest = convert.run(
        job, workers=args.workers, runner=args.runner, runner_args=args.runner_args
    )
    for split, entry in manifest["splits"].items():
        print(f"{split}: {entry['num_records']} records in {len(entry['shards'])} shards")
    info = manifest["info"]
    print(f"left out: {info['left_out'] or 'nothing'}; keys repeated: {info['repeated_keys']}")
    for kind in ("tar", "img2dataset"):
        if counts := {s: c for s, c in info.get(kind, {}).items() if c}:
            print(f"{kind}: {counts}")
    print(f"{args.out}: written, {time.monotonic() - begin:.1f} s")
    return 0


def _verify(args: argparse.Namespace) -> int:
    """Checks every digest, record and image; returns 2 if anything is wrong."""
    from vlp.data import image_ops, records

    begin, problems, total = time.monotonic(), [], 0
    manifest = records.read_manifest(args.dir)
    for file, entry in manifest.get("files", {}).items():
        try:
            records.check_file(os.path.join(args.dir, file), entry, hashed=True)
        except check.UserError as e:
            problems.append(str(e))
    for split in manifest["splits"]:
        try:
            source = records.open_split(args.dir, split, hashed=True)
        except check.UserError as e:
            problems.append(str(e))
            continue
        keys = set()
        for i in range(len(source)):
            record = source[i]
            keys.add(record["key"])
            try:
                records.encode(record)
                image_ops.decode(record["image"])
            except (check.UserError, image_ops.BadImage) as e:
                problems.append(f"{split} record {i} (key {record['key']!r}): {e}")
        if len(keys) < len(source):
            problems.append(f"{split}: {len(source) - len(keys)} keys occur more than once")
        total += len(source)
    for problem in problems:
        print(problem)
    verdict = f"{len(problems)} problems" if problems else "good"
    print(f"{args.dir}: {verdict}, {total} records read, {time.monotonic() - begin:.1f} s")
    return 2 if problems else 0
