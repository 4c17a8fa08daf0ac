"""Publishes a conversion: shards with final names, the manifest and the list of omitted rows."""

import collections
import dataclasses
import hashlib
import itertools
import json
import os
import pathlib
import shutil
from collections.abc import Iterable, Sequence
from typing import Any

from vlp.core import check, progress
from vlp.data import counts, records, sources
from vlp.data import tokenizer as tokenizers
from vlp.data.sources import fields, files, img2dataset, tables, tar
from vlp.data.tools import job as jobs
from vlp.data.tools import prepare, shrink
from vlp.data.tools.job import INPUTS, LEFT_OUT, Job


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


def _tokenizer(job: Job, tasks: Sequence[tuple[str, int]]) -> tokenizers.Tokenizer | None:
    """The dataset's tokenizer: the given one, or one of the captions that the shards noted."""
    if not job.tokenizer or (given := jobs.given_tokenizer(job)):
        return given if job.tokenizer else None
    texts = (w for t in tasks if t[0] == "train" for w in jobs.finished(job, t)["words"])
    with progress.phase("training the tokenizer"):
        return prepare.train_tokenizer(texts, job.tokenizer)


def publish(job: Job, plan: dict, tasks: Sequence[tuple[str, int]]) -> dict:
    """Moves the shards and a manifest to their final names; one rename makes the dataset appear."""
    final = os.path.join(job.work, "dataset")
    shutil.rmtree(final, ignore_errors=True)
    os.makedirs(final)
    splits, repeated, detail = {}, {}, ""
    reasons: collections.Counter = collections.Counter()
    parts: collections.Counter = collections.Counter()
    resized: collections.Counter = collections.Counter()
    with open(os.path.join(final, LEFT_OUT), "w", encoding="ascii") as lines:
        tell = lambda row: lines.write(json.dumps(row, ensure_ascii=True) + "\n")
        for split in job.written:
            if split not in job.splits and not len(job.part(split)):
                continue  # too few images to hold any out
            joined, keys, shards = hashlib.sha256(), counts.Counts(), []
            for task in (t for t in tasks if t[0] == split):
                found = jobs.finished(job, task)
                parts.update(found["parts"])
                resized[split] += found["resized"]
                for row in found["left_out"]:
                    tell(row)
                    reasons[row["reason"]] += 1
                    if not detail and "detail" in row:
                        detail = f"; first: {row['detail']}"
                joined.update(b"".join(k.encode() + b"\0" for k in found["keys"]))
                keys.add(found["keys"])
                if found["entry"]["records"]:
                    shards.append((jobs.shard(job, *task), found["entry"]))
            if not shards:
                shutil.rmtree(job.work)  # of no use to a mended input
                got = f"0 records ({dict(reasons)}{detail})"
                do = "check the input"
                if set(reasons) == {"no text"}:
                    there = _tables_in(job.source(split if split in job.splits else "train"))
                    if there:
                        do = f"give the path of the table: {there}"
                    do += ", or keep only labels with --captions ''"
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
            "plan": jobs.digest(plan),
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
                    info.setdefault("img2dataset", {})[split] = img2dataset.counts(written)
                    failures = img2dataset.failures(written, job.given.key)
                for row in itertools.chain(source.left_out, failures):
                    tell({"split": split, **row})
    more: dict[str, bytes | None] = {LEFT_OUT: None}
    if job.val_frac:
        info["val"] = {"frac": job.val_frac, "by": "digests of the images"}
    if job.max_px:
        told = {"max_px": job.max_px, "jpeg_quality": shrink.JPEG_QUALITY}
        info["resized"] = told | {"records": dict(resized)}
    if tokenizer := _tokenizer(job, tasks):
        more[records.TOKENIZER] = tokenizer.to_bytes()
        how = "given" if jobs.given_tokenizer(job) else "trained on the captions of train"
        info["tokenizer"] = {
            "pieces": tokenizer.vocab_size,
            "sha256": tokenizer.sha256,
            "from": how,
        }
    manifest = records.write_manifest(final, os.path.basename(job.out), info, splits, more)
    pathlib.Path(final, INPUTS).write_text(json.dumps(plan["seen"]))
    if os.path.isdir(job.out):
        os.rmdir(job.out)  # empty: `jobs.done` has checked it
    os.replace(final, job.out)
    shutil.rmtree(job.work)
    return manifest


def _tables_in(source: records.Source) -> str:
    """Names the tables that lie in a folder of images and are not read; "" if there are none."""
    if not isinstance(source, files.FolderSource):
        return ""
    found = [x["file"] for x in source.left_out if x["file"].lower().endswith(tables.ENDINGS)]
    return ", ".join(found[:4]) + (", …" if len(found) > 4 else "")


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # a file system without links
        shutil.copyfile(source, target)
