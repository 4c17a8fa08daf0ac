"""`vlp data convert`: any source → ArrayRecord shards, on one machine or on Apache Beam.

Output shard j is a pure function of input rows j·n … (j+1)·n - 1, so it does not matter who makes
it or in what order: a killed conversion keeps its finished shards and resumes, and every runner
gives the same bytes. Rows that cannot be a record are left out, counted by reason and listed in
`left_out.jsonl`. Not here: reading the formats (sources/), what a conversion is (job.py), its output's manifest
(publish.py), what is held out (prepare.py).
"""

import collections
import concurrent.futures
import functools
import importlib
import json
import multiprocessing
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from vlp.core import check, progress
from vlp.data import pictures, processes, records
from vlp.data.sources import fields
from vlp.data.tools import job as jobs
from vlp.data.tools import prepare, shrink
from vlp.data.tools.job import INPUTS, LEFT_OUT, Job
from vlp.data.tools.publish import publish, shown

__all__ = ["INPUTS", "LEFT_OUT", "Job", "look", "make_shard", "run", "shown"]


def run(job: Job, *, workers: int = 1, runner: str = "", runner_args: Sequence[str] = ()) -> dict:
    """Converts and returns the manifest; a second call after a kill resumes where it stopped.

    runner: "" for this machine (`workers` processes), else a runner of Apache Beam.
    Raises: `UserError` if `out` or the work directory belongs to something else.
    """
    jobs.opened.cache_clear()
    jobs.held_out_rows.cache_clear()
    if job.rows_per_shard < 1:
        raise check.error("rows_per_shard", job.rows_per_shard, "at least 1", "raise it")
    if workers < 1:
        raise check.error("workers", workers, "at least 1", "raise it")
    if job.max_px < 0:
        raise check.error("max_px", job.max_px, "0 or more", "set it to 0 to keep all sizes")
    if not 0 <= job.val_frac < 1:
        raise check.error(
            "val_frac", job.val_frac, "in [0, 1)", "write a fraction, for instance 0.1"
        )
    if job.val_frac and ("train" not in job.splits or "val" in job.splits):
        got = f"{job.val_frac} together with the splits {list(job.splits)}"
        raise check.error("val_frac", got, "'train' and no 'val'", "set it to 0")
    fields.check_splits(job.splits)
    records.refuse_foreign(job.out)
    jobs.refuse_foreign_work(job)
    beam = _beam(runner) if runner else None
    plan = jobs.plan(job)
    if jobs.is_done(job, plan):
        shutil.rmtree(job.work, ignore_errors=True)
        return records.read_manifest(job.out)
    jobs.claim(job, plan)

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
    tasks = [(s, j) for s in job.written for j in range(jobs.num_shards(job, s))]
    todo = [t for t in tasks if not os.path.isfile(f"{jobs.shard(job, *t)}.json")]
    do(functools.partial(make_shard, job), todo, "writing records")
    return publish(job, plan, tasks)


def _hold_out(job: Job, do: Callable[[Callable, list, str], None]) -> None:
    """Chooses the rows of "val" by the digests of all images."""
    blocks = -(-len(job.source("train")) // job.rows_per_shard)
    paths = [_looked(job, number) for number in range(blocks)]
    todo = [n for n, p in enumerate(paths) if not os.path.isfile(p)]
    do(functools.partial(look, job), todo, "looking for copies of images, for val")
    rows = prepare.hold_out(prepare.Blocks(paths), job.val_frac)
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
    source, path = job.part(split), jobs.shard(job, split, number)
    first = number * job.rows_per_shard
    keys, left_out, parts, resized = [], [], collections.Counter(), 0
    words: list[str] = []  # for the tokenizer
    step = prepare.step(len(source)) if split == "train" and job.tokenizer else 0

    def rows() -> Iterator[dict]:
        nonlocal resized
        for i in range(first, min(first + job.rows_per_shard, len(source))):
            record, reason, detail, notes = _row(job, source, i)
            if job.max_px and not reason:
                try:
                    small = shrink.shrunk(record["image"], job.max_px)
                    record |= {"image": small} if small else {}
                    resized += bool(small)
                except pictures.BadImage as e:
                    reason, detail = f"image {e.reason}", f"{e!s:.200}"
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
    found["resized"] = resized
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
    except pictures.BadImage as e:
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
            pictures.decode(record["image"])
        except pictures.BadImage as e:
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
