"""CPU time of saving and restoring a checkpoint, with its digests, compared with plain Orbax and the same state.

    python benchmarks/checkpoint.py [--mb 512] [--repeats 5] [--dir /dev/shm] [--json FILE]

The state is float32: parameters, and two moments of the optimiser, --mb MiB in all, on one CPU device. Each side runs
in its own process; they take turns. Plain Orbax is CheckpointManager with its defaults, the two trees as two items.
Ours writes chunks with CRC-32C and no compression, proves that they can be opened, and writes the xxh3-128 manifest.

    stall       until save() returns and training goes on
    save        until the checkpoint counts; CPU: user and system time of the process meanwhile
    digests     CPU of the manifest alone, part of save; % of plain: relative to the CPU of a whole plain save
    check       CPU of comparing every file with the manifest
    restore     into arrays on the device, without the check

Values are the smallest of the repeats. --dir: where the checkpoints are written; memory (/dev/shm) shows the CPU, a
disk the waiting.
"""

from __future__ import annotations

import pathlib
import shutil
import tempfile
import time
from typing import Any

import bench

SIDES = ("orbax", "vlp")
LEAVES = 48


def main() -> None:
    parser = bench.parser(__doc__)
    parser.add_argument("--mb", type=int, default=512, help="MiB of the whole state")
    parser.add_argument("--repeats", type=int, default=5, help="turns of each side")
    parser.add_argument(
        "--dir", default="", help="directory to write in (default: a temporary one)"
    )
    parser.add_argument("--serve", default="", help=bench.HIDDEN)
    args = bench.options(parser, needs=("jax", "orbax.checkpoint", "xxhash"))
    if args.serve:
        return bench.serve(Side(args.serve))
    with tempfile.TemporaryDirectory(dir=args.dir or None) as directory:
        workers = {side: bench.Worker(__file__, "--serve", side) for side in SIDES}
        found: dict[str, list[bench.Row]] = {side: [] for side in SIDES}
        for turn in range(args.repeats + 1):
            for side, worker in workers.items():
                row = worker.ask(path=f"{directory}/{side}", mb=args.mb)
                if turn:  # the first loads code
                    found[side].append(row)
        for worker in workers.values():
            worker.close()
    rows = [{"side": s, **{k: min(r[k] for r in found[s]) for k in found[s][0]}} for s in SIDES]
    plain, ours = rows
    for row in rows:
        row |= {"mb": args.mb, "repeats": args.repeats}
        row["save_cpu_relative"] = row["save_cpu_s"] / plain["save_cpu_s"]
    ours["digests_frac"] = ours["digests_cpu_s"] / plain["save_cpu_s"]
    print(bench.table(rows, COLUMNS))
    print(f"digests: {ours['digests_frac']:.1%} of the CPU of a plain save")
    bench.save(args.json, rows)


COLUMNS = {
    "side": ("", ""),
    "stall_s": ("stall s", ".2f"),
    "save_s": ("save s", ".2f"),
    "save_cpu_s": ("save CPU s", ".2f"),
    "save_cpu_relative": ("relative", ".2f"),
    "digests_cpu_s": ("digests CPU s", ".3f"),
    "check_cpu_s": ("check CPU s", ".3f"),
    "restore_s": ("restore s", ".2f"),
    "restore_cpu_s": ("restore CPU s", ".2f"),
    "written_mb": ("MiB written", ".0f"),
}


class Side:
    """One side's process: saves and restores when asked."""

    def __init__(self, name: str):
        import jax

        jax.config.update("jax_platforms", "cpu")
        self._name, self._state = name, {}

    def __call__(self, path: str, mb: int) -> bench.Row:
        params, rest = self._trees(mb)
        shutil.rmtree(path, ignore_errors=True)
        row: bench.Row = {}
        save, restore, check = (ours if self._name == "vlp" else plain)(path, row)
        began, cpu = time.perf_counter(), time.process_time()
        finish = save(params, rest)
        row["stall_s"] = time.perf_counter() - began
        finish()
        row["save_s"], row["save_cpu_s"] = time.perf_counter() - began, time.process_time() - cpu
        files = [p for p in pathlib.Path(path).rglob("*") if p.is_file()]
        row["written_mb"] = sum(p.stat().st_size for p in files) / bench.MB
        began, cpu = time.perf_counter(), time.process_time()
        restore(params, rest)
        row["restore_s"] = time.perf_counter() - began
        row["restore_cpu_s"] = time.process_time() - cpu
        check()
        return row

    def _trees(self, mb: int) -> tuple[Any, Any]:
        import jax
        import numpy as np

        if mb not in self._state:
            num = max(mb * bench.MB // 4 // 3 // LEAVES // 1024, 1)
            draw = np.random.default_rng(0).standard_normal
            leaf = lambda: jax.device_put(draw((num, 1024), dtype=np.float32))
            tree = lambda: {f"w{i}": leaf() for i in range(LEAVES)}
            self._state[mb] = tree(), {"mu": tree(), "nu": tree()}
        return self._state[mb]


def plain(path: str, row: bench.Row) -> tuple[Any, Any, Any]:
    """Orbax's CheckpointManager with its defaults."""
    import orbax.checkpoint as ocp

    manager = ocp.CheckpointManager(path, item_names=("params", "rest"))

    def save(params: Any, rest: Any) -> Any:
        save_args = ocp.args.StandardSave
        manager.save(1, args=ocp.args.Composite(params=save_args(params), rest=save_args(rest)))
        return manager.wait_until_finished

    def restore(params: Any, rest: Any) -> None:
        load = ocp.args.StandardRestore
        manager.restore(1, args=ocp.args.Composite(params=load(params), rest=load(rest)))

    return save, restore, manager.close


def ours(path: str, row: bench.Row) -> tuple[Any, Any, Any]:
    """The checkpoints of `vlp train`; notes the CPU of the digests."""
    from vlp.ckpt import digest
    from vlp.ckpt.manager import Checkpoints

    checkpoints = Checkpoints(path)
    write = digest.write

    def timed(*args: Any) -> None:
        began = time.thread_time()
        write(*args)
        row["digests_cpu_s"] = time.thread_time() - began

    def save(params: Any, rest: Any) -> Any:
        digest.write = timed
        checkpoints.save(1, params, rest, {})
        return checkpoints.wait

    def restore(params: Any, rest: Any) -> None:
        digest.write = write
        checkpoints.restore(1, params, rest)

    def check() -> None:
        checkpoints.close()
        began = time.process_time()
        assert not checkpoints.problem(1)
        row["check_cpu_s"] = time.process_time() - began

    return save, restore, check


if __name__ == "__main__":
    bench.run(main)
