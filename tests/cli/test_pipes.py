"""In `vlp … | head` no command shows that its reader has left."""

import os
import subprocess
import sys

import pytest

from helpers import runs
from vlp.cli import main as cli
from vlp.data import records

PRINTS = """
import sys
from vlp import __main__ as program
from vlp.cli import main as cli

def run(argv=None):
    import subprocess
    print("a line", flush="flush" in sys.argv)
    print("said aside", file=sys.stderr)
    subprocess.run([sys.executable, "-c", CHILD], check=True)
    return 0

CHILD = '''
import multiprocessing
from vlp.data import processes

def work(_):
    processes.end_with_parent()
    print("of a worker", flush=True)

if __name__ == "__main__":
    with multiprocessing.get_context("fork").Pool(1) as pool:
        pool.map(work, [0])
'''
cli.main = run
sys.exit(program.main())
"""


def ending(*argv, program=("-m", "vlp"), err=False):
    """Exit code and standard error of a command whose output nobody reads. err: nor its errors."""
    read, write = os.pipe()
    os.close(read)
    env = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
    }
    env.pop("PYTHONUNBUFFERED", None)
    argv = [sys.executable, *program, *map(str, argv)]
    where = write if err else subprocess.PIPE
    try:
        done = subprocess.run(argv, env=env, stdout=write, stderr=where, text=True, timeout=300)
    finally:
        os.close(write)
    return done.returncode, done.stderr


@pytest.mark.parametrize("command", [[], *([c] for c in cli.COMMANDS), ["data", "inspect"]])
def test_help_ends_with_141_in_silence(command):
    assert ending(*command, "--help") == (0 if command == ["train"] else 141, "")


def test_a_command_ends_with_141_whether_or_not_its_errors_are_read(tmp_path):
    record = {"key": "a", "image": b"", "captions": [{"text": "a", "source": "", "lang": ""}]}
    records.write(str(tmp_path / "set"), {"train": [record]}, name="n", info={})
    assert ending("data", "inspect", tmp_path / "set") == (141, "")
    assert ending("data", "inspect", tmp_path / "set", err=True) == (141, None)


def test_a_run_goes_on_without_its_reader(tmp_path):
    argv = runs.arguments(runs.changed(runs.TOY, steps=2), tmp_path / "run")
    code, err = ending(*argv, program=(runs.__file__,))
    assert code == 0 and "Broken" not in err and "Traceback" not in err
    assert runs.rows(tmp_path / "run")[-1]["step"] == 2


@pytest.mark.parametrize("how", ["train", "train flush", "data", "data flush"])
def test_children_are_as_silent_as_the_command(how):
    code, err = ending(*how.split(), program=("-c", PRINTS))
    assert code == (0 if "train" in how else 141)
    assert err in ("", "said aside\n")
