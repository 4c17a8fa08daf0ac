"""What all scripts of benchmarks/ have in common: mistakes are one line, before any work."""

import json

import bench
import pytest

SCRIPTS = sorted(
    path.stem for path in (bench.ROOT / "benchmarks").glob("*.py") if path.stem != "bench"
)


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_file_that_cannot_be_written(script, name, tmp_path):
    done = script(name, "--json", tmp_path / "absent" / "rows.json")
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert done.stderr.startswith("--json: got")


def test_the_other_loader_is_missing(script):
    """The line names the command that makes its environment."""
    done = script("input", absent=("pandas",))
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert "pandas" in done.stderr and "benchmarks/input.py --make-env DIR" in done.stderr
    done = script("input", "--make-env", bench.ROOT)
    assert done.returncode == 2 and "a directory that is not there" in done.stderr


def test_rows_name_their_environment(tmp_path):
    file = tmp_path / "rows.json"
    bench.save(file, [{"a": 1}])
    (row,) = json.loads(file.read_text())
    assert row["a"] == 1 and "Python" in row["environment"]
    assert bench.load(file) == [row] and bench.load(tmp_path / "none.json") == []
    assert bench.table([{"a": 1.25, "b": "x"}], {"b": ("name", ""), "a": ("n", ".1f")}) == (
        "name    n\nx     1.2"
    )
