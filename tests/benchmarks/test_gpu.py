"""benchmarks/gpu.py --smoke: every part on a CPU, and what it says where a package is missing."""

import json

ABSENT = ("torch", "open_clip", "timm", "ml_collections", "clu")


def test_smoke_on_a_bare_image(script, tmp_path):
    """Each part has a row; what is missing is named once, in one line, and skipped."""
    out = tmp_path / "rows.json"
    done = script("gpu", "--smoke", "--json", out, absent=ABSENT)
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


def test_the_input_rate(script):
    done = script("gpu", "--smoke", "--only", "input")
    assert done.returncode == 0 and "2 rows, 0 failed" in done.stdout, done.stdout


def test_a_part_that_fails_is_a_row(script):
    """The parts after it run. Without a GPU nothing runs unless asked for."""
    absent = ("vlp.losses.contrastive",)
    done = script("gpu", "--smoke", "--only", "loss", "loss_cost", absent=absent)
    assert done.returncode == 1
    assert done.stdout.count("failed: ") == 2 and "2 rows, 2 failed" in done.stdout
    done = script("gpu")
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "expected a GPU" in done.stderr
