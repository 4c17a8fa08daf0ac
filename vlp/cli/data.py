"""`vlp data`: builds the demo dataset, converts, inspects, filters, verifies, measures."""

import argparse
import collections
import dataclasses
import json
import os
import sys
import time

from vlp.core import check


def add_parser(subparsers) -> None:
    """Adds the subcommand `data` to the subparsers of `vlp`."""
    parser = subparsers.add_parser("data", help="build or verify a dataset", description=__doc__)
    parser.set_defaults(run=run)
    actions = parser.add_subparsers(dest="action", required=True)
    emoji = actions.add_parser("emoji", help="build the emoji demo dataset (no download)")
    emoji.add_argument("--out", required=True, metavar="DIR", help="a new or empty directory")
    emoji.add_argument(
        "--image-px", type=_number, default=72, help="side of the images (default 72)"
    )
    emoji.add_argument("--vocab-size", type=int, default=1500, help="ceiling of the vocabulary")
    convert = actions.add_parser(
        "convert", help="folder, CSV, TSV, JSONL, Parquet, tar shards or TFDS → records"
    )
    _add_input(convert, splits=None)
    convert.add_argument("--out", required=True, metavar="DIR", help="a new or empty directory")
    convert.add_argument("--rows-per-shard", type=_number, default=16384, help="default 16384")
    convert.add_argument("--workers", type=_number, default=1, help="processes (default 1)")
    convert.add_argument("--strict", action="store_true", help="refuse tars with damaged tails")
    convert.add_argument("--check-images", action="store_true", help="leave out what cannot decode")
    convert.add_argument(
        "--val-fraction",
        type=_fraction,
        default=0.0,
        metavar="F",
        help="without a split val: hold this share of train out (default 0: none)",
    )
    convert.add_argument(
        "--tokenizer",
        default="auto",
        metavar="N|FILE",
        help="train N pieces on train's captions, or take a file; '' for none (default: the one"
        " beside the input, or one trained as large as the captions can fill)",
    )
    convert.add_argument("--runner", default="", help="of Apache Beam, instead of this machine")
    convert.add_argument("--runner-args", nargs="*", default=[], help="options of the runner")
    verify = actions.add_parser("verify", help="check digests and decode every image")
    verify.add_argument("dir", metavar="DIR")
    verify.add_argument("--quarantine", metavar="FILE", help="write the bad records here, as JSONL")
    inspect = actions.add_parser(
        "inspect", help="counts, sizes, lengths, repeats; a page of images"
    )
    _add_input(inspect)
    inspect.add_argument("--html", metavar="FILE", help="write a page with images and captions")
    keep = actions.add_parser("filter", help="ALIGN's image and text rules, with counts by rule")
    _add_input(keep, splits=None)
    keep.add_argument("--out", required=True, metavar="DIR", help="a new or empty directory")
    for flag, default in _RULES.items():
        keep.add_argument(f"--{flag}", type=type(default), default=default, help=f"[{default}]")
    words = actions.add_parser(
        "tokenizer", help="train SentencePiece on the captions, or import another's"
    )
    _add_input(words, optional=True)
    words.add_argument("--from", dest="other", metavar="FILE", help="tokenizer.json or CLIP's BPE")
    words.add_argument("--out", required=True, metavar="FILE", help="a new file")
    words.add_argument("--vocab-size", type=int, default=32000, help="ceiling (default 32000)")
    words.add_argument("--model-type", choices=("unigram", "bpe"), default="unigram")
    words.add_argument("--keep-case", action="store_true", help="no lower-casing")
    words.add_argument("--lower", action="store_true", help="lower-case before --from's own rules")
    words.add_argument("--langs", nargs="+", default=[], help="captions in these only")
    bench = actions.add_parser("bench", help="images/s by stage on one core, and what limits")
    _add_input(bench)
    bench.add_argument("--num-images", type=_number, default=500)
    bench.add_argument("--image-px", type=_number, default=224)
    bench.add_argument("--batch", type=_number, default=64)
    bench.add_argument("--read-threads", type=_number, default=2)
    bench.add_argument("--workers", type=int, default=0)


# flags of `vlp data filter`: the fields of vlp.data.tools.filter.Rules with the paper's numbers
_RULES = {
    "min-side-px": 200,
    "max-aspect": 3.0,
    "max-texts-per-image": 1000,
    "max-images-per-text": 10,
    "min-words": 3,
    "max-words": 20,
    "num-frequent": 100_000_000,
}


def _number(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected a whole number from 1 on")
    return int(text)


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
    """splits: those that are read by default; None: all that the input has."""
    nargs = "?" if optional else None
    parser.add_argument("input", metavar="PATH", nargs=nargs, help="a directory, shard or table")
    usual = f"default: {' '.join(splits) if splits else 'train, and val, test, dev if there are'}"
    parser.add_argument("--splits", nargs="+", default=splits, help=usual)
    for name in ("key", "image", "lang", "label"):
        off = "" if name == "image" else "; '' for none, whatever the columns are called"
        words = f'column, or a path into one ("a.b"){off}'
        parser.add_argument(f"--{name}", default=None, metavar="COLUMN", help=words)
    parser.add_argument("--captions", nargs="+", default=None, metavar="COLUMN", help="likewise")
    parser.add_argument("--default-lang", default="und", help="where no column says it")
    parser.add_argument(
        "--no-group", action="store_true", help="one record a row, though rows have the same image"
    )
    parser.add_argument(
        "--allow-outside",
        action="store_true",
        help="follow a table's or a link's paths out of the dataset's directory",
    )


def _fields(args: argparse.Namespace):
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


def run(args: argparse.Namespace) -> int:
    """Runs `vlp data`; returns the exit code."""
    actions = {
        "emoji": _emoji,
        "convert": _convert,
        "verify": _verify,
        "inspect": _inspect,
        "filter": _filter,
        "tokenizer": _tokenizer,
        "bench": _bench,
    }
    try:
        return actions[args.action](args)
    except (OSError, MemoryError, RuntimeError) as e:
        if fault := check.machine(getattr(e, "filename", None) or f"vlp data {args.action}", e):
            raise fault from None
        if not isinstance(e, OSError) or not e.filename:
            raise
        got, do = f"{e.strerror} ({type(e).__name__})", "check the path and its permissions"
        raise check.error(e.filename, got, "a path to read or a place to write", do) from None


def _emoji(args: argparse.Namespace) -> int:
    from vlp.data import emoji

    begin = time.monotonic()
    existed = _exists(args.out)
    manifest = emoji.build(args.out, image_px=args.image_px, vocab_size=args.vocab_size)
    for split, entry in manifest["splits"].items():
        bases = manifest["info"]["num_bases"][split]
        print(f"{split:14} {entry['num_records']:5d} images of {bases:4d} emoji")
    print(f"{'vocabulary':14} {manifest['info']['vocab_size']:5d} pieces")
    print(f"{args.out}: {_SAME if existed else 'written'}, {time.monotonic() - begin:.1f} s")
    print(f"{manifest['info']['attribution']} ({manifest['info']['license']})")
    return 0


_SAME = "the same dataset was already there"


def _exists(out: str) -> bool:
    from vlp.data import records

    records.refuse_foreign(out)
    return os.path.isfile(os.path.join(out, records.MANIFEST))


def _convert(args: argparse.Namespace) -> int:
    from vlp.data import sources
    from vlp.data.sources import fields
    from vlp.data.tools import convert

    begin = time.monotonic()
    if not args.input:
        raise check.error("PATH", "''", "a directory, a shard or a table", "name one")
    existed = _exists(args.out)
    args.splits = tuple(args.splits or sources.held(args.input))
    fields.check_splits(args.splits)
    job = convert.Job(
        args.input,
        args.out,
        splits=args.splits,
        given=_fields(args),
        rows_per_shard=args.rows_per_shard,
        strict=args.strict,
        check_images=args.check_images,
        tokenizer=args.tokenizer,
        **_val(args),
    )
    for split in job.splits:
        source = job.source(split)
        kind, found = sources.find(args.input, split)
        shown = convert.shown(source, job.given)
        note = f" {how}" if (how := getattr(source, "how", "")) else ""
        num_rows = getattr(source, "num_rows", len(source))
        print(f"{split}: {num_rows} rows of {kind}, {shown}{note}")
        if told := sources.grouped(source):
            print(f"{split}: {told} (--no-group: one record a row)")
        if os.path.isdir(args.input) and (beside := sources.unread(kind, found)):
            print(f"{split}: not read beside them, by ending: {beside}")
    manifest = convert.run(
        job, workers=args.workers, runner=args.runner, runner_args=args.runner_args
    )
    for split, entry in manifest["splits"].items():
        held = ", held out of train (--val-fraction)" if split not in job.splits else ""
        print(f"{split}: {entry['num_records']} records in {len(entry['shards'])} shards{held}")
    if job.val_frac and "val" not in manifest["splits"]:
        print("val: none, as train has fewer than two different images")
    _tell_others(args)
    info = manifest["info"]
    if words := info.get("tokenizer"):
        print(
            f"tokenizer: {words['pieces']} pieces, {words['from']}, sha256 {words['sha256'][:12]}…"
        )
    print(f"left out: {info['left_out'] or 'nothing'}; keys repeated: {info['repeated_keys']}")
    if plan := info.get("parts_left_out"):
        print(f"plan that do not fit, left out of records: {plan}")
    for kind in ("tar", "folder", "img2dataset"):
        if counts := {s: c for s, c in info.get(kind, {}).items() if c}:
            print(f"{kind}: {counts}")
    print(f"{args.out}: {_SAME if existed else 'written'}, {time.monotonic() - begin:.1f} s")
    if words and "val" in manifest["splits"]:
        workdir = f"runs/{os.path.basename(os.path.abspath(args.out))}"
        print(f"next: vlp train --config configs/small.py:path={args.out} --workdir {workdir}")
    return 0


def _val(args: argparse.Namespace) -> dict:
    """What `--val-fraction` asks of a job whose input has the splits `args.splits`."""
    from vlp.data.sources import fields

    has = set(fields.names_of("val")) & set(args.splits) or "train" not in args.splits
    if args.val_fraction and has:
        got = f"{args.val_fraction} beside the splits {list(args.splits)}"
        raise check.error("--val-fraction", got, "'train' without a split val", "drop it")
    return {"val_frac": args.val_fraction}


def _tell_others(args: argparse.Namespace) -> None:
    from vlp.data import sources

    if others := sources.others(args.input, args.splits):
        print(f"not asked for: {', '.join(others)} (name them after --splits)")


def _verify(args: argparse.Namespace) -> int:
    """Checks every digest, record and image; returns 1 if anything is wrong."""
    from vlp.data.tools import inspect

    begin, num = time.monotonic(), 0
    if args.quarantine:
        _write_new(args.quarantine, b"")

    def tell(line: str, row: dict | None) -> None:
        nonlocal num
        num += 1
        print(line)
        if row and args.quarantine:
            with open(args.quarantine, "a", encoding="utf-8") as f:
                f.write(json.dumps(row) + "\n")

    total = inspect.verify(args.dir, tell)
    verdict = f"{num} problems" if num else "good"
    print(f"{args.dir}: {verdict}, {total} records read, {time.monotonic() - begin:.1f} s")
    return 1 if num else 0


def _open(args: argparse.Namespace, split: str):
    from vlp.data import sources

    source = sources.open_path(args.input, split, given=_fields(args))
    if told := sources.grouped(source):
        print(f"{split}: {told} (--no-group: one record a row)", file=sys.stderr)
    return source


def _write_new(path: str, data: bytes) -> None:
    try:
        with open(path, "xb") as f:
            f.write(data)
    except FileExistsError:
        raise check.error(path, "a file", "a new file", "choose another name") from None


def _inspect(args: argparse.Namespace) -> int:
    from vlp.data.tools import inspect

    for split in args.splits:
        source = _open(args, split)
        found = inspect.numbers(source)
        print(json.dumps({"split": split, **found}, indent=1, ensure_ascii=False))
        if args.html:
            stem, ending = os.path.splitext(args.html)
            file = args.html if len(args.splits) == 1 else f"{stem}-{split}{ending}"
            page = inspect.page(source, found, title=f"{args.input} · {split}")
            _write_new(file, page.encode())
            print(f"{file}: written")
    return 0


def _filter(args: argparse.Namespace) -> int:
    from vlp.data import records, sources
    from vlp.data.sources import fields
    from vlp.data.tools import filter as filter_lib
    from vlp.data.tools import prepare

    args.splits = args.splits or sources.held(args.input)
    fields.check_splits(args.splits)
    rules = filter_lib.Rules(**{k: getattr(args, k) for k in (f.replace("-", "_") for f in _RULES)})
    counts = {split: collections.Counter() for split in args.splits}
    kept, existed = {}, _exists(args.out)
    for split in args.splits:
        source = _open(args, split)
        kept[split] = filter_lib.apply(
            source, filter_lib.survey(source, rules), rules, counts[split]
        )
    info = {"filter": dataclasses.asdict(rules), "input": os.path.basename(args.input)}
    words = prepare.given_tokenizer(prepare.AUTO, sources.tokenizer_file(args.input))
    more = {records.TOKENIZER: words.to_bytes()} if words else {}
    try:
        records.write(args.out, kept, name=os.path.basename(args.out), info=info, files=more)
    finally:  # also when nothing is left: they say by which rule
        for split, by_rule in counts.items():
            print(json.dumps({"split": split, **dict(sorted(by_rule.items()))}))
    _tell_others(args)
    print(f"{args.out}: {_SAME if existed else 'written'}")
    return 0


def _tokenizer(args: argparse.Namespace) -> int:
    from vlp.data import tokenizer, tokenizer_formats

    if bool(args.other) == bool(args.input):
        raise check.error(
            "vlp data tokenizer", "both or neither of PATH and --from", "one", "drop one"
        )
    if args.other:
        data = tokenizer.model_bytes(args.other)
        ours = data[:1] == b"{" or args.other.endswith(".model")  # else: whatever CLIP's has become
        data = data if ours else tokenizer_formats.clip_bpe(data, args.other)
        if args.lower and data[:1] != b"{":
            raise check.error("--lower", args.other, "a tokenizer.json or CLIP's BPE", "drop it")
        tokenizer.Tokenizer(data, args.other)  # refuses what is none
        tok = tokenizer.Tokenizer(
            tokenizer_formats.lowered(data, args.other) if args.lower else data
        )
        _write_new(args.out, tok.to_bytes())
        print(f"{args.out}: {tok.vocab_size} pieces, {_policy(tok)}, sha256 {tok.sha256}")
        if tok.roles:
            print(f"special tokens: {', '.join(f'{r} {t!r}' for r, t in tok.roles.items())}")
        return 0
    texts, left_out = _texts(args, args.langs)
    if not texts:
        got = f"no caption in {args.langs or args.input} (left out: {dict(left_out)})"
        raise check.error("vlp data tokenizer", got, "some", "see them by `vlp data inspect`")
    tok = tokenizer.train(
        texts, args.vocab_size, lower=not args.keep_case, model_type=args.model_type
    )
    _write_new(args.out, tok.to_bytes())
    print(f"{args.out}: {tok.vocab_size} pieces from {len(texts)} texts, {_policy(tok)}")
    print(f"left out: {dict(left_out) or 'nothing'}")
    print(f"sha256 {tok.sha256}")
    return 0


def _policy(tok) -> str:
    """What becomes of a text, in words."""
    case = "lower-cases" if tok.lower else "keeps case"
    return f"{case}, [bos] pieces [eos] then {tok.pad_id}s, cut before eos"


def _texts(
    args: argparse.Namespace, langs: list[str], limit: int | None = None
) -> tuple[list[str], collections.Counter]:
    """The captions in `langs` (empty: any), and how many rows or captions were left out, by reason."""
    from vlp.data import text_ops

    texts, left_out = [], collections.Counter()
    for split in args.splits:
        source = _open(args, split)
        for i in range(len(source) if limit is None else min(limit, len(source))):
            try:
                captions = source[i]["captions"]
            except check.UserError:
                raise
            except ValueError as e:  # a bad image or row
                left_out[getattr(e, "reason", "unreadable")] += 1
                continue
            left_out["no_caption"] += not captions
            for caption in captions:
                if not text_ops.is_caption(caption):
                    left_out["bad_caption"] += 1
                elif text_ops.is_invisible(caption["text"]):
                    left_out["no_caption"] += 1
                elif langs and caption["lang"] not in langs:
                    left_out["other_language"] += 1
                else:
                    texts.append(caption["text"])
    return texts, +left_out


def _bench(args: argparse.Namespace) -> int:
    from vlp.data import loader, tokenizer
    from vlp.data.tools import bench

    data = loader.Data(
        path=args.input,
        split=args.splits[0],
        image_px=args.image_px,
        langs=(),
        read_threads=args.read_threads,
        workers=args.workers,
        bad_records="replace",
    )
    source = _open(args, data.split)
    try:
        words = source.tokenizer()
    except check.UserError:  # none beside the data: any of about the usual size will do
        words = tokenizer.train(_texts(args, [], limit=1000)[0], 8000, model_type="bpe")
    dataset = loader.Dataset(data, source, words)
    rates = bench.stages(dataset, args.num_images)
    for stage, rate in rates.items():
        print(f"{stage:6} {rate:10.1f} images/s on one core")
    slowest = min((s for s in rates if s != "all"), key=rates.__getitem__)
    print(f"limits: {slowest}, {rates['all'] / rates[slowest]:.0%} of the time")
    rate = bench.end_to_end(dataset, args.num_images, args.batch)
    print(f"loader {rate:10.1f} images/s ({args.read_threads} threads, {args.workers} processes)")
    return 0
