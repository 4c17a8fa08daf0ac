"""The command-line options of each action of `vlp data`."""

import argparse


def add_actions(parser: argparse.ArgumentParser) -> None:
    """Adds the actions (emoji, convert, verify, …) and their options to the parser of `vlp data`."""
    actions = parser.add_subparsers(dest="action", required=True)
    emoji = actions.add_parser("emoji", help="build the emoji demo dataset (no download)")
    emoji.add_argument("--out", required=True, metavar="DIR", help="a new or empty directory")
    emoji.add_argument(
        "--image-px", type=_number, default=72, help="side of the images (default 72)"
    )
    emoji.add_argument(
        "--vocab-size", type=_number, default=1500, help="largest vocabulary (default 1500)"
    )
    convert = actions.add_parser(
        "convert", help="folder, CSV, TSV, JSONL, Parquet, tar shards or TFDS → records"
    )
    _add_input(convert, splits=None)
    convert.add_argument("--out", required=True, metavar="DIR", help="a new or empty directory")
    convert.add_argument("--rows-per-shard", type=_number, default=16384, help="default 16384")
    convert.add_argument("--workers", type=_number, default=1, help="processes (default 1)")
    convert.add_argument(
        "--strict",
        action="store_true",
        help="raise an error for tars with damaged or omitted parts",
    )
    convert.add_argument(
        "--check-images", action="store_true", help="decode every image; leave out those that fail"
    )
    convert.add_argument(
        "--max-px",
        type=_number,
        default=0,
        metavar="N",
        help="shrink images whose shorter side is longer than N pixels, as JPEG (default: none)",
    )
    convert.add_argument(
        "--val-fraction",
        type=_fraction,
        default=0.0,
        metavar="F",
        help="fraction of train to hold out, if there is no split val (default 0)",
    )
    convert.add_argument(
        "--tokenizer",
        default="auto",
        metavar="N|FILE",
        help="train N pieces on the captions of train, or use a file; '' for none (default: the"
        " input's tokenizer, or else a new one with as many pieces as the captions allow)",
    )
    convert.add_argument(
        "--runner", default="", help="Apache Beam runner to use instead of this machine"
    )
    convert.add_argument("--runner-args", nargs="*", default=[], help="options of the runner")
    verify = actions.add_parser("verify", help="check digests and decode every image")
    verify.add_argument("dir", metavar="DIR")
    verify.add_argument("--quarantine", metavar="FILE", help="write the bad records here, as JSONL")
    inspect = actions.add_parser(
        "inspect", help="report image sizes, caption lengths and duplicates; write a page of images"
    )
    _add_input(inspect)
    inspect.add_argument(
        "--json", action="store_true", help="print JSON; lists are [min, 25 %%, median, 75 %%, max]"
    )
    inspect.add_argument("--html", metavar="FILE", help="write a page with images and captions")
    keep = actions.add_parser(
        "filter", help="apply ALIGN's image and text rules; print a count per rule"
    )
    _add_input(keep, splits=None)
    keep.add_argument("--out", required=True, metavar="DIR", help="a new or empty directory")
    for flag, default in RULES.items():
        keep.add_argument(f"--{flag}", type=type(default), default=default, help=f"[{default}]")
    words = actions.add_parser(
        "tokenizer", help="train SentencePiece on the captions, or import a tokenizer"
    )
    _add_input(words, optional=True)
    words.add_argument("--from", dest="other", metavar="FILE", help="tokenizer.json or CLIP's BPE")
    words.add_argument("--out", required=True, metavar="FILE", help="a new file")
    words.add_argument(
        "--vocab-size", type=_number, default=32000, help="largest size (default 32000)"
    )
    words.add_argument(
        "--model-type", choices=("bpe", "unigram"), default="bpe", help="default bpe (byte pairs)"
    )
    words.add_argument("--keep-case", action="store_true", help="do not lower-case")
    words.add_argument(
        "--lower", action="store_true", help="lower-case, then apply the rules of the --from file"
    )
    words.add_argument(
        "--langs", nargs="+", default=[], help="use only captions in these languages"
    )
    bench = actions.add_parser(
        "bench", help="measure images/s of each stage on one core; name the slowest stage"
    )
    _add_input(bench)
    bench.add_argument("--num-images", type=_number, default=500)
    bench.add_argument("--image-px", type=_number, default=224)
    bench.add_argument("--batch", type=_number, default=64)
    bench.add_argument("--read-threads", type=_number, default=2)
    bench.add_argument("--workers", type=_count, default=0)


# Flags and defaults of `vlp data filter`: the fields of vlp.data.tools.filter.Rules, with ALIGN's values.
RULES = {
    "min-side-px": 200,
    "max-aspect": 3.0,
    "max-texts-per-image": 1000,
    "max-images-per-text": 10,
    "min-words": 3,
    "max-words": 20,
    "num-frequent": 100_000_000,
}


def _number(text: str, least: int = 1) -> int:
    if not text.isdecimal() or not least <= int(text) < 2**31:
        limits = f"{least} to 2^31 - 1"
        raise argparse.ArgumentTypeError(f"got {text!r:.40}, expected a whole number, {limits}")
    return int(text)


def _count(text: str) -> int:
    return _number(text, least=0)


def _fraction(text: str) -> float:
    try:
        found = float(text)
    except ValueError:
        found = -1.0
    if not 0 <= found < 1:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected a number in [0, 1)")
    return found


def _add_input(
    parser: argparse.ArgumentParser,
    *,
    optional: bool = False,
    splits: tuple[str, ...] | None = ("train",),
) -> None:
    """Adds the options of an action's input.

    Args:
        parser: the action's parser.
        optional: whether the input may be omitted.
        splits: splits read by default; None: all splits of the input.
    """
    nargs = "?" if optional else None
    parser.add_argument("input", metavar="PATH", nargs=nargs, help="a directory, shard or table")
    splits_help = (
        f"default: {' '.join(splits) if splits else 'train, and val, test, dev if they exist'}"
    )
    parser.add_argument("--splits", nargs="+", default=splits, help=splits_help)
    for name in ("key", "image", "lang", "label"):
        off = "" if name == "image" else "; '' to use no column"
        words = f'column, or a path into one ("a.b"){off}'
        parser.add_argument(f"--{name}", default=None, metavar="COLUMN", help=words)
    parser.add_argument(
        "--captions",
        nargs="+",
        default=None,
        metavar="COLUMN",
        help="columns or paths, as for --key",
    )
    parser.add_argument(
        "--default-lang",
        default="und",
        help="language of captions if no column gives it (default und)",
    )
    parser.add_argument(
        "--no-group",
        action="store_true",
        help="write one record per row, even if several rows share an image",
    )
    parser.add_argument(
        "--allow-outside",
        action="store_true",
        help="allow table paths and links that point outside of the dataset's directory",
    )


def fields_of(args: argparse.Namespace):
    """Returns the columns that --key, --image, --captions, --lang and --label name (`sources.fields.Fields`)."""
    from vlp.data.sources import fields

    named = {name: getattr(args, name) for name in fields.GUESSED}
    return fields.Fields(
        key=args.key or "",
        image=args.image or "",
        captions=tuple(filter(None, args.captions or ())),
        lang=args.lang or "",
        label=args.label or "",
        default_lang=args.default_lang,
        off=tuple(n for n, v in named.items() if v in ("", [""])),
        group=not args.no_group,
        allow_outside=args.allow_outside,
    )
