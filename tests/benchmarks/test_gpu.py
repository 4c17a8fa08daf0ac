"""benchmarks/gpu.py --smoke: every part on a CPU, and what it says where a package is missing."""

import json
import os
import subprocess
import sys

import runs

ABSENT = ("torch", "open_clip", "timm", "ml_collections", "clu")


def gpu(tmp_path, *options, absent=()):
    """Runs the script where the modules cannot be imported, in it and in its workers."""
    lines = ["import sys", *(f"sys.modules[{name!r}] = None" for name in absent)]
    (tmp_path / "sitecustomize.py").write_text("\n".join(lines))
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    cache = os.environ.get("VLP_TEST_CACHE", str(runs.ROOT / ".cache" / "jax-tests"))
    return subprocess.run(
        [sys.executable, "benchmarks/gpu.py", *options], cwd=runs.ROOT, text=True,
        capture_output=True, env=os.environ | {"PYTHONPATH": path, "JAX_COMPILATION_CACHE_DIR": cache},
    )  # fmt: skip


def test_smoke_on_a_bare_image(tmp_path):
    """Each part has a row; what is missing is named once, in one line, and skipped."""
    out = tmp_path / "rows.json"
    done = gpu(tmp_path, "--smoke", "--json", str(out), absent=ABSENT)
    assert done.returncode == 0, done.stdout + done.stderr
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("bring the wheels of")]
    assert "open_clip_torch" in line and "ml_collections" in line and "clu" in line
    rows = json.loads(out.read_text())
    assert {row["part"] for row in rows} == {"attention", "loss", "loss_cost", "input", "train"}
    assert {row["verdict"].partition(":")[0] for row in rows} == {"ok", "skipped"}
    trained = [row for row in rows if row["part"] == "train" and row["verdict"] == "ok"]
    assert {row["model"] for row in trained} == {"coca-B/16", "clip-B/16"}
    assert all(row["environment"] and row["device"] == "cpu" for row in rows)
    assert all(row["grad_error"] < row["limit"] for row in rows if row.get("grad_error"))
    (feed,) = [row for row in rows if row["part"] == "input"]
    assert "ml_collections" in feed["verdict"]


def test_a_part_that_fails_is_a_row(tmp_path):
    """And the next goes on; without a GPU nothing starts unless asked for."""
    done = gpu(
        tmp_path, "--smoke", "--only", "loss", "loss_cost", absent=("vlp.losses.contrastive",)
    )
    assert done.returncode == 1
    assert done.stdout.count("failed: ") == 2 and "2 rows, 2 failed" in done.stdout
    done = gpu(tmp_path)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "expected a GPU" in done.stderr
