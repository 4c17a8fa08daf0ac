"""`vlp data`: builds the demo dataset, converts, inspects, filters, verifies, measures."""

import argparse
import collections
import dataclasses
import json
import os
import sys
import time

from vlp.cli import data_options
from vlp.core import check


def add_parser(subparsers) -> None:
    """Adds the subcommand `data` to the subparsers of `vlp`."""
    parser = subparsers.add_parser("data", help="build or verify a dataset", description=__doc__)
    parser.set_defaults(run=run)
    data_options.add_actions(parser)


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
    pieces = manifest["info"]["vocab_size"]
    print(f"{'vocabulary':14} {pieces:5d} pieces{_fewer(pieces, args.vocab_size)}")
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
        raise check.error("PATH", "''", "a directory, a shard or a table", "give its path")
    existed = _exists(args.out)
    args.splits = tuple(args.splits or sources.held(args.input))
    fields.check_splits(args.splits)
    job = convert.Job(
        args.input,
        args.out,
        splits=args.splits,
        given=data_options.fields_of(args),
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
            print(f"{split}: {told} (--no-group: one record per row)")
        if os.path.isdir(args.input) and (beside := sources.unread(kind, found)):
            print(f"{split}: not read beside them, by ending: {beside}")
    manifest = convert.run(
        job, workers=args.workers, runner=args.runner, runner_args=args.runner_args
    )
    for split, entry in manifest["splits"].items():
        held = ", held out of train (--val-fraction)" if split not in job.splits else ""
        print(f"{split}: {entry['num_records']} records in {len(entry['shards'])} shards{held}")
    if job.val_frac and "val" not in manifest["splits"]:
        print("val: none, because train has fewer than two different images")
    _tell_others(args)
    info = manifest["info"]
    if words := info.get("tokenizer"):
        fewer = _fewer(words["pieces"], args.tokenizer) if args.tokenizer.isdecimal() else ""
        pieces = f"{words['pieces']} pieces{fewer}"
        print(f"tokenizer: {pieces}, {words['from']}, sha256 {words['sha256'][:12]}…")
    print(f"left out: {info['left_out'] or 'nothing'}; keys repeated: {info['repeated_keys']}")
    if parts := info.get("parts_left_out"):
        print(f"parts that do not fit, left out of records: {parts}")
    for kind in ("tar", "folder", "img2dataset"):
        if counts := {s: c for s, c in info.get(kind, {}).items() if c}:
            print(f"{kind}: {counts}")
    print(f"{args.out}: {_SAME if existed else 'written'}, {time.monotonic() - begin:.1f} s")
    if words and "val" in manifest["splits"]:
        workdir = f"runs/{os.path.basename(os.path.abspath(args.out))}"
        print(f"next: vlp train --config configs/small.py:path={args.out} --workdir {workdir}")
    return 0


def _val(args: argparse.Namespace) -> dict:
    """Returns the arguments that `--val-fraction` adds to a job whose input has the splits `args.splits`."""
    from vlp.data.sources import fields

    has = set(fields.names_of("val")) & set(args.splits) or "train" not in args.splits
    if args.val_fraction and has:
        got = f"{args.val_fraction} beside the splits {list(args.splits)}"
        raise check.error(
            "--val-fraction", got, "'train' without a split val", "leave out --val-fraction"
        )
    return {"val_frac": args.val_fraction}


def _tell_others(args: argparse.Namespace) -> None:
    from vlp.data import sources

    if others := sources.others(args.input, args.splits):
        print(f"not asked for: {', '.join(others)} (name them after --splits)")


def _verify(args: argparse.Namespace) -> int:
    """Checks every digest, record and image; returns 1 if anything is wrong."""
    from vlp.data.tools import inspect

    begin, num = time.monotonic(), 0
    check.output_file("--quarantine", args.quarantine, new=True)
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

    source = sources.open_path(args.input, split, given=data_options.fields_of(args))
    if told := sources.grouped(source):
        print(f"{split}: {told} (--no-group: one record per row)", file=sys.stderr)
    return source


def _write_new(path: str, data: bytes) -> None:
    try:
        with open(path, "xb") as f:
            f.write(data)
    except FileExistsError:
        raise check.error(path, "a file", "a new file", "give the path of a new file") from None


def _page(args: argparse.Namespace, split: str) -> str:
    """Returns the name of a split's page; "" without --html."""
    stem, ending = os.path.splitext(args.html or "")
    return args.html or "" if len(args.splits) == 1 else f"{stem}-{split}{ending}" * bool(stem)


def _inspect(args: argparse.Namespace) -> int:
    from vlp.data.tools import inspect

    pages = {split: _page(args, split) for split in args.splits}
    for file in filter(None, pages.values()):
        check.output_file("--html", file, new=True)
    for split in args.splits:
        source = _open(args, split)
        found = inspect.numbers(source)
        if args.json:
            print(json.dumps({"split": split, **found}, indent=1, ensure_ascii=False))
        else:
            print(f"split {split}\n{inspect.text(found)}")
        if file := pages[split]:
            page = inspect.page(source, found, title=f"{args.input} · {split}")
            _write_new(file, page.encode())
            print(f"{file}: written")
    return 0


def _filter(args: argparse.Namespace) -> int:
    from vlp.data import records, sources
    from vlp.data.sources import fields
    from vlp.data.tools import filter as filter_lib
    from vlp.data.tools import prepare

    existed = _exists(args.out)
    args.splits = args.splits or sources.held(args.input)
    fields.check_splits(args.splits)
    rules = filter_lib.Rules(
        **{k: getattr(args, k) for k in (f.replace("-", "_") for f in data_options.RULES)}
    )
    counts = {split: collections.Counter() for split in args.splits}
    kept = {}
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
    finally:  # also if nothing is left: the counts say which rule is to blame
        for split, by_rule in counts.items():
            print(json.dumps({"split": split, **dict(sorted(by_rule.items()))}))
    _tell_others(args)
    print(f"{args.out}: {_SAME if existed else 'written'}")
    return 0


def _tokenizer(args: argparse.Namespace) -> int:
    from vlp.data import tokenizer, tokenizer_formats

    if bool(args.other) == bool(args.input):
        raise check.error(
            "vlp data tokenizer", "both or neither of PATH and --from", "one of them", "give one"
        )
    check.output_file("--out", args.out, new=True)
    if args.other:
        data = tokenizer.model_bytes(args.other)
        ours = data[:1] == b"{" or args.other.endswith(".model")  # else CLIP's BPE, under any name
        data = data if ours else tokenizer_formats.clip_bpe(data, args.other)
        if args.lower and data[:1] != b"{":
            raise check.error(
                "--lower", args.other, "a tokenizer.json or CLIP's BPE", "leave out --lower"
            )
        tokenizer.Tokenizer(data, args.other)  # raises if it is not a tokenizer
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
        raise check.error(
            "vlp data tokenizer",
            got,
            "at least one",
            "look at the captions with `vlp data inspect`",
        )
    tok = tokenizer.train(
        texts, args.vocab_size, lower=not args.keep_case, model_type=args.model_type
    )
    _write_new(args.out, tok.to_bytes())
    pieces = f"{tok.vocab_size} pieces{_fewer(tok.vocab_size, args.vocab_size)}"
    print(f"{args.out}: {pieces}, from {len(texts)} texts, {_policy(tok)}")
    print(f"left out: {dict(left_out) or 'nothing'}")
    print(f"sha256 {tok.sha256}")
    return 0


def _fewer(found: int, wanted: int | str) -> str:
    """What to add to a number of pieces if more were wanted."""
    return f", not {int(wanted):,}: these texts fill no more" if found < int(wanted) else ""


def _policy(tok) -> str:
    """Returns in words how a text is tokenized."""
    case = "lower-cases" if tok.lower else "keeps case"
    return f"{case}, [bos] pieces [eos] then {tok.pad_id}s, cut before eos"


def _texts(
    args: argparse.Namespace, langs: list[str], limit: int | None = None
) -> tuple[list[str], collections.Counter]:
    """Returns the captions in `langs` (empty: any), and how many rows or captions were left out, by reason.

    limit: of rows per split.
    """
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
    from vlp.data import tokenizer
    from vlp.data.config import Data
    from vlp.data.dataset import Dataset
    from vlp.data.tools import bench

    data = Data(
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
    except check.UserError:  # the dataset has none: train one of a usual size
        words = tokenizer.train(_texts(args, [], limit=1000)[0], 8000)
    dataset = Dataset(data, source, words)
    rates = bench.stages(dataset, args.num_images)
    for stage, rate in rates.items():
        print(f"{stage:6} {rate:10.1f} images/s on one core")
    slowest = min((s for s in rates if s != "all"), key=rates.__getitem__)
    print(f"limits: {slowest}, {rates['all'] / rates[slowest]:.0%} of the time")
    rate = bench.end_to_end(dataset, args.num_images, args.batch)
    print(f"loader {rate:10.1f} images/s ({args.read_threads} threads, {args.workers} processes)")
    return 0
