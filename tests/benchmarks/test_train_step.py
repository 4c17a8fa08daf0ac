"""benchmarks/train_step.py where neither the data stack nor open_clip is installed, as on a bare GPU image."""

import json
import sys
import time

import bench
import train_step

ABSENT = ("grain", "clu", "array_record", "ml_collections", "open_clip", "torch")


def test_runs_without_the_data_stack(script, tmp_path):
    out = tmp_path / "rows.json"
    options = (
        "--models clip --alone --batch 2 --depth 1 --repeats 1 --scan --mask 0.5 --json".split()
    )
    done = script("train_step", *options, out, absent=ABSENT)
    assert done.returncode == 0, done.stderr
    (row,) = json.loads(out.read_text())
    assert row["impl"] == "vlp" and row["mask"] == 0.5 and row["examples_per_s"] > 0
    assert row["mfu"] is None  # of a CPU, whose peak is not known
    image = 2 * 25 * (12 * 768**2 + 2 * 25 * 768) + 2 * 24 * 3072 * 768  # half of 49 patches, CLS
    text = 2 * 77 * (12 * 512**2 + 2 * 77 * 512)
    assert abs(row["gflops_per_example"] * 1e9 / (3 * (image + text)) - 1) < 0.01


def test_open_clip_is_missing(script):
    done = script("train_step", absent=ABSENT)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "--make-env" in done.stderr


SIDE = """
import sys
sys.path.insert(0, "benchmarks")
import bench, os
def answer(job=None, steps=0):
    if job is not None:
        return {"flops": 1e9, "device": "cpu", "versions": "", "build_s": 0.0, "pid": os.getpid()}
    return {"secs": FACTOR * steps, "cpu_secs": 1.0} if steps else {"peak_gb": 1.0}
bench.serve(answer)
"""


def test_sides_take_turns_in_processes_of_their_own(monkeypatch, tmp_path):
    asked, worker = [], bench.Worker

    class Told(worker):
        def __init__(self, file, serve, side, python):
            self.side = side
            factor = {"vlp": "1.0", "open_clip": "2.0"}[side]
            super().__init__("-c", SIDE.replace("FACTOR", factor), python=python)

        def ask(self, secs=60, **request):
            asked.append((self.side, *request))
            return super().ask(secs, **request)

    monkeypatch.chdir(bench.ROOT)
    monkeypatch.setattr(bench, "Worker", Told)
    monkeypatch.setattr(train_step, "REST_SECS", 0)
    job = {"batch": 4, "dtype": "float32"}
    ours, theirs = train_step.measure(["vlp", "open_clip"], job, 2)
    sides = [side for side, what in filter(lambda one: one[1:] == ("steps",), asked)]
    assert sides == ["vlp", "open_clip"] * 4
    assert ours["ratio"] == 2 and theirs["ratio"] is None
    assert ours["min_s"] == ours["step_s"] == 1 and ours["examples_per_s"] == 4


def test_a_worker_that_hangs_or_ends_is_one_line():
    began = time.monotonic()
    for code, words in (
        ("import time; time.sleep(60)", "no answer within 1 s"),
        ("1 / 0", "ZeroDiv"),
    ):
        try:
            bench.Worker("-c", code, python=sys.executable).ask(1 if "sleep" in code else 30)
        except bench.Failed as error:
            assert words in str(error) and "\n" not in str(error)
        else:
            raise AssertionError(code)
    assert time.monotonic() - began < 20
