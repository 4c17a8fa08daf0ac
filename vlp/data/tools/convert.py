"""`vlp data convert`: any source → ArrayRecord shards, on one machine or on Apache Beam.

Output shard j is a pure function of input rows j·n … (j+1)·n - 1, so it does not matter who makes
it or in what order: a killed conversion keeps its finished shards and goes on, and every runner
gives the same bytes. Rows that cannot be a record are left out, counted by reason and listed in
`left_out.jsonl`. Not here: reading the formats (sources/), what is held out (prepare.py).
"""

import collections
import concurrent.futures
import dataclasses
import functools
import hashlib
import importlib
import itertools
import json
import multiprocessing
import os
import pathlib
import shutil
import stat
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from vlp.core import check, progress
from vlp.data import counts, image_ops, processes, records, sources
from vlp.data import tokenizer as tokenizers
from vlp.data.sources import fields, files, tables, tar
from vlp.data.tools import prepare

LEFT_OUT = "left_out.jsonl"
INPUTS = ".inputs"  # in the output, unknown to its manifest: what the input files looked like


@dataclasses.dataclass(frozen=True)
class Job:
    """One conversion. The work directory must be seen by all workers (a shared file system)."""

    path: str
    out: str
    splits: tuple[str, ...] = ("train",)
    given: fields.Fields = fields.Fields()
    rows_per_shard: int = 16384
    strict: bool = False
    check_images: bool = False  # decode every image; what fails is left out
    val_frac: float = 0.0  # of the rows of "train" that become "val" (0: none)
    max_val: int = 0  # … so many at most (0: any number)
    tokenizer: str = ""  # for the dataset: prepare.AUTO, pieces to train, a file, or "" for none

    @property
    def work(self) -> str:
        """Where finished shards wait: a sibling of `out`, removed at the end."""
        head, tail = os.path.split(os.path.abspath(self.out))
        return os.path.join(head, f".{tail}.convert")

    def source(self, split: str) -> records.Source:
        """Returns the opened input (opened once per process); it compares images of any size."""
        given = dataclasses.replace(self.given, group=self.given.group is not False)
        return _opened(self.path, split, self.strict, given)

    @property
    def written(self) -> tuple[str, ...]:
        """The splits of the output."""
        return (*self.splits, "val") if self.val_frac else self.splits

    @property
    def held_out(self) -> str:
        """The file that says which rows of "train" become "val"."""
        return os.path.join(self.work, "val.npy")

    def part(self, split: str) -> records.Source:
        """Returns what becomes a split of the output: a split of the input, or a part of one."""
        if not self.val_frac or split not in ("train", "val"):
            return self.source(split)
        return prepare.Subset(self.source("train"), _rows(self.held_out), others=split == "train")


@functools.lru_cache(maxsize=8)
def _opened(path: str, split: str, strict: bool, given: fields.Fields) -> records.Source:
    return records.in_order(sources.open_path(path, split, strict=strict, given=given))


@functools.lru_cache(maxsize=1)
def _rows(path: str) -> np.ndarray:
    return np.load(path)


def run(job: Job, *, workers: int = 1, runner: str = "", runner_args: Sequence[str] = ()) -> dict:
    """Converts and returns the manifest; a second call after a kill goes on where it stopped.

    runner: "" for this machine (`workers` processes), else a runner of Apache Beam.
    Raises: `UserError` if `out` or the work directory belongs to something else.
    """
    _opened.cache_clear()
    _rows.cache_clear()
    if job.rows_per_shard < 1:
        raise check.error("rows_per_shard", job.rows_per_shard, "at least 1", "raise it")
    if workers < 1:
        raise check.error("workers", workers, "at least 1", "raise it")
    if not 0 <= job.val_frac < 1:
        raise check.error("val_frac", job.val_frac, "in [0, 1)", "correct it")
    if job.val_frac and ("train" not in job.splits or "val" in job.splits):
        got = f"{job.val_frac} beside the splits {list(job.splits)}"
        raise check.error("val_frac", got, "'train' and no 'val'", "set it to 0")
    fields.check_splits(job.splits)
    records.refuse_foreign(job.out)
    _refuse_foreign_work(job)
    beam = _beam(runner) if runner else None
    plan = _plan(job)
    if _done(job, plan):
        shutil.rmtree(job.work, ignore_errors=True)
        return records.read_manifest(job.out)
    _claim(job, plan)

    def do(make: Callable, todo: list, what: str) -> None:
        done = 0
        with progress.phase(lambda: f"{what}: {done} of {len(todo)} blocks of rows done"):
            if beam:
                _on_beam(beam, make, todo, runner, runner_args)
            elif workers > 1 and len(todo) > 1:
                spawn = multiprocessing.get_context("spawn")
                end, pool = processes.end_with_parent, concurrent.futures.ProcessPoolExecutor
                with (
                    processes.without_main(),
                    pool(workers, mp_context=spawn, initializer=end) as made,
                ):
                    for done, _ in enumerate(made.map(make, todo), start=1):  # noqa: B007
                        pass
            else:
                for done, task in enumerate(todo):  # noqa: B007
                    make(task)

    if job.val_frac and not os.path.isfile(job.held_out):
        _hold_out(job, do)
    tasks = [(s, j) for s in job.written for j in range(_num_shards(job, s))]
    todo = [t for t in tasks if not os.path.isfile(f"{_shard(job, *t)}.json")]
    do(functools.partial(make_shard, job), todo, "writing records")
    return _publish(job, plan, tasks)


def _refuse_foreign_work(job: Job) -> None:
    """Raises a `UserError` for a work directory that is a link, no directory or another user's: what is
    written and removed there must be our own."""
    try:
        found = os.lstat(job.work)
    except FileNotFoundError:
        return
    got = ""
    if stat.S_ISLNK(found.st_mode):
        got = f"a link to {os.readlink(job.work)}"
    elif not stat.S_ISDIR(found.st_mode):
        got = "no directory"
    elif found.st_uid != os.geteuid():
        got = f"a directory of the user {found.st_uid}"
    if got:
        expected, do = "nothing, or a directory of yours", "remove it or choose another --out"
        raise check.error(f"work directory {job.work}", got, expected, do)


def _hold_out(job: Job, do: Callable[[Callable, list, str], None]) -> None:
    """Decides which rows become "val", after a look at the images of all."""
    blocks = -(-len(job.source("train")) // job.rows_per_shard)
    paths = [_looked(job, number) for number in range(blocks)]
    todo = [n for n, p in enumerate(paths) if not os.path.isfile(p)]
    do(functools.partial(look, job), todo, "looking for copies of images, for val")
    rows = prepare.hold_out(prepare.Blocks(paths), job.val_frac, job.max_val)
    _save(job.held_out, rows)


def look(job: Job, number: int) -> None:
    """Writes the digests of the images in block `number` of the rows of "train"."""
    source, first = job.source("train"), number * job.rows_per_shard
    rows = range(first, min(first + job.rows_per_shard, len(source)))
    digests = np.full(len(rows), prepare.NO_IMAGE)
    for k, i in enumerate(rows):
        record, reason, _, _ = _row(job, source, i)
        if not reason:
            digests[k] = prepare.digest(record["image"])
    _save(_looked(job, number), digests)


def _looked(job: Job, number: int) -> str:
    return os.path.join(job.work, f"look-{number:05d}.npy")


def _save(path: str, array: np.ndarray) -> None:
    part = f"{path}.{os.getpid()}.part"
    with open(part, "wb") as f:
        np.save(f, array)
    os.replace(part, path)


def make_shard(job: Job, task: tuple[str, int]) -> None:
    """Writes one shard and then, as the sign that it is whole, its .json."""
    split, number = task
    source, path = job.part(split), _shard(job, split, number)
    first = number * job.rows_per_shard
    keys, left_out, parts = [], [], collections.Counter()
    words: list[str] = []  # for the tokenizer
    step = prepare.step(len(source)) if split == "train" and job.tokenizer else 0

    def rows() -> Iterator[dict]:
        for i in range(first, min(first + job.rows_per_shard, len(source))):
            record, reason, detail, notes = _row(job, source, i)
            if reason:
                entry = {"split": split, "row": i} | _place(source, i)
                entry |= {"key": record["key"]} if record.get("key") else {}
                entry |= {"reason": reason} | ({"detail": detail} if detail else {})
                left_out.append(entry)
            else:
                keys.append(record["key"])
                if step and i % step == 0:
                    words.extend(caption["text"] for caption in record["captions"])
                parts.update(part for part, _ in notes.parts)
                left_out.extend({"split": split, **row, "key": record["key"]} for row in notes.rows)
                yield record

    part = f"{path}.{os.getpid()}.part"
    records.write_shard(part, rows())
    entry = {"records": len(keys), **records.file_entry(part)}
    os.replace(part, path)
    found = {"entry": entry, "keys": keys, "left_out": left_out, "parts": parts, "words": words}
    text = json.dumps(found)
    with open(part, "w", encoding="utf-8") as f:
        f.write(text)
    os.replace(part, f"{path}.json")


def _row(job: Job, source: records.Source, i: int) -> tuple[dict, str, str, fields.Notes]:
    """Returns (record, "", "", what of it is left out) or (what is known of it, why it is left out,
    detail, …)."""
    notes = fields.Notes()
    try:
        read = getattr(source, "read", None)  # of our own records, nothing is left out
        record, notes = read(i) if read else (source[i], notes)
    except image_ops.BadImage as e:
        return {"key": e.key}, f"image {e.reason}", f"{e!s:.200}", notes
    except check.UserError:
        raise  # a file that cannot be read is no property of the row
    except ValueError as e:
        return {}, "bad row", f"{e!s:.200}", notes
    if not record["captions"] and not fields.is_label_alone(record, source):
        return record, "no text", "", notes
    if not record["image"]:
        return record, "image empty", "", notes
    if job.check_images:
        try:
            image_ops.decode(record["image"])
        except image_ops.BadImage as e:
            return record, f"image {e.reason}", f"{e!s:.200}", notes
    try:
        records.encode(record)
    except check.UserError as e:
        return record, "bad record", f"{e!s:.200}", notes
    return record, "", "", notes


def _place(source: records.Source, i: int) -> dict:
    """Says where record i comes from, if its source can: row, file, line."""
    place = getattr(source, "place", None)
    return place(i) if place else {}


def shown(source: records.Source, given: fields.Fields) -> str:
    """One line that says which columns or members became what, from the source or its first row."""
    found = getattr(source, "fields", given)
    if not found.captions:
        try:
            tags = tuple(dict.fromkeys(c["source"] for c in source[0]["captions"]))
            found = dataclasses.replace(found, captions=tags)
        except ValueError:
            pass  # the first row is a bad one
    return found.show()


def _num_shards(job: Job, split: str) -> int:
    return -(-len(job.part(split)) // job.rows_per_shard)


def _shard(job: Job, split: str, number: int) -> str:
    return os.path.join(job.work, f"{split}-{number:05d}")


def _plan(job: Job) -> dict:
    """What decides every byte of the output; "seen", beside that, changes when an input file does."""
    plan = {
        "version": 1,
        "inputs": {s: [job.source(s).fingerprint, len(job.source(s))] for s in job.splits},
        "fields": dataclasses.asdict(job.given),
        "rows_per_shard": job.rows_per_shard,
        "check_images": job.check_images,
        "seen": [sources.stamp(job.source(s)) for s in job.splits],
    }
    if job.val_frac:
        plan["val"] = [job.val_frac, job.max_val]
    if job.tokenizer:
        given = _given_tokenizer(job)
        plan["tokenizer"] = given.sha256 if given else job.tokenizer
    return plan


def _given_tokenizer(job: Job) -> tokenizers.Tokenizer | None:
    return prepare.given_tokenizer(job.tokenizer, sources.tokenizer_file(job.path))


def _tokenizer(job: Job, tasks: Sequence[tuple[str, int]]) -> tokenizers.Tokenizer | None:
    """The dataset's tokenizer: the given one, or one of the captions that the shards noted."""
    if not job.tokenizer or (given := _given_tokenizer(job)):
        return given if job.tokenizer else None
    texts = (w for t in tasks if t[0] == "train" for w in _finished(job, t)["words"])
    with progress.phase("training the tokenizer"):
        return prepare.train_tokenizer(texts, job.tokenizer)


def _digest(plan: dict) -> str:
    plan = {k: v for k, v in plan.items() if k != "seen"}  # a copied input is the same input
    return hashlib.sha256(json.dumps(plan, sort_keys=True).encode()).hexdigest()


def _done(job: Job, plan: dict) -> bool:
    if not os.path.isdir(job.out) or not os.listdir(job.out):
        return False
    if not os.path.isfile(os.path.join(job.out, records.MANIFEST)):
        got, do = "a directory with files and no manifest", "choose another --out"
        raise check.error(job.out, got, "an empty or new directory", do)
    if records.read_manifest(job.out).get("info", {}).get("plan") == _digest(plan):
        file = os.path.join(job.out, INPUTS)
        if not os.path.isfile(file) or json.loads(pathlib.Path(file).read_text()) == plan["seen"]:
            return True
        got, do = "what was made before the input files changed", "choose another --out"
        raise check.error(job.out, got, "an empty or new directory", f"{do} or remove it yourself")
    got, do = "another dataset there already", "choose another or remove it yourself"
    raise check.error(job.out, got, "an empty or new directory", do)


def _claim(job: Job, plan: dict) -> None:
    """Makes the work directory, or goes on in the one that the same plan left behind."""
    file = os.path.join(job.work, "plan.json")
    _refuse_foreign_work(job)
    os.makedirs(job.work, exist_ok=True)
    if os.path.isfile(file):
        with open(file, encoding="utf-8") as f:
            if json.load(f) != json.loads(json.dumps(plan)):
                got, do = "shards of another conversion", "finish that one or remove the directory"
                raise check.error(job.work, got, "shards of this one", do)
        return
    with open(f"{file}.part", "w", encoding="utf-8") as f:
        json.dump(plan, f)
    os.replace(f"{file}.part", file)


def _publish(job: Job, plan: dict, tasks: Sequence[tuple[str, int]]) -> dict:
    """Gathers the shards under their final names beside a manifest; one rename makes it appear."""
    final = os.path.join(job.work, "dataset")
    shutil.rmtree(final, ignore_errors=True)
    os.makedirs(final)
    splits, repeated, detail = {}, {}, ""
    reasons: collections.Counter = collections.Counter()
    parts: collections.Counter = collections.Counter()
    with open(os.path.join(final, LEFT_OUT), "w", encoding="ascii") as lines:
        tell = lambda row: lines.write(json.dumps(row, ensure_ascii=True) + "\n")
        for split in job.written:
            if split not in job.splits and not len(job.part(split)):
                continue  # too few images to hold any out
            joined, keys, shards = hashlib.sha256(), counts.Counts(), []
            for task in (t for t in tasks if t[0] == split):
                found = _finished(job, task)
                parts.update(found["parts"])
                for row in found["left_out"]:
                    tell(row)
                    reasons[row["reason"]] += 1
                    if not detail and "detail" in row:
                        detail = f"; first: {row['detail']}"
                joined.update(b"".join(k.encode() + b"\0" for k in found["keys"]))
                keys.add(found["keys"])
                if found["entry"]["records"]:
                    shards.append((_shard(job, *task), found["entry"]))
            if not shards:
                shutil.rmtree(job.work)  # of no use to a mended input
                got = f"0 records ({dict(reasons)}{detail})"
                do = "check the input"
                if set(reasons) == {"no text"}:
                    there = _tables_in(job.source(split if split in job.splits else "train"))
                    if there:
                        do = f"give the path of the table: {there}"
                    do += ", or keep labels alone by --captions ''"
                raise check.error(f"split {split!r} of {job.path}", got, "at least one", do)
            entries = []
            for i, (path, entry) in enumerate(shards):
                name = f"{split}-{i:05d}-of-{len(shards):05d}.arrayrecord"
                _link(path, os.path.join(final, name))
                entries.append({"file": name, **entry})
            repeated[split] = keys.num_repeats()
            splits[split] = {
                "num_records": keys.total,
                "keys_sha256": joined.hexdigest(),
                "shards": entries,
            }
        info = {
            "plan": _digest(plan),
            "fields": {s: shown(job.source(s), job.given) for s in job.splits},
            "left_out": dict(sorted(reasons.items())),
            "repeated_keys": repeated,
        }
        if parts:
            info["parts_left_out"] = dict(sorted(parts.items()))
        for split in job.splits:
            source: Any = job.source(split)
            if sources.grouped(source):
                info.setdefault("rows", {})[split] = source.num_rows
            is_tar = isinstance(source, tar.TarSource)
            if is_tar or isinstance(source, files.FolderSource):
                written = source.files if is_tar else source.shards  # of img2dataset
                info.setdefault("tar" if is_tar else "folder", {})[split] = source.counts
                failures: Iterable[dict] = ()
                if written:
                    info.setdefault("img2dataset", {})[split] = tar.img2dataset_counts(written)
                    failures = tar.img2dataset_failures(written, job.given.key)
                for row in itertools.chain(source.left_out, failures):
                    tell({"split": split, **row})
    more: dict[str, bytes | None] = {LEFT_OUT: None}
    if job.val_frac:
        info["val"] = {"frac": job.val_frac, "at_most": job.max_val, "by": "digests of the images"}
    if tokenizer := _tokenizer(job, tasks):
        more[records.TOKENIZER] = tokenizer.to_bytes()
        how = "given" if _given_tokenizer(job) else "trained on the captions of train"
        info["tokenizer"] = {
            "pieces": tokenizer.vocab_size,
            "sha256": tokenizer.sha256,
            "from": how,
        }
    manifest = records.write_manifest(final, os.path.basename(job.out), info, splits, more)
    pathlib.Path(final, INPUTS).write_text(json.dumps(plan["seen"]))
    if os.path.isdir(job.out):
        os.rmdir(job.out)  # empty, or `_done` would have said so
    os.replace(final, job.out)
    shutil.rmtree(job.work)
    return manifest


def _tables_in(source: records.Source) -> str:
    """Names the tables that lie in a folder of images and are not read; "" if there are none."""
    if not isinstance(source, files.FolderSource):
        return ""
    found = [x["file"] for x in source.left_out if x["file"].lower().endswith(tables.ENDINGS)]
    return ", ".join(found[:4]) + (", …" if len(found) > 4 else "")


def _finished(job: Job, task: tuple[str, int]) -> dict:
    with open(f"{_shard(job, *task)}.json", encoding="utf-8") as f:
        return json.load(f)


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # a file system without links
        shutil.copyfile(source, target)


def _beam(runner: str) -> Any:
    try:
        return importlib.import_module("apache_beam")  # an extra
    except ImportError:
        do = 'run `pip install "vlp[beam]"`'
        raise check.error("--runner", repr(runner), "Apache Beam", do) from None


def _on_beam(
    beam: Any, make: Callable, todo: Sequence, runner: str, runner_args: Sequence[str]
) -> None:
    options = beam.options.pipeline_options.PipelineOptions([f"--runner={runner}", *runner_args])
    with beam.Pipeline(options=options) as pipeline:
        _ = pipeline | beam.Create(list(todo)) | beam.Reshuffle() | beam.Map(make)
