"""What a method keeps: large arrays in shards, and prototypes that are made anew between steps by the host."""

import dataclasses
from typing import Any, ClassVar
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from helpers import runs
from vlp.core import mesh as meshes
from vlp.core.check import UserError
from vlp.core.types import Out, Term
from vlp.objectives import OBJECTIVES
from vlp.ops import masking
from vlp.train import build, loop, refresh
from vlp.train.stages import parse

EVERY = 20  # samples; a batch has 8, so multiples fall on a boundary at 40 and within steps else


def k_means(x, centres, turns=3):
    """Lloyd's algorithm; an empty cluster keeps its centre."""
    for _ in range(turns):
        nearest = ((x[:, None] - centres[None]) ** 2).sum(-1).argmin(1)
        means = [
            x[nearest == k].mean(0) if (nearest == k).any() else centres[k]
            for k in range(len(centres))
        ]
        centres = np.stack(means)
    return centres.astype(np.float32)


@dataclasses.dataclass(frozen=True)
class Prototypes:
    """Distance of each image to the nearest of its cluster centres, and of texts to a queue of images."""

    reads: ClassVar = frozenset({"image", "text"})
    refresh_every: int = EVERY
    num: int = 3

    def init_method_state(self, key, model):
        queue = meshes.logical(jax.random.normal, "batch", None)
        return {
            "centres": jnp.zeros((self.num, model.embed)), "times": jnp.int32(0), "seen": jnp.int32(0),
            "queue": queue(key, (16, model.embed)),
        }  # fmt: skip

    def embeds(self, ctx) -> Any:
        return ctx.student("image", ctx.batch["image"])["embed"]

    def refresh(self, state, embed):
        x = embed(self.embeds, 21)
        assert x.shape[0] == 21 and isinstance(state["queue"], np.ndarray)
        start = x[embed.rng().choice(21, self.num, replace=False)]
        centres = k_means(x, start)
        return state | {
            "centres": centres,
            "times": state["times"] + 1,
            "seen": np.int32(embed.samples),
        }

    def __call__(self, ctx):
        zi_BE = ctx.map(self.embeds)
        zt_BE = ctx.student("text", ctx.batch["text"])["embed"]
        state = ctx.method_state
        square = ((zi_BE[:, None] - state["centres"][None]) ** 2).sum(-1).min(1)
        far = ((zt_BE - state["queue"].mean(0, keepdims=True)) ** 2).sum(-1)
        queue = jnp.concatenate([state["queue"][8:], jax.lax.stop_gradient(zi_BE)])
        metrics = {name: Term(state[name], 1) for name in ("times", "seen")}
        terms = {"near": Term.mean_of(square), "far": Term.mean_of(far)}
        return Out(terms, state | {"queue": queue}, metrics)


@pytest.fixture
def config(toy, monkeypatch):
    monkeypatch.setitem(OBJECTIVES, "prototypes", Prototypes)
    stages = [{"name": "one", "steps": 6}, {"name": "two", "steps": 3}]
    return runs.changed(
        runs.TOY, steps=0, save_every_steps=1, objective={"name": "prototypes"}, stages=stages
    )


def test_it_runs_at_the_start_of_a_stage_and_at_multiples_of_the_samples(config, tmp_path):
    assert runs.train(config, tmp_path / "run") == 0
    rows = runs.rows(tmp_path / "run")
    # before steps 1; 4 (24 samples: past 20), 6 (40); the stage's start (48); 9 (64: past 60)
    assert [row["seen"] for row in rows] == [0, 0, 0, 24, 24, 40, 48, 48, 64]
    assert [row["times"] for row in rows] == [1, 1, 1, 2, 2, 3, 4, 4, 5]


@pytest.mark.parametrize("deaths", [(3, 2), (6, 1)])
def test_a_restart_at_any_step_gives_the_same_numbers(config, tmp_path, deaths):
    """Starts after 3, 5, 6 and 7 steps; a refresh is due after 3, 5 and 6."""
    assert runs.train(config, tmp_path / "whole") == 0
    for number in deaths:
        calls = iter(range(1, 100))

        def save(*args, number=number, calls=calls, original=loop.save):
            if next(calls) > number:
                raise runs.Killed
            return original(*args)

        with mock.patch.object(loop, "save", save), pytest.raises(runs.Killed):
            runs.train(config, tmp_path / "run")
    assert runs.train(config, tmp_path / "run") == 0
    runs.assert_same_run(tmp_path / "run", tmp_path / "whole")


def test_another_mesh_continues(config, tmp_path):
    """A checkpoint of one device, with its queue, continues on eight, and back."""
    assert runs.train(config, tmp_path / "one") == 0
    last = loop.save

    def dies_after(number):
        calls = iter(range(1, 100))

        def save(*args):
            if next(calls) > number:
                raise runs.Killed
            return last(*args)

        return mock.patch.object(loop, "save", save)

    mesh = dict(zip(meshes.AXES, (2, 2, 2)))
    with dies_after(4), pytest.raises(runs.Killed):
        runs.train(config, tmp_path / "run")
    with dies_after(2), pytest.raises(runs.Killed):
        runs.train(runs.changed(config, mesh=mesh), tmp_path / "run", devices=8)
    assert runs.train(config, tmp_path / "run") == 0
    for row, wanted in zip(runs.rows(tmp_path / "run"), runs.rows(tmp_path / "one"), strict=True):
        for name in ("near", "far", "seen", "times"):
            assert row[name] == pytest.approx(wanted[name], rel=1e-5), name
    queues = [runs.saved(tmp_path / name)["rest/method_state/queue"] for name in ("run", "one")]
    np.testing.assert_allclose(*queues, rtol=1e-5)


def test_a_named_array_is_divided_by_rule_and_others_are_whole(config, monkeypatch):
    @dataclasses.dataclass(frozen=True)
    class Large(Prototypes):
        def init_method_state(self, key, model):
            queue = meshes.logical(jax.random.normal, "batch", "joint")
            return {"queue": queue(key, (65_536, 256)), "count": jnp.int32(0)}

        def __call__(self, ctx):
            near = Term.mean_of(ctx.map(self.embeds))
            return Out({"near": near}, ctx.method_state)

    monkeypatch.setitem(OBJECTIVES, "prototypes", Large)
    mesh = meshes.make(meshes.MeshShape(2, 2, 2))
    settings, stages = parse(config)
    with jax.set_mesh(mesh):
        state = build.assemble(stages[0], settings, mesh).abstract.method_state
    queue = state["queue"]
    assert queue.sharding.shard_shape(queue.shape) == (65_536 // 4, 128)
    assert state["count"].sharding.is_fully_replicated


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"refresh_every": 0}, "objective Wrong: got refresh_every 0 and a method refresh"),
        ({"refresh": None}, "objective Wrong: got refresh_every 20 and no method refresh"),
    ],
)
def test_half_a_hook_is_refused(changes, message):
    class Wrong:
        refresh_every = EVERY

        def refresh(self, state, embed):
            return state

    for name, value in changes.items():
        setattr(Wrong, name, value)
    with pytest.raises(UserError, match=message):
        build.check_refresh(Wrong())


def test_arrays_of_other_shapes_are_refused(config, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(
        Prototypes, "refresh", lambda self, state, embed: state | {"centres": np.zeros((4, 4))}
    )
    assert runs.train(config, tmp_path / "run") == 2
    expected = "refresh: method_state['centres']: got float64[4, 4], expected float32[3, 4]"
    assert expected in capsys.readouterr().err


def test_when_it_is_due(config):
    stage = dataclasses.replace(parse(config)[1][0], start_samples=16)
    assert [n for n in range(9) if refresh.due(stage, n)] == [0, 1, 3, 6, 8]
    assert not refresh.due(dataclasses.replace(stage, objective=None), 0)


@dataclasses.dataclass(frozen=True)
class Masked:
    """Masked words: the objective takes ids from the tokenizer."""

    reads: ClassVar = frozenset({"image", "text"})
    mask_id: int | None = None
    vocab_size: int | None = None

    def __call__(self, ctx):
        masked, where = masking.mask_words(
            ctx.batch["text"], ctx.keys("words"), mask_id=self.mask_id, vocab_size=self.vocab_size
        )
        image = ctx.student("image", ctx.batch["image"])["embed"]
        text = ctx.student("text", masked)["embed"]
        return Out(
            {"near": Term.mean_of((image - text) ** 2), "masked": Term(where.sum() * 1.0, 1)}
        )


def test_an_objective_gets_the_mask_of_the_tokenizer(toy, monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(OBJECTIVES, "masked", Masked)
    vocab = {"model.text_tower.vocab": 129}
    config = runs.changed(runs.CLIP, objective={"name": "masked"}, steps=1, **vocab)
    settings, (stage,) = parse(config)
    mesh = meshes.make(meshes.MeshShape(1), jax.devices()[:1])
    with jax.set_mesh(mesh):
        plan = build.prepare(stage, settings, mesh)
        tokenizer = plan.main.tokenizer
        assert plan.stage.objective == Masked(tokenizer.mask_id, tokenizer.vocab_size)
        needed = tokenizer.num_ids
        assert needed == tokenizer.vocab_size + 1  # this one has no mask of its own
        few = runs.changed(config, **{"model.text_tower.vocab": needed - 1})
        expected = (
            f"text_tower.vocab: got {needed - 1}, expected with the mask's id {needed} or more"
        )
        with pytest.raises(UserError, match=expected):
            build.prepare(parse(few)[1][0], settings, mesh)
        enough = runs.changed(few, objective={"name": "clip"})
        build.prepare(parse(enough)[1][0], settings, mesh)
        other = runs.changed(config, objective={"name": "masked", "mask_id": 7})
        with pytest.raises(UserError, match="config.objective.mask_id: got 7, expected"):
            build.prepare(parse(other)[1][0], settings, mesh)


@pytest.mark.parametrize(
    "decay", [1.0, -0.1, (), ((0.5, 0.9), (0.2, 1.0)), ((0.0, 0.9), (1.0, 1.1))]
)
def test_decays_that_are_none(decay):
    config = runs.changed(runs.CLIP, teachers={"ema": {"decay": decay}})
    with pytest.raises(UserError, match="config.teachers.ema.decay: got .*, expected in "):
        parse(config)


def test_a_decay_that_follows_the_stage(toy, tmp_path):
    """It reaches the checkpoint: 1 at the end keeps the average of the step before."""
    ends = {}
    for name, decay in (("points", ((0.0, 0.0), (0.7, 0.0), (0.75, 1.0))), ("none", 0.0)):
        config = runs.changed(runs.TOY, teachers={"ema": {"decay": decay}}, save_every_steps=1)
        assert runs.train(config, tmp_path / name) == 0
        ends[name] = runs.saved(tmp_path / name)
    before = runs.saved(tmp_path / "none", 3)
    for name in ("colour", "words"):
        kept = f"rest/teachers/ema/{name}"
        np.testing.assert_array_equal(ends["none"][kept], ends["none"][f"params/{name}"])
        np.testing.assert_array_equal(ends["points"][kept], before[kept])
