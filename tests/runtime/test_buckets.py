"""Workdirs in buckets, on emulators of Google Cloud Storage and S3: the same run as on a disk, also through faults."""

import asyncio
import contextlib
import json
import os
import textwrap
import threading
import time
import types

import numpy as np
import pytest

from helpers import buckets, faulty_proxy, runs
from runtime.test_hosts import assert_close, finish, free_port
from vlp.ckpt.manager import Checkpoints
from vlp.core import appended, check, paths, stores
from vlp.runtime import locks, workdir
from vlp.train import loop

SLOW = pytest.mark.skipif("VLP_SLOW" not in os.environ, reason="minutes: VLP_SLOW=1")
CONFIG = runs.changed(runs.TOY, **{"evals.retrieval": {"batch": 8, "every_steps": 2}})


@pytest.fixture(scope="module")
def emulators():
    """{"gs": environment, "s3": environment} of emulators that run."""
    with buckets.gcs() as gs, buckets.s3() as s3:
        yield {"gs": gs, "s3": s3}


@pytest.fixture(params=["gs", "s3"])
def root(request, emulators, tmp_path):
    """The address of an unused folder in a bucket; this process and those it starts use its emulator."""
    with buckets.used(emulators[request.param]):
        yield f"{request.param}://{buckets.BUCKET}/{tmp_path.name}"


@pytest.fixture
def gs(emulators, tmp_path):
    with buckets.used(emulators["gs"]):
        yield f"gs://{buckets.BUCKET}/{tmp_path.name}"


@pytest.fixture(scope="module")
def local(tmp_path_factory):
    """The same run on a disk."""
    runs.register_toy()
    directory = tmp_path_factory.mktemp("local") / "run"
    assert runs.train(CONFIG, directory) == 0
    return directory


def train(directory, tmp_path, config=CONFIG, *more):
    return runs.vlp(*runs.arguments(config, directory, tmp_path / "config.json"), *more)


# ---- runs


def test_a_run_in_a_bucket_is_the_run_on_a_disk(root, local, tmp_path, toy, capsys):
    """Training, evaluation, report, average and extension; nothing is written on this machine."""
    run = f"{root}/run"
    before = sorted(os.listdir())
    assert (
        train(run, tmp_path, runs.changed(CONFIG, sinks=["tensorboard"]), "--profile", "2:3") == 0
    )
    runs.assert_same_run(run, local)
    names = paths.files(run)
    assert {n.split("/")[0] for n in names} == {
        ".lease", "checkpoints", "config.json", "evals", "metrics.jsonl", "parameters.txt",
        "preprocessing.json", "profile", "saved.json", "tensorboard", "tokenizer.model",
        "versions.json",
    }  # fmt: skip
    capsys.readouterr()
    assert runs.vlp("eval", "--workdir", local) == 0
    told = capsys.readouterr().out
    assert runs.vlp("eval", "--workdir", run, "--write") == 0
    assert capsys.readouterr().out == told
    assert (
        runs.vlp("report", run) == 0
        and runs.vlp("report", run, local, "--out", tmp_path / "x.html") == 0
    )
    assert b"retrieval" in paths.read(f"{run}/report.html")
    assert runs.vlp("average", run, f"{run}@2", "--out", f"{root}/mean") == 0
    assert runs.vlp("eval", "--workdir", f"{root}/mean") == 0
    assert sorted(os.listdir()) == before


KILLED = """
    import os, signal, sys
    sys.path.insert(0, "tests")
    from helpers import runs
    from vlp.train import loop
    import logging
    logging.root.handlers.clear()
    runs.register_toy()
    write = loop.write_step
    def die(session, plan, done, *rest):
        write(session, plan, done, *rest)
        if done.number == 3:
            session.checkpoints.wait()  # the save of step 2; this step is lost
            os.kill(os.getpid(), signal.SIGKILL)
    loop.write_step = die
    sys.exit(runs.cli.main())
"""


def test_a_killed_run_resumes_from_the_bucket(root, local, tmp_path, toy, monkeypatch):
    monkeypatch.setenv("JAX_NUM_CPU_DEVICES", "1")
    argv = runs.arguments(CONFIG, f"{root}/run", tmp_path / "config.json")
    process = runs.command(*argv, program=("-c", textwrap.dedent(KILLED)))
    errors = process.communicate(timeout=240)[1]
    assert process.returncode == -9, errors
    assert json.loads(paths.read(f"{root}/run/saved.json")) == {"step": 2}
    assert train(f"{root}/run", tmp_path) == 0  # at once: the lease of a dead process is free
    runs.assert_same_run(f"{root}/run", local)


def test_two_processes_share_a_bucket(gs, tmp_path, toy, monkeypatch):
    """2 processes × 4 devices: roll call, arrays of both, heartbeats; the numbers are those of a run on a disk."""
    monkeypatch.setenv("JAX_NUM_CPU_DEVICES", "4")
    config = runs.changed(CONFIG, mesh={"data": 2, "fsdp": 4})

    def start(config, directory):
        port, started = free_port(), []
        for i in range(2):
            argv = runs.arguments(config, directory, tmp_path / "config.json")
            argv += ["--coordinator", f"127.0.0.1:{port}", "--processes", 2, "--process", i]
            started.append(runs.command(*argv))
        codes, errors = finish(started)
        assert codes == [0, 0], errors

    start(config, f"{gs}/run")
    if "VLP_SLOW" in os.environ:
        start(config, tmp_path / "run")
        runs.assert_same_run(f"{gs}/run", tmp_path / "run")
    assert runs.train(config, tmp_path / "one", devices=8) == 0
    assert_close(f"{gs}/run", tmp_path / "one", 1e-5)
    assert any("process_1/" in name for name in paths.files(f"{gs}/run/checkpoints"))
    config = runs.changed(config, steps=6, mesh={})
    assert train(f"{gs}/run", tmp_path, config, "--extend") == 0


# ---- faults


@contextlib.contextmanager
def behind(emulator, faults):
    with emulator(lambda port: faulty_proxy.before(port, faults)) as env, buckets.used(env):
        yield


@pytest.fixture
def hasty(monkeypatch):
    """gcsfs waits a second before it repeats a request, then twice as long each time: here a twentieth of that."""
    if "VLP_SLOW" not in os.environ:
        sleep = lambda secs: asyncio.sleep(secs / 20)
        monkeypatch.setattr("gcsfs.retry.asyncio", types.SimpleNamespace(sleep=sleep))


@pytest.mark.parametrize(
    "emulator, errors, outage_secs, steps",
    [
        (buckets.gcs, 0.01, 2, 4),
        pytest.param(buckets.gcs, 0.05, 30, 20, marks=SLOW),
        pytest.param(buckets.s3, 0.05, 30, 20, marks=SLOW),
    ],
)
def test_a_run_goes_on_through_a_store_that_fails(
    emulator, errors, outage_secs, steps, tmp_path, toy, monkeypatch, hasty
):
    """1 or 5 % of the requests fail, half of them after they were carried out, 1 % stall, all fail during a save."""
    config = runs.changed(CONFIG, steps=steps)
    assert runs.train(config, tmp_path / "run") == 0
    faults = faulty_proxy.Faults(errors=errors, stalls=0.01)
    save, calls = loop.save, iter(range(100))

    def failing(*args):
        if next(calls) == 1:
            faults.down_until = time.monotonic() + outage_secs
        save(*args)

    monkeypatch.setattr(loop, "save", failing)
    scheme = "gs" if emulator is buckets.gcs else "s3"
    with behind(emulator, faults):
        run = f"{scheme}://{buckets.BUCKET}/run"
        began = time.monotonic()
        codes = [train(run, tmp_path, config)]
        while codes[-1] == 1 and len(codes) < 4:  # stopped, with a valid step: the same command
            codes.append(train(run, tmp_path, config))
        print(f"{time.monotonic() - began:.0f} s, exit codes {codes}", faults)
        assert codes == [0] or outage_secs >= 30 and codes[-1] == 0
        assert faults.failed and faults.stalled and faults.refused
        faults.on = False
        runs.assert_same_run(run, tmp_path / "run")


def test_a_store_that_stays_away_ends_the_run_with_a_valid_step(
    local, tmp_path, toy, monkeypatch, capsys, hasty
):
    monkeypatch.setattr(locks, "SECS", 3.0)
    faults, impatient = faulty_proxy.Faults(), stores.Policy(2, patience_secs=0.0, stall_secs=0.5)
    save, calls = loop.save, iter(range(100))

    def failing(*args):
        if next(calls) == 1:
            args[0].checkpoints.wait()
            monkeypatch.setattr(stores, "POLICY", impatient)
            faults.down_until = time.monotonic() + 3600
        save(*args)

    with behind(buckets.gcs, faults):
        run = f"gs://{buckets.BUCKET}/run"
        patient = stores.POLICY
        monkeypatch.setattr(loop, "save", failing)
        assert train(run, tmp_path) == 1
        monkeypatch.setattr(stores, "POLICY", patient)
        monkeypatch.setattr(loop, "save", save)
        assert "got 2 failed requests" in capsys.readouterr().err
        faults.down_until = 0.0
        assert train(run, tmp_path) == 0
        runs.assert_same_run(run, local)


# ---- addresses


def test_a_bucket_that_is_not_there(root, tmp_path, toy, capsys):
    scheme = root.partition("://")[0]
    for argv in (
        runs.arguments(runs.TOY, f"{scheme}://nothing-there/run", tmp_path / "config.json"),
        ["eval", "--workdir", f"{root}/none"],
        ["report", f"{root}/none"],
    ):
        line = runs.refused(capsys, *argv)
        assert "nothing-there" in line or f"{root}/none" in line


def test_a_job_needs_no_right_to_read_the_bucket_itself(gs, monkeypatch):
    """Roles for objects are enough; Orbax asks for the bucket's metadata before it lists and removes steps."""
    from orbax.checkpoint._src.path import gcs_utils

    def forbidden(name):
        raise PermissionError("storage.buckets.get")

    monkeypatch.setattr(gcs_utils, "get_bucket", forbidden)
    checkpoints = Checkpoints(f"{gs}/checkpoints", keep=1)
    for step in (1, 2):
        checkpoints.save(step, {"w": np.ones(3)}, {"step": np.ones(1)}, {})
    checkpoints.close()
    assert checkpoints.steps() == [2] == [Checkpoints(f"{gs}/checkpoints").newest()]


# ---- metrics


def test_metrics_grow_in_parts_and_a_restart_cuts_them(root, monkeypatch):
    monkeypatch.setattr(appended, "PART_BYTES", 100)
    path = paths.of(f"{root}/metrics.jsonl")
    rows = [{"kind": "train", "step": step} for step in range(1, 21)]
    metrics = workdir.Metrics(path, 0)
    for row in rows:
        metrics.write(row)
    metrics.close()
    sizes = paths.files(root)
    assert len(sizes) > 4 and max(sizes.values()) <= 100
    assert workdir.read(path) == rows
    metrics = workdir.Metrics(path, 11)
    assert metrics.begun == rows[:11] == workdir.read(path)
    metrics.write({"kind": "train", "step": 12})
    metrics.close()
    assert workdir.read(path) == rows[:12]
    metrics = workdir.Metrics(path, 0)  # no checkpoint: kept aside
    metrics.write(rows[0])
    metrics.close()
    assert workdir.read(path) == rows[:1]
    assert workdir.read(path.with_name("metrics_aside_1.jsonl")) == rows[:12]


def test_parts_that_were_copied_to_a_disk_are_one_file(gs, tmp_path, monkeypatch):
    monkeypatch.setattr(appended, "PART_BYTES", 100)
    file = appended.Appended(paths.of(f"{gs}/metrics.jsonl"))
    for step in range(20):
        file.write(f'{{"step": {step}}}\n')
    file.close()
    for name in paths.files(gs):
        paths.copy(f"{gs}/{name}", tmp_path / name)
    path = tmp_path / "metrics.jsonl"
    assert [row["step"] for row in workdir.read(path)] == list(range(20))
    metrics = workdir.Metrics(path, 9)
    metrics.write({"step": 10})
    metrics.close()
    assert [row["step"] for row in workdir.read(path)] == list(range(11))


# ---- the lease


def test_one_run_at_a_time_in_a_bucket(root, monkeypatch):
    """A lease that is renewed is respected, one that is not is taken over, and its owner notices."""
    monkeypatch.setattr(locks, "SECS", 1.0)
    monkeypatch.setattr(locks, "_started", lambda pid: f"{pid}, which lives")
    place = paths.of(f"{root}/run")
    first = locks.lock(place)
    with pytest.raises(check.UserError, match="a run that is going on on "):
        locks.lock(place)
    first.check()
    with monkeypatch.context() as patch:
        patch.setattr(first._closed, "wait", lambda secs: time.sleep(2.5))  # it hangs
        time.sleep(0.5)
        second = locks.lock(place)
    for _ in range(100):
        if first._lost:
            break
        time.sleep(0.05)
    with pytest.raises(check.Failed, match="a workdir that a run on .* took over"):
        first.check()
    first.close()
    second.check()
    second.close()
    third = locks.lock(place)  # at once: it was given back
    third.close()
    assert list(paths.files(place)) == [".lease/000000003.json"]


def test_of_many_starts_at_once_one_gets_the_lease(gs, monkeypatch):
    monkeypatch.setattr(locks, "SECS", 1.0)
    monkeypatch.setattr(locks, "_started", lambda pid: f"{pid}, which lives")
    got = []

    def start():
        with contextlib.suppress(check.UserError):
            got.append(locks.lock(paths.of(f"{gs}/run")))

    threads = [threading.Thread(target=start) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(got) == 1
    got[0].close()
