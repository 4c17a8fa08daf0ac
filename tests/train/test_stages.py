"""Stages: what one hands to the next, and what starts anew."""

import contextlib
import types
from unittest import mock

import jax
import numpy as np
import pytest
import runs

from vlp.core import tree
from vlp.data import order
from vlp.infer.load import load
from vlp.ops import posembed
from vlp.optim.schedules import Schedule
from vlp.train import loop

AT_ENTRY = [{"name": "one", "steps": 3}, {"name": "two", "steps": 2}]


@contextlib.contextmanager
def watched():
    """Yields what will hold, for every stage entered, the state before and the state after, on the host."""
    seen, enter = [], loop.enter
    named = lambda state: None if state is None else tree.named(jax.tree.map(np.array, state))

    def watch(session, parts, previous, position):
        before = named(previous)
        state = enter(session, parts, previous, position)
        seen.append(types.SimpleNamespace(stage=parts.stage, before=before, after=named(state)))
        return state

    with mock.patch.object(loop, "enter", watch):
        yield seen


def part(state, name):
    """The arrays of one part of a state: "params", "opt", "teachers/ema" …"""
    return {k.removeprefix(f"{name}/"): v for k, v in state.items() if k.startswith(f"{name}/")}


def entered(config, directory):
    """The state with which a run begins; nothing is trained."""
    with watched() as seen, mock.patch.object(loop, "train_stage", side_effect=runs.Killed):
        with pytest.raises(runs.Killed):
            runs.train(config, directory)
    return seen[0].after


def test_other_sizes(tmp_path, monkeypatch):
    """Image size, text length and batch change: positions are resized by their rules, all else is carried."""
    positions, feed = [], loop.feed

    def watch(*args):
        for batch in feed(*args):
            positions.append(order.join_words(np.asarray(batch["index"])))
            yield batch

    monkeypatch.setattr(loop, "feed", watch)
    with watched() as (seen):
        assert runs.train(runs.COCA, tmp_path / "run") == 0
    first, second = seen
    assert (second.after["step"], second.after["stage_step"]) == (5, 0)
    fresh = tree.named(runs.states.init_params(second.stage.model, 24, 10, 0, one_device()))
    for name in ("params", "teachers/ema"):
        old, new = part(second.before, name), part(second.after, name)
        grid = posembed.resize_grid(jax.numpy.asarray(old.pop("image_tower/pos")), 9)
        np.testing.assert_array_equal(new.pop("image_tower/pos"), grid)
        words, more = old.pop("text_tower/pos"), new.pop("text_tower/pos")
        np.testing.assert_array_equal(more[:8], words)
        # rows that the table did not have: as initialised, for the average as well
        np.testing.assert_array_equal(more[8:], fresh["text_tower/pos"][8:])
        assert len(new) > 40
        np.testing.assert_equal(new, old)
    assert not any(value.any() for value in part(second.after, "opt").values())
    np.testing.assert_array_equal(np.concatenate(positions), np.arange(5 * 8 + 4 * 16))
    rows = [row for row in runs.rows(tmp_path / "run") if row["kind"] == "train"]
    assert [row["samples"] for row in rows] == [8, 16, 24, 32, 40, 56, 72, 88, 104]
    lr = Schedule(**runs.COCA["schedule"])
    wanted = [lr.at(8, 5)(i) for i in range(5)] + [lr.at(16, 4)(i) for i in range(4)]
    assert [row["lr"] for row in rows] == pytest.approx([float(x) for x in wanted])


def one_device():
    return runs.meshes.make(runs.meshes.MeshShape(), jax.devices()[:1])


@pytest.mark.parametrize("carried", [False, True])
def test_optimizer_and_teachers(toy, tmp_path, carried):
    """Equal sizes are carried to the bit; the optimiser starts anew unless asked; a teacher without decay is the
    model as its stage began, an average goes on."""
    teachers = {"ema": {"decay": 0.9}, "start": {}}
    config = runs.changed(runs.TOY, steps=0, stages=AT_ENTRY, teachers=teachers)
    with watched() as seen:
        assert (
            runs.train(
                runs.changed(config, **{"stages.1.carry_optimizer": carried}), tmp_path / "r"
            )
            == 0
        )
    first, second = seen
    np.testing.assert_equal(part(second.after, "params"), part(second.before, "params"))
    np.testing.assert_equal(part(second.after, "teachers/ema"), part(second.before, "teachers/ema"))
    np.testing.assert_equal(part(second.after, "teachers/start"), part(second.before, "params"))
    np.testing.assert_equal(part(second.before, "teachers/start"), part(first.after, "params"))
    assert (part(second.before, "params")["words"] != part(first.after, "params")["words"]).any()
    old, new = part(second.before, "opt"), part(second.after, "opt")
    if carried:
        np.testing.assert_equal(new, old)
        assert any(value.any() for value in new.values())
    else:
        assert not any(value.any() for value in new.values())
    at_end = part(runs.saved(tmp_path / "r"), "rest/teachers/start")
    np.testing.assert_equal(at_end, part(second.after, "teachers/start"))


def test_freezing_and_another_objective(toy, tmp_path):
    rules = [{"match": "colour", "freeze": True}, {"match": ".*"}]
    config = runs.changed(runs.TOY, steps=0, stages=AT_ENTRY)
    config = runs.changed(
        config, **{"stages.1.optim": {"rules": rules}, "stages.1.objective": {"power": 4}}
    )
    with watched() as seen:
        assert runs.train(config, tmp_path / "run") == 0
    end = runs.saved(tmp_path / "run")
    np.testing.assert_array_equal(end["params/colour"], seen[1].after["params/colour"])
    assert (end["params/words"] != seen[1].after["params/words"]).any()
    assert not [name for name in end if name.startswith("rest/opt") and "colour" in name]
    assert [name for name in end if name.startswith("rest/opt") and "words" in name]
    rows = runs.rows(tmp_path / "run")
    assert rows[3]["distance"] == pytest.approx(rows[3]["loss"]) and rows[3]["grad_norm"] > 0


def test_init_from_another_run(clip_run, tmp_path):
    """Fine-tuning: the other run's parameters, resized; a head that it had not is left as initialised."""
    heads = {"probe": {"width_in": 8, "width_out": 3}}
    config = runs.changed(runs.CLIP, **{"model.heads": heads, "data.image_px": 24})
    plain = entered(config, tmp_path / "plain")
    tuned = entered(runs.changed(config, init=str(clip_run)), tmp_path / "tuned")
    source = part(runs.saved(clip_run), "params")
    assert (tuned["step"], tuned["stage_step"]) == (0, 0)
    params = part(tuned, "params")
    grid = posembed.resize_grid(jax.numpy.asarray(source.pop("image_tower/pos")), 9)
    np.testing.assert_array_equal(params.pop("image_tower/pos"), grid)
    fresh = {name for name in params if name not in source}
    assert fresh and all("probe" in name for name in fresh)
    for name, value in params.items():
        expected = plain[f"params/{name}"] if name in fresh else source[name]
        np.testing.assert_array_equal(value, expected, err_msg=name)


def test_init_leaves_its_source_alone(toy, tmp_path):
    """Training gives its arrays away; those that were loaded for it are shared with whoever loads them too."""
    assert runs.train(runs.TOY, tmp_path / "a") == 0
    config = runs.changed(
        runs.TOY, init=str(tmp_path / "a"), teachers={"a": {"path": str(tmp_path / "a")}}
    )
    assert runs.train(config, tmp_path / "b") == 0
    loaded, on_disk = tree.named(load(tmp_path / "a").apply.params), runs.saved(tmp_path / "a")
    np.testing.assert_equal(loaded, part(on_disk, "params"))
    at_end = runs.saved(tmp_path / "b")
    np.testing.assert_equal(part(at_end, "rest/teachers/a"), part(on_disk, "params"))
    assert (at_end["params/words"] != on_disk["params/words"]).any()


REFUSED = {
    "another width": ({"stages.1.model": {"embed": 5}}, "stage 'two': colour: got shape (3, 4)"),
    "optimiser of a frozen model": (
        {"stages.1.carry_optimizer": True,
         "stages.1.optim": {"rules": [{"match": "colour", "freeze": True}, {"match": ".*"}]}},
        "stage 'two': got an optimiser state of other shapes",
    ),
    "no such run": ({"stages.1.init": "/nowhere/run"}, "/nowhere/run/checkpoints: got no checkpoints"),
    "no such teacher": ({"teachers": {"big": {"path": "/nowhere/run"}}}, "/nowhere/run/checkpoints"),
    "two kinds of teacher": (
        {"teachers": {"big": {"path": "/nowhere/run", "decay": 0.9}}},
        "config.teachers.big: got decay and path, expected one of them",
    ),
    "evaluating nobody": ({"eval_params": "emma"}, "expected one of ['student']"),
    "words for stages": ({"stages": "(dict(steps=3),)"}, "config.stages: got '(dict(steps=3),)'"),
    "two of a name": ({"stages.1.name": "one"}, "name 'one' twice"),
}  # fmt: skip


@pytest.mark.parametrize("mistake", REFUSED)
def test_refused_before_the_first_stage(toy, tmp_path, capsys, mistake):
    changes, message = REFUSED[mistake]
    config = runs.changed(runs.changed(runs.TOY, steps=0, stages=AT_ENTRY), **changes)
    with mock.patch.object(loop, "open_session", side_effect=AssertionError("too late")):
        assert runs.train(config, tmp_path / "run") == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_what_is_frozen_must_be_given(clip_run, tmp_path, capsys):
    """LiT from a run of another architecture would be locked to a random register."""
    rules = [{"match": "image_tower/.*", "freeze": True}, {"match": ".*"}]
    changes = {"init": str(clip_run), "init_match": "image_tower/.*", "optim.rules": rules}
    config = runs.changed(runs.CLIP, **changes, **{"model.image_tower.registers": 1})
    with mock.patch.object(loop, "open_session", side_effect=AssertionError("too late")):
        assert runs.train(config, tmp_path / "run") == 2
    assert "got no 'image_tower/registers', expected every" in capsys.readouterr().err


def test_a_broken_evaluation_costs_no_training(toy, tmp_path):
    config = runs.changed(runs.TOY, evals={"retrieval": {"every_steps": 3, "batch": 8}})
    with mock.patch.object(loop, "evaluate", side_effect=ZeroDivisionError):
        with pytest.raises(ZeroDivisionError):
            runs.train(config, tmp_path / "run")
    assert runs.saved(tmp_path / "run")["rest/step"] == 3
