"""Memory and time of `vlp data` as the number of samples grows: it should not matter.

    python benchmarks/scale.py --json FILE [--sizes 100000 300000 1000000] [--index 30000000] [--keep DIR]

index: a tar index of that many samples, written through the real writer beside a tar that is one hole, is opened as
`vlp train` opens it, and 1,000 records at random are read: seconds, and the memory beyond the mapped file (anonymous
pages, before and after). data: tar shards of records as small as they come (an 8 × 8 PPM, a caption of a few words,
both different in every record) are converted, filtered and inspected by the real commands, each a process of its own:
its peak of resident memory (VmHWM) and its seconds. first batch: 256 samples of the converted data, and of the tars
whose index is there, from `open_dataset` on, without the imports.

The bounds that are meant to hold are in `BOUNDS`; the exit code is 1 if one does not.
"""

import argparse
import json
import os
import pathlib
import platform
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable

import numpy as np
import simplejpeg

from vlp.core import check

PER_SHARD = 100_000
BATCH = 256
NUM_WORDS = 50_000
BOUNDS = {"open_s": 3.0, "beyond_map_mb": 100.0, "first_batch_s": 2.0, "peak_spread": 0.2}
LOOSE = ["--min-side-px", "0", "--min-words", "1"]  # of `filter`: that most records stay


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--sizes", type=int, nargs="*", default=[100_000, 300_000, 1_000_000])
    parser.add_argument("--index", type=int, default=30_000_000, help="samples; 0: none")
    parser.add_argument("--smoke", action="store_true", help="sizes that take seconds")
    parser.add_argument("--keep", default="", metavar="DIR", help="work here, and leave it there")
    parser.add_argument("--json", default="", metavar="FILE")
    parser.add_argument("--child", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(CHILDREN[args.child[0]](*args.child[1:])))
        return 0
    check.output_file("--json", args.json)
    check.counts({k: v for k, v in vars(args).items() if k in ("sizes", "index")}, "index")
    if args.smoke:
        args.sizes, args.index = [200], 20_000
    rows: list[dict] = []
    with tempfile.TemporaryDirectory() as temporary:
        home = pathlib.Path(args.keep or temporary)
        home.mkdir(parents=True, exist_ok=True)
        if args.index:
            rows.append(run(home, "index", str(home / f"{args.index}.tar"), str(args.index)))
            show(rows[-1])
        for num in args.sizes:
            rows += of_size(home, num)
    verdicts = judge(rows)
    for name, (value, holds) in verdicts.items():
        print(f"{'holds' if holds else 'FAILS'}  {name} {value:.2f}, at most {BOUNDS[name]}")
    if args.json:
        rows += [{"what": "verdict", "bound": n, "value": v} for n, (v, _) in verdicts.items()]
        pathlib.Path(args.json).write_text(json.dumps([environment() | r for r in rows], indent=1))
    return 0 if all(holds for _, holds in verdicts.values()) else 1


def environment() -> dict:
    """What the figures depend on, beside the code."""
    return {
        "python": platform.python_version(),
        "numpy": np.__version__,
        "cpus": len(os.sched_getaffinity(0)),
        "machine": platform.machine(),
    }


def of_size(home: pathlib.Path, num: int) -> list[dict]:
    """Makes the data of that size and runs the commands on it."""
    data, made = home / f"tars-{num}", home / f"made-{num}"
    if not data.exists():
        write_tars(data, num)
    rows = []
    for what, argv in (
        ("convert", [data, "--out", made]),
        ("filter", [made, "--out", home / f"kept-{num}", *LOOSE]),
        ("inspect", [made]),
    ):
        rows.append(run(home, "command", what, *map(str, argv)) | {"what": what, "num": num})
        show(rows[-1])
    for what, path in (("first batch, records", made), ("first batch, tars", data)):
        rows.append(run(home, "batch", str(path)) | {"what": what, "num": num})
        show(rows[-1])
    return rows


def run(home: pathlib.Path, *child: str) -> dict:
    """Runs a part of this script in a process of its own; returns what it measured."""
    argv = [sys.executable, __file__, "--child", *child]
    env = os.environ | {"VLP_CACHE": str(home / "cache"), "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(argv, capture_output=True, text=True, check=False, env=env)
    if done.returncode:
        raise check.error(" ".join(child), done.stderr[-2000:], "rows", "see what it says")
    return json.loads(done.stdout.splitlines()[-1])


def show(row: dict) -> None:
    numbers = "  ".join(
        f"{k} {v:,.2f}" for k, v in row.items() if k not in ("what", "num") and v is not None
    )
    print(f"{row['what']:22}{row['num']:>12,}  {numbers}", flush=True)


def judge(rows: list[dict]) -> dict[str, tuple[float, bool]]:
    """Returns the worst value under each bound, and whether the bound holds."""
    worst: dict[str, float] = {}
    for name in BOUNDS:
        if values := [r[name] for r in rows if name in r]:
            worst[name] = max(values)
    for what in ("convert", "filter", "inspect"):
        if peaks := [r["peak_mb"] for r in rows if r["what"] == what]:
            spread = max(peaks) / min(peaks) - 1
            worst["peak_spread"] = max(worst.get("peak_spread", 0.0), spread)
    return {name: (value, value <= BOUNDS[name]) for name, value in worst.items()}


def memory(field: str) -> float:
    """MB of a field of /proc/self/status."""
    for line in pathlib.Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) / 1e3
    raise check.error("/proc/self/status", f"no {field}", "Linux", "run it there")


def write_tars(directory: pathlib.Path, num: int) -> None:
    """Writes small records that differ as tar shards of `PER_SHARD`."""
    part = directory.with_suffix(".part")
    part.mkdir()
    rng = np.random.default_rng(0)
    for shard in range(-(-num // PER_SHARD)):
        with open(part / f"{shard:05d}.tar", "wb") as file:
            for i in range(shard * PER_SHARD, min(num, (shard + 1) * PER_SHARD)):
                pixels = np.frombuffer(rng.bytes(192), np.uint8).reshape(8, 8, 3)
                image = simplejpeg.encode_jpeg(pixels, quality=90)
                words = (NUM_WORDS ** rng.random(6)).astype(int)  # as words are: a few often
                text = " ".join(f"w{w}" for w in words).encode()
                for name, data in ((f"{i:09d}.jpg", image), (f"{i:09d}.txt", text)):
                    member = tarfile.TarInfo(name)
                    member.size = len(data)
                    file.write(member.tobuf() + data + bytes(-len(data) % 512))
            file.write(bytes(1024))
    part.rename(directory)


def write_index(tar: str, num: int) -> None:
    """Writes a tar that is one hole, and the index that says it holds `num` samples of 2 members."""
    from vlp.data import index as index_lib
    from vlp.data.sources import fields
    from vlp.data.sources import tar as tar_lib

    with open(tar, "wb") as file:
        file.truncate(num * 2048)
    wanted = tar_lib.Wanted.of(fields.Fields())
    path = index_lib.place("tar-index", tar_lib.stamp(tar, wanted))
    names = [wanted.names.index(n) for n in ("jpg", "txt")]
    with index_lib.Writer(path, tar_lib.KINDS, lists=tar_lib.LISTS) as writer:
        for first in range(0, num, 2**20):
            count = min(2**20, num - first)
            ids = np.arange(first, first + count)
            digits = ids[:, None] // 10 ** np.arange(8, -1, -1) % 10 + ord("0")
            writer.add("key", digits.astype(np.uint8).ravel())
            writer.add("key_ends", (ids + 1) * 9)
            writer.add("member_ends", (ids + 1) * 2)
            writer.add("member_name", np.tile(names, count))
            writer.add("member_at", (ids[:, None] * 2048 + [512, 1536]).ravel())
            writer.add("member_size", np.tile([512, 40], count))
        writer.add("sample_ends", [num])
        writer.add("left_file_ends", [0])
        writer.add_texts("file", [os.fsencode(tar)])
        meta = {"fingerprint": "synthetic", "counts": {}, "names": wanted.names, "seen": {}}
        writer.finish(meta)


def child_index(tar: str, num: str) -> dict:
    """Opens an index of `num` samples and reads some."""
    from vlp.data import sources

    if not os.path.exists(tar) or not os.path.isdir(f"{os.environ['VLP_CACHE']}/tar-index"):
        # in a process of its own: what writing takes is not the reader's
        code = "import sys, scale; scale.write_index(sys.argv[1], int(sys.argv[2]))"
        where = os.environ | {
            "PYTHONPATH": ":".join([str(pathlib.Path(__file__).parent), *sys.path])
        }
        subprocess.run([sys.executable, "-c", code, tar, num], check=True, env=where)
    before, began = memory("RssAnon"), time.perf_counter()
    source = sources.open_path(tar, strict=True)
    open_s = time.perf_counter() - began
    opened = memory("RssAnon") - before
    places = np.random.default_rng(0).integers(0, len(source), 1000).tolist()
    began = time.perf_counter()
    for i in places:
        assert source[i]["key"] == f"{i:09d}"
    return {
        "what": "index",
        "num": len(source),
        "open_s": open_s,
        "beyond_map_mb": max(opened, memory("RssAnon") - before),
        "read_us": (time.perf_counter() - began) * 1e3,
        "file_mb": os.path.getsize(source._index.path) / 1e6,
    }


def child_command(*argv: str) -> dict:
    """Runs `vlp data` with these arguments."""
    from vlp.cli import data

    parser = argparse.ArgumentParser()
    data.add_parser(parser.add_subparsers())
    args, began = parser.parse_args(["data", *argv]), time.perf_counter()
    sys.stdout = sys.stderr
    code = args.run(args)
    sys.stdout = sys.__stdout__
    if code:
        raise check.error("vlp data", f"exit code {code}", "0", "see above")
    return {"peak_mb": memory("VmHWM"), "seconds": time.perf_counter() - began}


def child_batch(path: str) -> dict:
    """Reads the first batch of a run."""
    from vlp.data import tokenizer
    from vlp.data.config import Data
    from vlp.data.dataset import open_dataset

    words = tokenizer.train([f"w{i} w{i * 7}" for i in range(500)], 60)
    data = Data(path=path, image_px=32, text_len=16, langs=())
    began = time.perf_counter()
    open_dataset(data, words).batch_at(0, BATCH, 0)
    return {"first_batch_s": time.perf_counter() - began, "peak_mb": memory("VmHWM")}


CHILDREN: dict[str, Callable[..., dict]] = {
    "index": child_index,
    "command": child_command,
    "batch": child_batch,
}


if __name__ == "__main__":
    check.run(main)
