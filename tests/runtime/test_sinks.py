"""Sinks have exactly the rows of metrics.jsonl, after any kill; profiles can be opened."""

import json
import struct
from unittest import mock

import numpy as np
import pytest

from helpers import runs
from vlp.runtime import sinks, workdir
from vlp.train import loop

CONFIG = runs.changed(runs.TOY, sinks=["tensorboard"], steps=6, save_every_steps=4)
EVALS = {"retrieval": {"batch": 8, "every_steps": 2, "gallery": 0}}


def tensorboard(directory):
    """Returns (tag, step, value) of every scalar in the event files, from their framing (length, crc, data, crc)."""
    from tensorboardX.proto.event_pb2 import Event

    found = []
    for path in sorted((directory / "tensorboard").glob("events*")):
        data = path.read_bytes()
        while data:
            (size,) = struct.unpack("<Q", data[:8])
            event = Event.FromString(data[12 : 12 + size])
            found += [(v.tag, event.step, v.simple_value) for v in event.summary.value]
            data = data[16 + size :]
    return found


def clu(directory):
    """The same for the sink clu, read by TensorFlow."""
    import tensorflow as tf

    found = []
    for path in sorted((directory / "clu").glob("events*")):
        for event in tf.compat.v1.train.summary_iterator(str(path)):
            found += [
                (v.tag, event.step, float(tf.make_ndarray(v.tensor))) for v in event.summary.value
            ]
    return found


def wandb(directory):
    """The same for wandb's offline runs, parsed from LevelDB's log format (crc, size, type; 32 KiB blocks)."""
    from wandb.proto.wandb_internal_pb2 import Record

    found, kinds = [], {1: "whole", 2: "first", 3: "middle", 4: "last"}
    for path in sorted((directory / "wandb").glob("offline-run-*/*.wandb")):
        data, at, parts = path.read_bytes(), 7, []  # behind the file's own header
        while at + 7 <= len(data):
            if 32768 - at % 32768 < 7:  # no header fits into the rest of a block
                at += 32768 - at % 32768
                continue
            _, size, kind = struct.unpack("<IHB", data[at : at + 7])
            parts.append(data[at + 7 : at + 7 + size])
            at += 7 + size
            if kinds[kind] in ("whole", "last"):
                record, parts = Record.FromString(b"".join(parts)), []
                items = {"/".join(i.nested_key) or i.key: i for i in record.history.item}
                found += [
                    (tag, record.history.step.num, float(json.loads(i.value_json)))
                    for tag, i in items.items()
                    if not tag.startswith("_")  # wandb's own: step, time
                ]
    return found


READERS = {"tensorboard": tensorboard, "wandb": wandb, "clu": clu}


def record(directory):
    rows = workdir.read(directory / "metrics.jsonl")
    return [(tag, row["step"], v) for row in rows for tag, v in sinks.scalars(row).items()]


def assert_follows(directory, sink="tensorboard"):
    """Asserts that a sink has each number of metrics.jsonl once."""
    found, wanted = sorted(READERS[sink](directory)), sorted(record(directory))
    assert [f[:2] for f in found] == [w[:2] for w in wanted]
    assert len({f[:2] for f in found}) == len(found) > 0
    np.testing.assert_allclose([f[2] for f in found], [w[2] for w in wanted], rtol=1e-6)


@pytest.mark.parametrize("sink", sinks.SINKS)
def test_sinks_have_each_step_once_after_a_kill(sink, toy, tmp_path, monkeypatch):
    """The run dies after steps 5 and 6, before their save, and repeats them."""
    for package in sinks.SINKS[sink][1]:
        pytest.importorskip(package)
    monkeypatch.setenv("WANDB_MODE", "offline")
    config, run = runs.changed(CONFIG, evals=EVALS, sinks=[sink]), tmp_path / "run"
    calls, save = iter(range(1, 100)), loop.save

    def die(*args):
        if next(calls) == 2:
            raise runs.Killed
        return save(*args)

    with mock.patch.object(loop, "save", die), pytest.raises(runs.Killed):
        runs.train(config, run)
    assert record(run)[-1][1] == 6
    assert_follows(run, sink)
    assert runs.train(config, run) == 0
    assert_follows(run, sink)
    found = READERS[sink](run)
    assert {step for tag, step, _ in found if tag == "train/loss"} == {1, 2, 3, 4, 5, 6}
    assert {step for tag, step, _ in found if tag == "retrieval/i2t/R_1"} == {2, 4, 6}


def test_wandb_online_goes_on_behind_what_the_server_has(tmp_path, monkeypatch):
    """With a fake client. Rows of steps that the server has are not sent again."""
    wandb = pytest.importorskip("wandb")
    run = mock.Mock(offline=False, step=5)
    init = mock.Mock(return_value=run)
    monkeypatch.setattr(wandb, "init", init)
    rows = [{"kind": "train", "step": s, "stage": "a", "loss": 1.0 * s} for s in range(1, 8)]
    sink = sinks.WandB(tmp_path, {"name": "it"})
    sink.begin(rows[:4])
    for row in rows[4:]:
        sink.write(row)
    assert [call.kwargs["step"] for call in run.log.call_args_list] == [5, 6, 7]
    sinks.WandB(tmp_path, {"name": "it"}).begin([])
    first, second = (call.kwargs["id"] for call in init.call_args_list)
    assert first == second == (tmp_path / "wandb" / "id").read_text()


def test_wandb_without_a_login(toy, tmp_path, capsys, monkeypatch):
    wandb = pytest.importorskip("wandb")
    refuse = mock.Mock(side_effect=wandb.errors.UsageError("No API key configured.\nmore"))
    monkeypatch.setattr(wandb, "init", refuse)
    assert runs.train(runs.changed(CONFIG, sinks=["wandb"]), tmp_path / "run") == 2
    error = capsys.readouterr().err
    assert "config.sinks: got wandb: No API key" in error and "WANDB_MODE=offline" in error
    assert error.count("\n") == 1


def test_a_sink_added_at_a_restart_gets_the_whole_run(toy, tmp_path):
    """Sinks may change at a restart."""
    run = tmp_path / "run"
    assert runs.train(runs.changed(CONFIG, sinks=[]), run) == 0
    assert not (run / "tensorboard").exists()
    assert runs.train(CONFIG, run) == 0
    assert_follows(run)


def test_not_a_number_is_followed(toy, tmp_path):
    run = tmp_path / "run"
    config = runs.changed(CONFIG, max_nonfinite_steps=1, **{"objective.nan_step": 2})
    assert runs.train(config, run) == 1
    assert np.isnan(
        next(v for tag, step, v in tensorboard(run) if (tag, step) == ("nonfinite/loss", 3))
    )


def test_an_unknown_sink_is_one_line(toy, tmp_path, capsys):
    assert runs.train(runs.changed(CONFIG, sinks=["tensorbord"]), tmp_path / "run") == 2
    assert "did you mean 'tensorboard'?" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_sink_whose_package_is_missing_is_one_line(toy, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(
        sinks.SINKS, "tensorboard", (sinks.TensorBoard, ("no_such_package",), "vlp[tensorboard]")
    )
    assert runs.train(CONFIG, tmp_path / "run") == 2
    assert "pip install 'vlp[tensorboard]'" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_profile_holds_the_steps_asked_for_and_changes_no_number(toy, tmp_path):
    """The trace has exactly these steps; the numbers equal those of a run without it."""
    from jax.profiler import ProfileData

    run = tmp_path / "run"
    assert runs.vlp(*runs.arguments(runs.TOY, run), "--profile", "2:3") == 0
    (trace,) = (run / "profile").rglob("*.xplane.pb")
    events = [
        (event.name, dict(event.stats))
        for plane in ProfileData.from_file(str(trace)).planes
        for line in plane.lines
        for event in line.events
    ]
    assert {stats["step_num"] for name, stats in events if name == "train"} == {2, 3}
    assert runs.train(runs.TOY, tmp_path / "plain") == 0
    runs.assert_same_run(run, tmp_path / "plain")


@pytest.mark.parametrize("text", ["3", "0:2", "3:2", "a:b", "-1:2", "2:5", "7:9"])
def test_mistakes_in_profile_are_one_line(toy, tmp_path, capsys, text):
    argv = runs.arguments(runs.TOY, tmp_path / "run")
    assert runs.vlp(*argv, f"--profile={text}") == 2
    error = capsys.readouterr().err
    assert error.startswith("vlp: --profile: got ") and error.count("\n") == 1
    assert not (tmp_path / "run").exists()
