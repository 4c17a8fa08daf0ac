"""What would keep a run from saving is found before its first step, and told in one line."""

import contextlib
import os
import resource
import subprocess
import types

import jax
import numpy as np
import pytest

from helpers import formats, processes, runs
from vlp.core import check
from vlp.data import records, tokenizer
from vlp.runtime import hosts, preflight

BIG = runs.changed(
    runs.TOY, **{"model.embed": 1024}
)  # 540 kB of parameters, three times that in all
ARRAY = jax.ShapeDtypeStruct((1000, 1000), np.float32)


@contextlib.contextmanager
def tmpfs(folder, size):
    """A small disk; skips without the right to mount one."""
    folder.mkdir()
    argv = ["mount", "-t", "tmpfs", "-o", size, "tmpfs", str(folder)]
    try:
        done = subprocess.run(argv, capture_output=True)
    except OSError:
        pytest.skip("no mount")
    if done.returncode:
        pytest.skip("only root may mount")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_disk_without_room_for_a_checkpoint(toy, tmp_path, capsys):
    with tmpfs(tmp_path / "disk", "size=1m") as disk:
        line = runs.refused(capsys, *runs.arguments(BIG, disk / "run"))
        assert line.startswith(f"vlp: --workdir {disk / 'run'}: got ")
        assert " free, expected 1.61 MB for a checkpoint; free space or choose another" in line
        assert not runs.rows(disk / "run")
        assert [p.name for p in (disk / "run").iterdir()] == [".lock"]


# TensorStore's threads call back into asyncio's closed loop; `python -m vlp` prints none of it (vlp/__main__.py).
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_disk_that_fills_up_later_keeps_what_is_saved(toy, tmp_path, capsys, monkeypatch):
    """Another program takes the room; the same command goes on once it is free."""
    from vlp.train import loop

    with tmpfs(tmp_path / "disk", "size=8m") as disk:
        function = loop.save

        def save(session, plan, state, step, interval):
            if step == 4:
                session.checkpoints.wait()
                free = os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize
                (disk / "other").write_bytes(bytes(free - 200_000))
            function(session, plan, state, step, interval)

        with monkeypatch.context() as patch:
            patch.setattr(loop, "save", save)
            assert runs.train(BIG, disk / "run") == 1
        lines = capsys.readouterr().err.strip().splitlines()
        assert len(lines) == 1 and "got No space left on device in saving step 4" in lines[0], lines
        assert "the checkpoints of steps [2] are kept; remove the cause and repeat" in lines[0]
        (disk / "other").unlink()
        assert runs.train(BIG, disk / "run") == 0
        assert int(runs.saved(disk / "run")[""]) == 4


def test_a_disk_without_inodes(toy, tmp_path, capsys):
    with tmpfs(tmp_path / "disk", "nr_inodes=60") as disk:
        line = runs.refused(capsys, *runs.arguments(runs.TOY, disk / "run"))
        assert " files (inodes), expected 100 or more; remove files or choose another" in line


def test_a_read_only_disk(toy, tmp_path, capsys):
    with tmpfs(tmp_path / "disk", "size=8m") as disk:
        argv = runs.arguments(runs.TOY, disk / "run")
        assert subprocess.run(["mount", "-o", "remount,ro", disk]).returncode == 0
        line = runs.refused(capsys, *argv)
        assert "Read-only file system), expected a directory to write in; choose a place" in line


def test_checkpoints_that_cannot_be_written(toy, tmp_path, capsys):
    """checkpoints/ is a link to another disk, which is read-only."""
    with tmpfs(tmp_path / "disk", "size=8m") as disk:
        run = tmp_path / "run"
        assert runs.train(runs.changed(runs.TOY, steps=2), run) == 0
        subprocess.run(["cp", "-a", run / "checkpoints", disk / "checkpoints"], check=True)
        subprocess.run(["rm", "-r", run / "checkpoints"], check=True)
        (run / "checkpoints").symlink_to(disk / "checkpoints")
        assert subprocess.run(["mount", "-o", "remount,ro", disk]).returncode == 0
        argv = runs.arguments(runs.changed(runs.TOY, steps=4), run)
        line = runs.refused(capsys, *argv, "--extend")
        assert "Read-only file system" in line and "correct that and run" in line, line
        assert runs.rows(run)[-1]["step"] == 2


@contextlib.contextmanager
def limit(kind, number):
    before = resource.getrlimit(kind)
    resource.setrlimit(kind, (number, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(kind, before)


def test_a_limit_of_file_size_below_the_largest_array(tmp_path):
    with limit(resource.RLIMIT_FSIZE, 3_000_000):
        with pytest.raises(check.UserError) as refused:
            preflight.check_workdir(tmp_path, [ARRAY], keep=2)
        preflight.check_workdir(tmp_path, [[ARRAY.update(shape=(700, 1000))] * 9], keep=2)
    expected = (
        "got a limit of 3 MB for a file, expected 4 MB for the largest array; raise the limit"
    )
    assert expected in str(refused.value)
    assert not list(tmp_path.iterdir())


def test_what_one_device_writes_counts(tmp_path):
    """A sharded array is written shard by shard."""
    mesh = jax.make_mesh((8,), ("x",))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("x"))
    with limit(resource.RLIMIT_FSIZE, 600_000):
        preflight.check_workdir(tmp_path, [ARRAY.update(sharding=sharding)], keep=2)


def test_room_for_one_checkpoint_but_not_for_all_is_a_warning(tmp_path, monkeypatch, caplog):
    disk = types.SimpleNamespace(
        f_bavail=9_000, f_frsize=1000, f_blocks=10_000, f_files=0, f_favail=0
    )
    monkeypatch.setattr(os, "statvfs", lambda path: disk)
    preflight.check_workdir(tmp_path, [ARRAY], keep=2)
    assert (
        "has 9 MB free; 2 checkpoints (config.keep_checkpoints) and one being written"
        in caplog.text
    )
    caplog.clear()
    preflight.check_workdir(tmp_path, [ARRAY], keep=1)
    disk.f_blocks = 0  # a file system that does not know
    preflight.check_workdir(tmp_path, [ARRAY] * 9, keep=1)
    assert not caplog.text


def test_a_disk_that_returns_other_bytes(tmp_path, monkeypatch):
    monkeypatch.setattr(preflight.paths, "read", lambda path: b"other")
    with pytest.raises(
        check.UserError, match="got other bytes in .* than were written, expected the"
    ):
        preflight.check_workdir(tmp_path, [ARRAY], keep=1)


def test_a_workdir_that_is_not_shared(tmp_path, monkeypatch):
    """Each process looks for a file of process 0; here it is never there."""
    monkeypatch.setattr(hosts, "_SEE_SECS", 0.3)
    with pytest.raises(check.UserError, match="give a --workdir that all hosts share"):
        preflight._check_shared(tmp_path / "token", "a")


def test_a_quota_is_named(tmp_path, monkeypatch):
    def full(path, data):
        raise OSError(122, os.strerror(122))

    monkeypatch.setattr(preflight.paths, "write", full)
    with pytest.raises(
        check.UserError, match="got Disk quota exceeded, expected room .*; free space"
    ):
        preflight.check_workdir(tmp_path, [ARRAY], keep=1)


def test_more_shards_than_files_may_be_open(toy, tmp_path):
    """400 shards with `ulimit -n 256`: no record is taken for a bad one. 100 files are too few for any run.

    The soft limit, here 64, is raised to the hard one.
    """
    pairs = [
        {
            "key": f"k{i:03d}",
            "image": formats.jpeg(i),
            "captions": [{"text": f"number {i}", "source": "a", "lang": "en"}],
        }
        for i in range(400)
    ]
    words = tokenizer.train([r["captions"][0]["text"] for r in pairs], 60)
    files = {records.TOKENIZER: words.to_bytes()}
    data = tmp_path / "data"
    records.write(data, {"train": pairs}, name="n", info={}, records_per_shard=1, files=files)
    reading = {"path": str(data), "image_px": 16, "text_len": 8, "langs": [], "read_threads": 2}
    config = runs.changed(runs.TOY, steps=60, save_every_steps=20, data=reading)
    limits = [(64, 256), (100, 100)]  # soft, hard
    directories = [tmp_path / f"{soft}" for soft, _ in limits]
    with processes.Run(config, directories, files=dict(enumerate(limits))) as run:
        assert run.finish() == [0, 2], [run.out(i) + run.err(i) for i in range(2)]
        expected = "expected 128 or more; raise the limit with `ulimit -n`"
        assert run.err(1) == f"vlp: open files: got a limit of 100, {expected}\n"
    (last,) = [r for r in runs.rows(directories[0]) if r["step"] == 60]
    assert not {k: v for k, v in last.items() if k.startswith("data/bad") and v}
