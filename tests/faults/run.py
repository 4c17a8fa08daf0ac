"""Kills `vlp train` at seeded moments and checks that every restart continues as if nothing had happened.

    python tests/faults/run.py --kills 100 --seed 0 --json rows.json

One run is killed (SIGKILL) and started again by the same command until it is done; then another one begins. The moment
is aimed at by watching the run's output and its checkpoint folder; which one was hit is read from both after the kill:

    start        before the data is opened
    compile      after that, before the first step
    step         between steps
    save         a checkpoint is partly written
    publish      a checkpoint is written and does not have its final name yet
    delete       an old checkpoint is to be deleted, or partly deleted
    evaluation   after the last step before an evaluation, before its result

A row of the JSON file says where a kill hit and what the next start did: `reached` (last step told before), `newest`
(last published checkpoint), `resumed_from`, `steps_lost` = reached − resumed_from, `saving` (step of the checkpoint
that was being written, or null), `curve_equal` (all rows of metrics.jsonl, as far as the next start came, equal those
of a run that was not killed). Exit code 1 if a row is wrong: it resumed from another step than the newest
published one, lost more steps than the interval between saves and those that were done while a save was being written,
or its curve differs.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import pathlib
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time

HERE = pathlib.Path(__file__).parent
ROOT = HERE.parents[1]
MOMENTS = ("compile", "step", "save", "publish", "delete", "evaluation")
INTERVAL, KEEP, EVAL_EVERY = 10, 2, 7  # of config.py
PACE_MS = 25
STEP = re.compile(r"\[(\d+)\] stage0 ")
EVAL = re.compile(r"\[(\d+)\] norm: ")
WHOLE = {"params", "rest", "meta", "_CHECKPOINT_METADATA"}  # in a checkpoint, among others


class Run:
    """A `vlp train` process; a thread keeps the lines that it prints."""

    def __init__(self, workdir: pathlib.Path, steps: int, pace_ms: float):
        env = os.environ | {"JAX_PLATFORMS": "cpu", "PACE_MS": str(pace_ms)}
        env["PYTHONPATH"] = os.pathsep.join([str(ROOT), env.get("PYTHONPATH", "")])
        env.setdefault("VLP_CACHE", str(workdir.parent / "cache"))
        argv = [sys.executable, "-m", "vlp", "train", "--config", f"{HERE / 'config.py'}:{steps}"]
        self.lines: list[str] = []
        self.since = time.time()
        self.process = subprocess.Popen(
            [*argv, "--workdir", str(workdir)],
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append(line.rstrip())

    def over(self) -> bool:
        return self.process.poll() is not None

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.wait()

    def wait(self) -> int:
        code = self.process.wait(timeout=300)
        self._reader.join(timeout=60)
        return code

    def steps(self) -> list[int]:
        """The steps that it told, in order."""
        return [int(m[1]) for m in map(STEP.match, list(self.lines)) if m]

    def restored(self) -> int:
        found = [line for line in self.lines if line.startswith("restored step ")]
        return int(found[0].split()[-1]) if found else 0

    def fed(self) -> bool:
        """Whether the data is opened: what follows is the compilation of the step."""
        return any(line.startswith("data: ") and " epochs; " in line for line in list(self.lines))

    def has(self, text: str) -> bool:
        return any(line.startswith(text) for line in list(self.lines))


@dataclasses.dataclass(frozen=True)
class Folder:
    """What a folder of checkpoints holds."""

    published: tuple[int, ...] = ()
    writing: str = ""  # name of the one that is being written
    sealed: bool = False  # its items are complete
    deleting: bool = False  # one too many is there, or an old one in part

    @staticmethod
    def look(path: pathlib.Path, since: float) -> Folder:
        """since: what was last changed before this time (time.time) is left over from an earlier start."""
        try:
            names = sorted(n for n in os.listdir(path) if n.startswith("step_"))
            final = [n for n in names if re.fullmatch(r"step_\d{9}", n)]
            new = [n for n in names if (path / n).stat().st_mtime >= since]
            writing = next((n for n in new if n not in final), "")
            sealed = bool(writing) and WHOLE <= set(os.listdir(path / writing))
            many = len(final) > KEEP and final[-1] in new
            partial = any(n in new and not WHOLE <= set(os.listdir(path / n)) for n in final)
        except OSError:  # changed while it was read, or not there yet
            return Folder()
        steps = tuple(int(n[5:]) for n in final)
        return Folder(steps, writing, sealed, many or partial)


def aimed(run: Run, checkpoints: pathlib.Path, moment: str, rng: random.Random) -> bool:
    """Waits for the moment and a random time more; False if the run ended before."""
    later = rng.randint(1, 3)  # which of them
    seen: set[str] = set()

    def come() -> bool:
        if moment == "compile":
            return run.fed()
        steps = run.steps()
        if moment == "step":
            return len(steps) >= 4 * later
        if moment == "evaluation":
            return sum(s % EVAL_EVERY == 0 for s in steps) >= later
        folder = Folder.look(checkpoints, run.since)
        if moment == "delete":
            return folder.deleting
        if not folder.writing or moment == "publish" and not folder.sealed:
            return False
        seen.add(folder.writing)
        return len(seen) >= later

    # how long the moment lasts, roughly
    secs = {"compile": 0.4, "step": 0.03, "save": 0.12, "publish": 0.004, "delete": 0.004}
    before = rng.uniform(0, secs.get(moment, PACE_MS / 100))
    while not come():
        if run.over():
            return False
        time.sleep(0.0003 if moment in ("publish", "delete", "save") else 0.002)
    time.sleep(before)
    return not run.over()


def hit(run: Run, folder: Folder) -> str:
    """Where a killed run was."""
    told = [line for line in run.lines if STEP.match(line) or EVAL.match(line)]
    if not told:
        return "compile" if run.fed() else "start"
    if folder.deleting:
        return "delete"
    if folder.writing:
        return "publish" if folder.sealed else "save"
    last = STEP.match(told[-1])
    return "evaluation" if last and int(last[1]) % EVAL_EVERY == 0 else "step"


def rows(workdir: pathlib.Path) -> list[dict]:
    """The whole lines of metrics.jsonl, without times."""
    path = workdir / "metrics.jsonl"
    out = []
    for line in path.read_text().splitlines(keepends=True) if path.exists() else ():
        if line.endswith("\n"):
            row = json.loads(line)
            out.append({k: v for k, v in row.items() if not k.startswith("time/")})
    return out


def state(workdir: pathlib.Path) -> dict:
    """Every array of the last checkpoint."""
    sys.path.insert(0, str(HERE.parent))
    from helpers import runs

    return {k: v.tobytes() for k, v in runs.saved(workdir).items()}


def right(row: dict) -> bool:
    done_while_saving = row["reached"] - row["saving"] if row["saving"] else 0
    allowed = INTERVAL + max(done_while_saving, 0)
    return (
        row["curve_equal"] and row["resumed_from"] == row["newest"] and row["steps_lost"] <= allowed
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=pathlib.Path)
    parser.add_argument("--steps", type=int, help="length of each run")
    args = parser.parse_args()
    steps = args.steps or min(400, 10 * args.kills)
    rng = random.Random(args.seed)
    with tempfile.TemporaryDirectory(prefix="vlp_faults_") as folder:
        found = faults(pathlib.Path(folder), args.kills, steps, rng)
    if args.json:
        args.json.write_text(json.dumps(found, indent=1) + "\n")
    wrong = [row for row in found if not right(row)]
    for moment in dict.fromkeys((*MOMENTS, "start")):
        mine = [row for row in found if row["moment"] == moment]
        lost = max((row["steps_lost"] for row in mine), default=0)
        print(f"{moment:12} {len(mine):4} kills, at most {lost} steps lost")
    print(f"{len(found)} kills, {len(wrong)} wrong (interval {INTERVAL} steps)")
    for row in wrong:
        print(json.dumps(row))
    return int(bool(wrong))


def faults(folder: pathlib.Path, kills: int, steps: int, rng: random.Random) -> list[dict]:
    """A row for every kill."""
    whole = folder / "whole"
    run = Run(whole, steps, pace_ms=0)
    assert run.wait() == 0, "\n".join(run.lines)
    wanted, arrays = rows(whole), state(whole)
    out: list[dict] = []
    order: list[str] = []
    workdir = folder / "run_0"
    open_row: dict | None = None
    for number in range(1, 20 * kills):
        order = order or rng.sample(MOMENTS, len(MOMENTS))
        run = Run(workdir, steps, PACE_MS)
        last = len(out) == kills
        if last or not aimed(run, workdir / "checkpoints", order.pop(), rng):
            assert run.wait() == 0, "\n".join(run.lines)
        else:
            run.kill()
        mine = rows(workdir)
        equal = mine == wanted[: len(mine)]
        if open_row is not None:
            resumed = run.restored()
            open_row |= {"resumed_from": resumed, "steps_lost": open_row["reached"] - resumed}
            # a start that died before it restored has nothing to say of the kill before it
            if run.has("restored step ") or run.steps() or not open_row["newest"]:
                out.append(open_row | {"curve_equal": equal})
                open_row = None
        if run.process.returncode == 0:  # done: another one begins
            finished = mine == wanted and state(workdir) == arrays
            if out:
                out[-1]["curve_equal"] &= finished
            if len(out) >= kills:
                break
            workdir = folder / f"run_{number}"
            continue
        look = Folder.look(workdir / "checkpoints", run.since)
        newest = max(look.published, default=0)
        reached = max(run.steps(), default=run.restored())
        saving = int(look.writing[5:14]) if look.writing else None
        again = {}
        if open_row is not None:  # nothing happened since the kill before it
            again = {k: open_row[k] for k in ("reached", "saving")}
        open_row = {
            "kill": len(out) + 1,
            "moment": hit(run, look),
            "reached": reached,
            "newest": newest,
            "saving": saving,
        } | again
    for other in folder.glob("run_*"):
        shutil.rmtree(other, ignore_errors=True)
    return out


if __name__ == "__main__":
    sys.exit(main())
