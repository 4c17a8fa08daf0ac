"""Stages: what is transferred to the next one, and what is reset."""

import contextlib
import dataclasses
import types
from unittest import mock

import jax
import numpy as np
import pytest

from helpers import runs
from vlp.core import check, tree
from vlp.data import order
from vlp.infer.load import load
from vlp.ops import posembed
from vlp.optim.schedules import Schedule
from vlp.train import evaluation, loop, stages
from vlp.train.build import abstract_batch

AT_ENTRY = [{"name": "one", "steps": 3}, {"name": "two", "steps": 2}]


@contextlib.contextmanager
def watched():
    """Yields a list, which gets the states before and after the start of each stage, on the host."""
    seen, start_stage = [], loop.start_stage
    named = lambda state: None if state is None else tree.named(jax.tree.map(np.array, state))

    def watch(session, parts, previous, position):
        before = named(previous)
        state = start_stage(session, parts, previous, position)
        seen.append(types.SimpleNamespace(stage=parts.stage, before=before, after=named(state)))
        return state

    with mock.patch.object(loop, "start_stage", watch):
        yield seen


def part(state, name):
    """The arrays of one part of a state: "params", "opt", "teachers/ema" …"""
    return {k.removeprefix(f"{name}/"): v for k, v in state.items() if k.startswith(f"{name}/")}


def entered(config, directory):
    """Returns the state with which a run begins, without training."""
    with watched() as seen, mock.patch.object(loop, "train_stage", side_effect=runs.Killed):
        with pytest.raises(runs.Killed):
            runs.train(config, directory)
    return seen[0].after


@pytest.mark.parametrize(
    "wrong, right",
    [
        ("optim.lr", "schedule.lr"),
        ("optim.learning_rate", "schedule.lr"),
        ("stages.0.optim.lr", "schedule.lr"),
        ("lr", "schedule.lr"),
        ("stages.0.lr", "schedule.lr"),
        ("schedule.weight_decay", "optim.weight_decay"),
        ("data.batch", "batch"),
        ("data.batch_size", "batch"),
        ("schedule.seed", "seed"),
        ("image_px", "data.image_px"),
    ],
)
def test_a_field_of_another_section_is_answered_with_its_place(wrong, right, tmp_path, capsys):
    config = runs.changed(runs.CLIP, stages=[{"name": "one"}], **{wrong: 1})
    assert runs.train(config, tmp_path / "run") == 2
    expected = f"expected config.{right}; write config.{right}"
    error = capsys.readouterr().err
    assert expected in error and error.count("\n") == 1, error
    assert wrong.removeprefix("stages.0.") in error


def test_a_synonym_within_the_section_is_named():
    config = runs.changed(runs.CLIP, **{"schedule.learning_rate": 1})
    with pytest.raises(check.UserError, match="rename it to config.schedule.lr"):
        stages.parse(config)


def test_a_stage_of_other_sizes_resizes_positions_alone(tmp_path, monkeypatch):
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
    stage, mesh = second.stage, one_device()
    batch = abstract_batch(stage, mesh)
    fresh = tree.named(runs.states.init_params(stage.model, stage.objective, batch, 0, mesh))
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
            runs.train(runs.changed(config, **{"stages.1.keep_opt_state": carried}), tmp_path / "r")
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


def test_a_stage_starts_from_another_runs_parameters(clip_run, tmp_path):
    """Fine-tuning: the other run's parameters, resized; a parameter that it did not have starts as initialised."""
    config = runs.changed(runs.CLIP, **{"model.bias": -1.0, "data.image_px": 24})
    plain = entered(config, tmp_path / "plain")
    tuned = entered(runs.changed(config, init=str(clip_run)), tmp_path / "tuned")
    source = part(runs.saved(clip_run), "params")
    assert (tuned["step"], tuned["stage_step"]) == (0, 0)
    params = part(tuned, "params")
    grid = posembed.resize_grid(jax.numpy.asarray(source.pop("image_tower/pos")), 9)
    np.testing.assert_array_equal(params.pop("image_tower/pos"), grid)
    fresh = {name for name in params if name not in source}
    assert fresh == {"temperature/logit_bias"}
    for name, value in params.items():
        expected = plain[f"params/{name}"] if name in fresh else source[name]
        np.testing.assert_array_equal(value, expected, err_msg=name)


def test_init_leaves_its_source_alone(toy, tmp_path):
    """Training donates its arrays; arrays that were loaded are shared with other callers and must survive."""
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


def test_init_acts_where_training_begins(toy, tmp_path):
    """A later stage keeps what the earlier one learned, unless it has an `init` of its own."""
    assert runs.train(runs.TOY, tmp_path / "other") == 0
    source = part(runs.saved(tmp_path / "other"), "params")
    config = runs.changed(runs.TOY, steps=0, stages=AT_ENTRY, init=str(tmp_path / "other"))
    with watched() as seen:
        assert runs.train(config, tmp_path / "run") == 0
    first, second = seen
    np.testing.assert_equal(part(first.after, "params"), source)
    assert (part(second.before, "params")["words"] != source["words"]).any()
    np.testing.assert_equal(part(second.after, "params"), part(second.before, "params"))
    again = {"stages.1.init": str(tmp_path / "other"), "stages.1.init_match": "words"}
    with watched() as seen:
        assert runs.train(runs.changed(config, **again), tmp_path / "again") == 0
    before, after = part(seen[1].before, "params"), part(seen[1].after, "params")
    np.testing.assert_array_equal(after["words"], source["words"])
    np.testing.assert_array_equal(after["colour"], before["colour"])


# What a stage without a word of its own about it has, given the base's: {} the base's own value.
INHERITED = {
    "batch": 4, "model": {"name": "toy", "embed": 3}, "objective": {"name": "toy", "power": 4},
    "data": runs.DATA | {"image_px": 8}, "optim": {"b1": 0.5}, "schedule": {"lr": 0.5},
    "samples": 0, "steps": 7, "micro_batches": 2, "micro_remat": "blocks",
    "streams": {"more": {"data": runs.DATA, "batch": 2}}, "teachers": {"ema": {"decay": 0.5}},
    "evals": {"retrieval": {"batch": 2}}, "eval_params": "ema", "keep_opt_state": True,
}  # fmt: skip
NOT_INHERITED = {"init": "/a/run", "init_match": "colour"}


def test_each_setting_is_inherited_or_acts_once(toy):
    """Every setting of a stage is inherited from the config, or acts once, where training begins."""
    own = {"name", "index", "start_step", "start_samples"}
    fields = {f.name for f in dataclasses.fields(stages.Stage)} - own
    assert fields == INHERITED.keys() | NOT_INHERITED.keys()
    config = runs.TOY | INHERITED | NOT_INHERITED | {"stages": [{"name": "one"}, {"name": "two"}]}
    _, (first, second) = stages.parse(config)
    alone = stages.parse(runs.TOY | INHERITED)[1][0]
    for name in INHERITED:
        at = lambda stage, name=name: str(getattr(stage, name)).replace(
            "start_samples=14", "start_samples=0"
        )
        assert at(first) == at(second) == at(alone), name
    assert (first.init, first.init_match) == ("/a/run", "colour")
    assert (second.init, second.init_match) == ("", ".*")


MIXED = runs.DATA | {
    "mixture": [
        {"name": "a", "weight": 1, "num_records": 13},
        {"name": "b", "weight": 3, "num_records": 7, "split": "val"},
    ],
}  # fmt: skip


def test_a_stage_with_other_weights_reads_on(toy, tmp_path):
    """Each part's records come in its own order over the whole run; counters equal what was read."""
    weights = lambda *w: {"mixture": [p | {"weight": x} for p, x in zip(MIXED["mixture"], w)]}
    config = runs.changed(
        runs.TOY, steps=0, log_every_steps=1, data=MIXED,
        stages=[
            {"name": "one", "steps": 5},
            {"name": "same", "steps": 2, "batch": 16},
            {"name": "more of a", "steps": 4, "data": weights(5, 1)},
            {"name": "a alone", "steps": 3, "data": {"mixture": [], "num_records": 13}},
            {"name": "back", "steps": 3, "data": weights(1, 1)},
            {"name": "as stored", "steps": 2, "data": {"shuffle": False}},
        ],
    )  # fmt: skip
    ids, feed = [], loop.feed

    def watch(parts, *args):
        for batch in feed(parts, *args):
            found = order.join_words(np.asarray(batch["record"]))
            ids.append(found)
            yield batch

    with mock.patch.object(loop, "feed", watch):
        assert runs.train(config, tmp_path / "run") == 0
    rows = [row for row in runs.rows(tmp_path / "run") if row["kind"] == "train"]
    counts = {"a": 0, "b": 0}
    for found, row in zip(ids, rows, strict=True):
        counts["b"] += int((found >= 13).sum())
        counts["a"] += int((found < 13).sum())
        if row["stage"] != "a alone":
            assert {k: row[f"data/samples_{k}"] for k in counts} == counts, row["step"]
    ids = np.concatenate(ids[:-2])  # the last stage has another order
    a, b = ids[ids < 13], ids[ids >= 13] - 13
    np.testing.assert_array_equal(a, order.record_ids(0, len(a), 13, 0))
    np.testing.assert_array_equal(b, order.record_ids(0, len(b), 7, 1))
    one = runs.changed(config, stages=[{"name": "one", "steps": 5}, {"name": "two", "steps": 4}])
    both = runs.changed(one, stages=[{"name": "all", "steps": 9}])
    assert runs.train(one, tmp_path / "halves") == 0 and runs.train(both, tmp_path / "whole") == 0
    counts = lambda name: [r["data/samples_a"] for r in runs.rows(tmp_path / name)]
    assert counts("halves") == counts("whole")


def test_a_stage_of_other_data_begins_with_its_first_epoch(toy, tmp_path):
    config = runs.changed(runs.TOY, steps=0, stages=[
        {"name": "one", "steps": 1},
        {"name": "two", "samples": 16, "data": {"num_records": 16, "split": "val"}},
        {"name": "one again", "steps": 1},
    ])  # fmt: skip
    ids, feed = [], loop.feed

    def watch(*args):
        for batch in feed(*args):
            ids.append(order.join_words(np.asarray(batch["record"])))
            yield batch

    with mock.patch.object(loop, "feed", watch):
        assert runs.train(config, tmp_path / "run") == 0
    assert sorted(np.concatenate(ids[1:3]).tolist()) == list(range(16))
    np.testing.assert_array_equal(np.concatenate([ids[0], ids[3]]), order.record_ids(0, 16, 21, 0))


def test_counters_of_a_second_stream(toy, tmp_path, monkeypatch):
    """They count the stream's own batches, over all stages that have it."""
    stream = {"data": MIXED, "batch": 4}
    config = runs.changed(runs.TOY, steps=0, streams={"more": stream}, stages=[
        {"name": "one", "steps": 3},
        {"name": "two", "steps": 2, "batch": 16, "streams": {"more": {"batch": 12}}},
    ])  # fmt: skip
    counts, seen, feed = {"a": 0, "b": 0}, [], loop.feed

    def watch(*args):
        for batch in feed(*args):
            found = order.join_words(np.asarray(batch["more/record"]))
            counts["a"] += int((found < 13).sum())
            counts["b"] += int((found >= 13).sum())
            seen.append(dict(counts))
            yield batch

    with mock.patch.object(loop, "feed", watch):
        assert runs.train(config, tmp_path / "run") == 0
    rows = runs.rows(tmp_path / "run")
    got = [{k: row[f"data/more.samples_{k}"] for k in counts} for row in rows]
    assert got == seen


REFUSED = {
    "another width": ({"stages.1.model": {"embed": 5}}, "stage 'two': colour: got shape (3, 4)"),
    "optimiser of a frozen model": (
        {"stages.1.keep_opt_state": True,
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
    "moments of other parameters": (
        {"stages.1.init": "/a/run", "stages.1.keep_opt_state": True},
        "config.stages.1.keep_opt_state: got True together with init",
    ),
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
    """With an `init` of another architecture, LiT would lock a random register."""
    rules = [{"match": "image_tower/.*", "freeze": True}, {"match": ".*"}]
    changes = {"init": str(clip_run), "init_match": "image_tower/.*", "optim.rules": rules}
    config = runs.changed(runs.CLIP, **changes, **{"model.image_tower.registers": 1})
    with mock.patch.object(loop, "open_session", side_effect=AssertionError("too late")):
        assert runs.train(config, tmp_path / "run") == 2
    assert "got no 'image_tower/registers', expected every" in capsys.readouterr().err


def test_a_broken_evaluation_costs_no_training(toy, tmp_path):
    config = runs.changed(runs.TOY, evals={"retrieval": {"every_steps": 3, "batch": 8}})
    with mock.patch.object(evaluation, "evaluate", side_effect=ZeroDivisionError):
        with pytest.raises(ZeroDivisionError):
            runs.train(config, tmp_path / "run")
    assert runs.saved(tmp_path / "run")["rest/step"] == 3


OPEN = [{"match": ".*", "decay": 0.0}]
SCALES = {
    "a start above it": (
        {"model.scale": 112.0},
        "stage 'stage0': temperature/logit_scale: got 4.718 (its exponential is 112)",
    ),
    "a stage without a clamp before it": (
        {"steps": 0, "stages": [AT_ENTRY[0] | {"optim": {"rules": OPEN}}, AT_ENTRY[1]]},
        "stage 'two': temperature/logit_scale: got -inf … inf from the stage before",
    ),
}  # fmt: skip


@pytest.mark.parametrize("mistake", SCALES)
def test_a_scale_that_its_clamp_would_move_at_once(tmp_path, capsys, mistake):
    changes, message = SCALES[mistake]
    with mock.patch.object(loop, "open_session", side_effect=AssertionError("too late")):
        assert runs.train(runs.changed(runs.CLIP, **changes), tmp_path / "run") == 2
    err = capsys.readouterr().err
    assert message in err and "[0, 4.605]" in err


def test_a_given_scale_outside_of_the_clamp(clip_run, tmp_path, capsys):
    """SigLIP's published models end at 112, which the default rules would clamp to 100."""
    at_112 = {"temperature/logit_scale": np.float32(np.log(112.0))}
    config = runs.changed(runs.CLIP, init=str(clip_run))
    with mock.patch("vlp.train.start.initial", lambda stage: at_112):
        with mock.patch.object(loop, "open_session", side_effect=AssertionError("too late")):
            assert runs.train(config, tmp_path / "run") == 2
    assert "(its exponential is 112) from stage 'stage0': init from" in capsys.readouterr().err
