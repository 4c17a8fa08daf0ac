"""What a conversion is, where it keeps its work, and what decides every byte of its output."""

import dataclasses
import functools
import hashlib
import json
import os
import pathlib
import stat

import numpy as np

from vlp.core import check
from vlp.data import records, sources
from vlp.data import tokenizer as tokenizers
from vlp.data.sources import fields
from vlp.data.tools import prepare, shrink

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
    val_frac: float = 0.0  # fraction of the rows of "train" that become "val" (0: none)
    max_px: int = 0  # shrink images whose shorter side is longer (0: none)
    tokenizer: str = ""  # for the dataset: prepare.AUTO, pieces to train, a file, or "" for none

    @property
    def work(self) -> str:
        """Where finished shards wait: a sibling of `out`, removed at the end."""
        head, tail = os.path.split(os.path.abspath(self.out))
        return os.path.join(head, f".{tail}.convert")

    def source(self, split: str) -> records.Source:
        """Returns the opened input (opened once per process); it compares images of any size."""
        given = dataclasses.replace(self.given, group=self.given.group is not False)
        return opened(self.path, split, self.strict, given)

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
        return prepare.Subset(
            self.source("train"), held_out_rows(self.held_out), others=split == "train"
        )


@functools.lru_cache(maxsize=8)
def opened(path: str, split: str, strict: bool, given: fields.Fields) -> records.Source:
    return records.in_order(sources.open_path(path, split, strict=strict, given=given))


@functools.lru_cache(maxsize=1)
def held_out_rows(path: str) -> np.ndarray:
    return np.load(path)


def refuse_foreign_work(job: Job) -> None:
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


def num_shards(job: Job, split: str) -> int:
    return -(-len(job.part(split)) // job.rows_per_shard)


def shard(job: Job, split: str, number: int) -> str:
    return os.path.join(job.work, f"{split}-{number:05d}")


def plan(job: Job) -> dict:
    """Returns everything that the output depends on; "seen" also changes if an input file is touched."""
    out = {
        "version": 1,
        "inputs": {s: [job.source(s).fingerprint, len(job.source(s))] for s in job.splits},
        "fields": dataclasses.asdict(job.given),
        "rows_per_shard": job.rows_per_shard,
        "check_images": job.check_images,
        "seen": [sources.stamp(job.source(s)) for s in job.splits],
    }
    if job.val_frac:
        out["val"] = job.val_frac
    if job.max_px:
        out["max_px"] = [job.max_px, shrink.JPEG_QUALITY]
    if job.tokenizer:
        given = given_tokenizer(job)
        out["tokenizer"] = given.sha256 if given else job.tokenizer
    return out


def given_tokenizer(job: Job) -> tokenizers.Tokenizer | None:
    return prepare.given_tokenizer(job.tokenizer, sources.tokenizer_file(job.path))


def digest(plan: dict) -> str:
    plan = {k: v for k, v in plan.items() if k != "seen"}  # a copied input is the same input
    return hashlib.sha256(json.dumps(plan, sort_keys=True).encode()).hexdigest()


def is_done(job: Job, plan: dict) -> bool:
    if not os.path.isdir(job.out) or not os.listdir(job.out):
        return False
    if not os.path.isfile(os.path.join(job.out, records.MANIFEST)):
        got, do = "a directory with files and no manifest", "choose another --out"
        raise check.error(job.out, got, "an empty or new directory", do)
    if records.read_manifest(job.out).get("info", {}).get("plan") == digest(plan):
        file = os.path.join(job.out, INPUTS)
        if not os.path.isfile(file) or json.loads(pathlib.Path(file).read_text()) == plan["seen"]:
            return True
        got, do = "what was made before the input files changed", "choose another --out"
        raise check.error(job.out, got, "an empty or new directory", f"{do} or remove it yourself")
    got, do = "another dataset there already", "choose another or remove it yourself"
    raise check.error(job.out, got, "an empty or new directory", do)


def claim(job: Job, plan: dict) -> None:
    """Creates the work directory, or reuses that of an interrupted run of the same plan."""
    file = os.path.join(job.work, "plan.json")
    refuse_foreign_work(job)
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


def finished(job: Job, task: tuple[str, int]) -> dict:
    with open(f"{shard(job, *task)}.json", encoding="utf-8") as f:
        return json.load(f)
