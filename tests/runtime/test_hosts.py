"""Runs of several processes with 4 devices each on this machine, and the roll call before JAX starts."""

import concurrent.futures
import json
import shutil
import signal
import socket
import textwrap
import time

import numpy as np
import pytest

from helpers import runs
from vlp.core import check, local
from vlp.core import mesh as meshes
from vlp.core.mesh import MeshShape
from vlp.report import html
from vlp.runtime import hosts
from vlp.runtime.stop import PREEMPTED
from vlp.train import loop

FACTS = {"config": {"batch": 8, "optim": {"b2": 0.99}}, "versions": {"git": "abc"}}


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@pytest.fixture
def port():
    return free_port()


# ---- the roll call


def meet(port, workdir, who, num, secs=20.0):
    """Runs the roll call in threads, one for each process of `who`; returns their messages.

    who: {process: facts or (facts, workdir)}.
    """

    def one(process):
        facts, directory = (
            who[process] if isinstance(who[process], tuple) else (who[process], workdir)
        )
        try:
            hosts.roll_call(hosts.Place(f"127.0.0.1:{port}", num, process), facts, directory, secs)
        except check.UserError as e:
            return str(e)
        return ""

    with concurrent.futures.ThreadPoolExecutor(len(who)) as pool:
        return dict(zip(who, pool.map(one, who)))


def test_the_roll_call_passes_once_all_have_come(port, tmp_path):
    assert set(meet(port, tmp_path / "a" / "run", {i: FACTS for i in range(4)}, 4).values()) == {""}
    assert not (tmp_path / "a").exists()  # nothing is left of it
    assert set(meet(port, tmp_path, {i: FACTS for i in range(2)}, 2).values()) == {""}
    assert list(tmp_path.iterdir()) == []


def test_missing_processes_are_named_to_all(port, tmp_path):
    began = time.monotonic()
    told = meet(port, tmp_path, {0: FACTS, 1: FACTS, 4: FACTS}, 8, secs=1.5)
    assert time.monotonic() - began < 30  # not a time but an end
    host = socket.gethostname()
    assert set(told.values()) == {
        "hosts: got 3 of 8 processes within 2 s; missing: 2-3, 5-7, expected all (here: 0 on "
        f"{host}, 1 on {host}, 4 on {host}); start the missing ones, or look at their output"
    }


def test_process_0_alone_names_who_is_missing(port, tmp_path):
    (told,) = meet(port, tmp_path, {0: FACTS}, 2, secs=0.5).values()
    assert (
        "1 of 2 processes within 0 s; missing: 1, expected all (here: 0 on" in told
        and ", )" not in told
    )


def test_without_process_0_its_address_is_named(port, tmp_path):
    (told,) = meet(port, tmp_path, {1: FACTS}, 2, secs=1.0).values()
    assert told.startswith(f"hosts: got no answer from process 0 at 127.0.0.1:{port} within 1 s (")


def test_the_first_timeout_ends_the_wait_for_all(port, tmp_path):
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        one = pool.submit(meet, port, tmp_path, {1: FACTS}, 3, 2.0)
        lead = pool.submit(meet, port, tmp_path, {0: FACTS}, 3, 600.0)
        told = [next(iter(f.result(60).values())) for f in (one, lead)]
    assert told[0] == told[1] and "missing: 2" in told[0]


@pytest.mark.parametrize(
    "changes, num, said",
    [
        ({"config": {"batch": 16, "optim": {"b2": 0.9}}}, 3, "config.batch: 8 -> 16 and 1 more"),
        ({"versions": {"git": "abd"}}, 3, 'versions.git: "abc" -> "abd"'),
    ],
)
def test_a_process_with_another_config_or_code_is_named(port, tmp_path, changes, num, said):
    told = meet(port, tmp_path, {0: FACTS, 1: FACTS, 2: FACTS | changes}, num)
    where = f"process 2 on {socket.gethostname()}: got another {said}, expected what process 0 has;"
    assert len(set(told.values())) == 1 and told[1].startswith(where), told


def test_a_process_that_counts_other_processes_is_named(port, tmp_path):
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        told = list(pool.map(lambda a: meet(port, tmp_path, {a[0]: FACTS}, a[1]), [(0, 2), (1, 4)]))
    assert "process 1" in told[0][0] and "another processes: 2 -> 4" in told[0][0]
    assert told[0][0] == told[1][1]


def test_two_processes_with_one_number_are_named(port, tmp_path):
    with concurrent.futures.ThreadPoolExecutor(3) as pool:
        told = list(pool.map(lambda i: meet(port, tmp_path, {i: FACTS}, 3), [0, 1, 1]))
    told = {message for t in told for message in t.values()}
    assert len(told) == 1 and "process 1 twice (on " in told.pop()


def test_a_workdir_that_is_not_shared_is_named(port, tmp_path):
    mine, other = tmp_path / "mine", tmp_path / "other"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hosts, "_SEE_SECS", 0.5)
        told = meet(port, mine, {0: FACTS, 1: FACTS, 2: (FACTS, other)}, 3)
    assert len(set(told.values())) == 1
    assert told[1].startswith(f"--workdir {mine}: got not shared: process 2 on ")
    assert list(tmp_path.iterdir()) == []


def test_connections_of_other_programs_are_dropped(port, tmp_path):
    def stranger():
        for _ in range(100):
            try:
                with socket.create_connection(("127.0.0.1", port), timeout=5) as line:
                    line.sendall(b"GET / HTTP/1.1\r\n\r\n")
                    return line.recv(10)
            except OSError:
                time.sleep(0.05)

    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        lead = pool.submit(meet, port, tmp_path, {0: FACTS}, 2, 60.0)
        assert pool.submit(stranger).result(60) == b""
        assert meet(port, tmp_path, {1: FACTS}, 2) == {1: ""}
        assert lead.result(60) == {0: ""}


def test_a_port_in_use_is_one_line(tmp_path):
    with socket.socket() as s:
        s.bind(("", 0))
        s.listen()
        (told,) = meet(s.getsockname()[1], tmp_path, {0: FACTS}, 2).values()
    assert told.endswith("expected a free port; stop what uses the port, or choose another")


# ---- who takes part


def test_a_process_finds_its_place_by_flags_then_environment(monkeypatch):
    for name in ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"):
        monkeypatch.delenv(name, raising=False)
    assert hosts.find() is None  # no cluster
    assert hosts.find("a:1", 4, 2) == hosts.Place("a:1", 4, 2)
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "[::1]:2222")
    with pytest.raises(
        check.UserError, match=r"got coordinator=\[::1\]:2222, processes=None, proc"
    ):
        hosts.find()
    monkeypatch.setenv("JAX_NUM_PROCESSES", "4")
    monkeypatch.setenv("JAX_PROCESS_ID", "0")
    assert hosts.find(process=3) == hosts.Place("[::1]:2222", 4, 3)
    assert hosts.find(process=3).address == ("::1", 2222)
    assert hosts.find("none") is None
    for wrong in (("a", 2, 0), ("a:b", 2, 0), ("a:0", 2, 0), ("a:1", 2, 2), ("a:1", 0, 0)):
        with pytest.raises(check.UserError):
            hosts.find(*wrong)
    monkeypatch.setenv("JAX_PROCESS_ID", "first")
    with pytest.raises(check.UserError, match="JAX_PROCESS_ID: got 'first', expected a number"):
        hosts.find()


def test_a_process_finds_its_place_under_slurm(monkeypatch):
    names = {
        "SLURM_JOB_ID": "7", "SLURM_STEP_NODELIST": "gpu[03-06]", "SLURM_NTASKS": "4",
        "SLURM_PROCID": "2", "SLURM_LOCALID": "0",
    }  # fmt: skip
    for name, value in names.items():
        monkeypatch.setenv(name, value)
    place = hosts.find()
    assert place is not None and place.address[0] == "gpu03" and place.address[1] > 60_000
    assert (place.num, place.process, place.local) == (4, 2, (0,))
    monkeypatch.setenv("SLURM_NTASKS", "1")
    assert hosts.find() is None


# ---- rows


class Device:
    def __init__(self, number, process):
        self.id, self.process_index = number, process


@pytest.mark.parametrize(
    "processes, shape, rows",
    [
        ("00001111", (8, 1, 1), [range(8, 16)]),
        ("00110011", (8, 1, 1), [range(4, 8), range(12, 16)]),  # a TPU mesh, folded
        ("00001111", (1, 4, 2), [range(8, 16)]),
        ("00001111", (1, 1, 8), [range(16)]),  # all of it on both
        ("01010101", (1, 4, 2), [range(16)]),
    ],
)
def test_each_process_loads_the_rows_of_its_devices(monkeypatch, processes, shape, rows):
    mesh = meshes.make(MeshShape(*shape))
    fakes = [Device(i, int(p)) for i, p in enumerate(processes)]
    places = dict(zip(fakes, meshes.batch_sharding(mesh).devices_indices_map((16,)).values()))
    fake = type("Sharding", (), {"devices_indices_map": lambda self, shape: places})
    monkeypatch.setattr(meshes, "batch_sharding", lambda mesh: fake())
    assert list(local.rows(16, mesh, 1)) == rows


# ---- real processes


def start(config, directory, port, num=2, of=2, each=lambda i: (), program=None):
    """`vlp train` as the first `num` of `of` processes of one run; each: more arguments of process i."""
    out = []
    for i in range(num):
        argv = runs.arguments(config, directory) + ["--coordinator", f"127.0.0.1:{port}"]
        argv += ["--processes", of, "--process", i, *each(i)]
        out.append(runs.command(*argv, **({"program": program} if program else {})))
    return out


def finish(processes):
    """Exit codes and error outputs."""
    with concurrent.futures.ThreadPoolExecutor(len(processes)) as pool:
        texts = list(pool.map(lambda p: p.communicate(timeout=240), processes))
    return [p.returncode for p in processes], [errors for _, errors in texts]


@pytest.fixture(autouse=True)
def _devices(monkeypatch):
    monkeypatch.setenv("JAX_NUM_CPU_DEVICES", "4")


def test_missing_processes_and_other_configs_end_all_commands_with_code_2(tmp_path, port):
    wait = lambda i: ("--wait-secs", 20)
    codes, errors = finish(start(runs.TOY, tmp_path / "run", port, of=3, each=wait))
    assert codes == [2, 2] and errors[0] == errors[1]
    assert errors[0].startswith("vlp: hosts: got 2 of 3 processes within ")
    assert " s; missing: 2, expected all (here: 0 on " in errors[0]
    assert errors[0].count("\n") == 1
    other = lambda i: ("--config.seed=3",) if i else ()
    codes, errors = finish(start(runs.TOY, tmp_path / "run", port, each=other))
    assert codes == [2, 2] and errors[0] == errors[1]
    assert errors[0].startswith(
        f"vlp: process 1 on {socket.gethostname()}: got another config.seed: "
    )
    assert not (tmp_path / "run").exists()


def test_an_error_on_one_process_is_raised_on_all(tmp_path, port):
    """A setting that may differ between hosts passes the roll call; opening the data raises."""
    other = lambda i: ("--config.data.workers=-1",) if i else ()
    codes, errors = finish(start(runs.TOY, tmp_path / "run", port, each=other))
    assert codes == [2, 2], errors
    said = "config.data.workers: got -1, expected at least 0; correct config.data.workers\n"
    assert errors == [f"vlp: process 1 on {socket.gethostname()}: {said}", f"vlp: {said}"]


def assert_close(directory, wanted, rtol):
    """Asserts that records and last states are equal up to rounding."""
    for row, other in zip(runs.rows(directory), runs.rows(wanted), strict=True):
        assert row.keys() == other.keys()
        for key, value in row.items():
            close = (
                pytest.approx(other[key], rtol, 1e-5) if isinstance(value, float) else other[key]
            )
            assert value == close, (row["kind"], row["step"], key)
    ours, theirs = runs.saved(directory), runs.saved(wanted)
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        if name.endswith("qkv/bias"):  # a key's has no gradient but rounding, made large by Adam
            continue
        np.testing.assert_allclose(value, theirs[name], rtol=rtol, atol=1e-5, err_msg=name)


SLOW = """
    import logging, sys, time
    sys.path.insert(0, "tests")
    from helpers import runs
    from vlp.core import mesh
    logging.root.handlers.clear()
    runs.register_toy()
    to_global = mesh.to_global
    mesh.to_global = lambda *args: time.sleep(0.2) or to_global(*args)
    sys.exit(runs.cli.main())
"""


def test_sigterm_on_one_process_stops_all_and_one_or_four_can_resume(
    toy, tmp_path, port, monkeypatch
):
    """SIGTERM on process 1 makes both save after the same step. One process with one device resumes, as if it had been
    alone, and so do four with two each. A step is skipped before; after, all go back at a spike of the loss (step 55).
    """
    bad = {"name": "toy", "nan_step": 0, "fault": "spike", "bad": [54 * 8, 55 * 8]}
    spike = {"factor": 20.0, "window_steps": 30, "margin_steps": 1}
    config = runs.changed(
        runs.TOY,
        steps=60,
        save_every_steps=50,
        mesh={"data": 2, "fsdp": 4},
        objective=bad,
        spike=spike,
    )
    slow = ("-c", textwrap.dedent(SLOW))
    first, second = start(config, tmp_path / "run", port, program=slow)
    for line in first.stdout:
        if "] stage0" in line:
            break
    second.send_signal(signal.SIGTERM)
    codes, errors = finish([first, second])
    assert codes == [PREEMPTED, PREEMPTED], errors
    step = int(runs.saved(tmp_path / "run")[""])
    assert 0 < step < 60 and runs.rows(tmp_path / "run")[-1]["step"] == step
    assert (tmp_path / "run" / "versions.json").read_text().count('"processes": 2') == 1
    assert len(json.loads((tmp_path / "run" / "nonfinite_step1.json").read_text())["keys"]) == 8
    shutil.copytree(tmp_path / "run", tmp_path / "four")
    monkeypatch.setenv("JAX_NUM_CPU_DEVICES", "2")
    codes, errors = finish(start(config, tmp_path / "four", free_port(), num=4, of=4))
    assert codes == [0] * 4, errors
    config = runs.changed(config, mesh={"data": 1, "fsdp": 1})
    assert runs.train(config, tmp_path / "run") == 0
    assert runs.train(config, tmp_path / "whole") == 0
    told = [r for r in runs.rows(tmp_path / "whole") if r["kind"] == "rollback"]
    assert [(r["step"], r["left_out"]) for r in told] == [(50, 5)]
    assert_close(tmp_path / "run", tmp_path / "whole", 1e-3)
    assert_close(tmp_path / "four", tmp_path / "whole", 1e-3)


TINY = runs.changed(
    runs.CLIP,
    **{
        "objective.keep_ratio": 0.5, "evals": {"retrieval": {"batch": 16}},
        "model.image_tower.dropout": 0.1, "model.text_tower.dropout": 0.1,
    },
)  # fmt: skip


def test_two_processes_train_as_one_does(tmp_path, port):
    """With masks, dropout, evaluation and sharded parameters, resumed from a checkpoint of one device."""
    assert runs.train(TINY, tmp_path / "whole") == 0
    calls = iter(range(1, 100))
    save = loop.save

    def die(*args):
        save(*args)
        if next(calls) == 1:
            raise runs.Killed

    with pytest.MonkeyPatch.context() as patch, pytest.raises(runs.Killed):
        patch.setattr(loop, "save", die)
        runs.train(TINY, tmp_path / "run")
    config = runs.changed(TINY, mesh={"data": 1, "fsdp": 8})
    codes, errors = finish(start(config, tmp_path / "run", port))
    assert codes == [0, 0], errors
    assert_close(tmp_path / "run", tmp_path / "whole", 1e-3)
    assert "retrieval" in html.write(tmp_path / "run").read_text()
    assert runs.vlp("eval", "--workdir", tmp_path / "run") == 0


@pytest.mark.parametrize("secs", ["nan", "0", "-1", "inf"])
def test_wait_secs_must_be_a_positive_number(tmp_path, capsys, secs):
    argv = ("train", "--config", runs.TOY, "--workdir", tmp_path / "run", f"--wait-secs={secs}")
    assert runs.vlp(*argv) == 2
    assert capsys.readouterr().err.startswith("vlp: --wait-secs: got ")
    assert not (tmp_path / "run").exists()
