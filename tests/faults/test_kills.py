"""A short form of run.py: real processes, killed at moments of each kind."""

import json
import subprocess
import sys

from helpers import runs


def test_runs_that_are_killed_go_on_as_if_nothing_had_happened(tmp_path):
    argv = [sys.executable, runs.ROOT / "tests" / "faults" / "run.py", "--kills", "4"]
    done = subprocess.run(
        [*argv, "--seed", "3", "--json", tmp_path / "rows.json"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert len(rows) >= 4 and all(row["curve_equal"] for row in rows), rows
    assert len({row["moment"] for row in rows}) >= 2, rows
