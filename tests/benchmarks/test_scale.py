"""benchmarks/scale.py: it has every row, and measures what the row says."""

import json
import pathlib
import subprocess
import sys

SCRIPT = pathlib.Path(__file__).parents[2] / "benchmarks" / "scale.py"


def test_the_script_runs_at_its_smallest(tmp_path):
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--smoke", "--json", str(tmp_path / "rows.json")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert [(r["what"], r.get("num")) for r in rows[:6]] == [
        ("index", 20_000),
        *((w, 200) for w in ("convert", "filter", "inspect")),
        ("first batch, records", 200),
        ("first batch, tars", 200),
    ]
    assert all(r["python"] and r["cpus"] for r in rows)
    assert {r["bound"] for r in rows[6:]} == {
        "open_s", "beyond_map_mb", "first_batch_s", "peak_spread",
    }  # fmt: skip
    assert done.stdout.count("holds  ") == 4
