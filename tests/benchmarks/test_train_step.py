"""benchmarks/train_step.py where neither the data stack nor open_clip is installed, as on a bare GPU image."""

import json
import subprocess
import sys

import runs

BARE = """
import sys
for name in ("grain", "clu", "array_record", "open_clip", "torch"):
    sys.modules[name] = None  # importing it raises ImportError
sys.argv = ["train_step.py", "--models", "clip", "--alone", "--batch", "2", "--depth", "1", "--repeats", "1",
            "--scan", "--mask", "0.5", "--json", sys.argv[1]]
sys.path.insert(0, "benchmarks")
import train_step
train_step.main()
"""


def test_runs_without_the_data_stack(tmp_path):
    out = tmp_path / "rows.json"
    subprocess.run([sys.executable, "-c", BARE, out], check=True, cwd=runs.ROOT)
    (row,) = json.loads(out.read_text())
    assert row["impl"] == "vlp" and row["mask"] == 0.5 and row["examples_per_s"] > 0
    assert row["mfu"] is None  # of a CPU, whose peak is not known
    image = 2 * 25 * (12 * 768**2 + 2 * 25 * 768) + 2 * 24 * 3072 * 768  # half of 49 patches, CLS
    text = 2 * 77 * (12 * 512**2 + 2 * 77 * 512)
    assert abs(row["gflops_per_example"] * 1e9 / (3 * (image + text)) - 1) < 0.01
