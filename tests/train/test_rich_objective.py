"""An objective with method state, three kinds of teacher and a second stream of batches."""

import dataclasses
from typing import ClassVar
from unittest import mock

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from helpers import runs
from vlp.core import mesh as meshes
from vlp.core.types import Out, Term
from vlp.data import order
from vlp.models import MODELS
from vlp.objectives import OBJECTIVES
from vlp.train import loop


class Deep(nn.Module):
    """Another architecture that answers `image`."""

    hidden: int = 3

    def setup(self):
        self.layers = nn.Dense(self.hidden), nn.Dense(4)

    def image(self, image, *, keep_ratio=1.0, keys=None):
        first, second = self.layers
        return {"embed": second(nn.relu(first(image.astype(jnp.float32).mean(axis=(1, 2)) / 255)))}

    def text(self, text, *, keys=None):
        return {"embed": jnp.zeros((text.shape[0], 4))}


@dataclasses.dataclass(frozen=True)
class Rich:
    """Distances to three teachers, to a queue of past embeddings, and to the images of a second stream."""

    reads: ClassVar = frozenset({"image", "text", "more/image"})

    def init_method_state(self, key, model):
        return {"queue": jax.random.normal(key, (6, 4)), "turns": jnp.int32(0)}

    def __call__(self, ctx):
        image = ctx.batch["image"]
        zi_BE = ctx.map(lambda part: part.student("image", part.batch["image"])["embed"])
        zt_BE = ctx.student("text", ctx.batch["text"])["embed"]
        more_BE = ctx.stream("more").student("image", ctx.batch["more/image"])["embed"]
        near = lambda a, b: Term(jnp.square(a - b).sum(), a.shape[0])
        theirs = {name: ctx.teacher(name).student("image", image)["embed"] for name in ctx.frozen}
        terms = {name: near(zi_BE, z_BE) for name, z_BE in theirs.items()}
        terms["queue"] = near(
            zt_BE, jnp.broadcast_to(ctx.method_state["queue"].mean(0), zt_BE.shape)
        )
        terms["more"] = Term(jnp.square(more_BE).sum(), more_BE.shape[0])
        queue = jnp.concatenate([ctx.method_state["queue"][2:], zi_BE[:2]])
        turns = ctx.method_state["turns"] + 1
        return Out(terms, {"queue": queue, "turns": turns}, {"turns": Term(turns, 1)})


@pytest.fixture
def config(toy, monkeypatch, tmp_path):
    monkeypatch.setitem(MODELS, "deep", Deep)
    monkeypatch.setitem(OBJECTIVES, "rich", Rich)
    other = runs.changed(runs.TOY, model={"name": "deep"}, steps=2)
    assert runs.train(other, tmp_path / "other") == 0
    teachers = {"ema": {"decay": 0.9}, "start": {}, "other": {"path": str(tmp_path / "other")}}
    more = {"data": runs.DATA | {"split": "val", "num_records": 13}, "batch": 16}
    stages = [
        {"name": "one", "steps": 5, "micro_batches": 2},
        {"name": "two", "steps": 4, "batch": 16, "streams": {"more": {"batch": 4}}},
    ]
    return runs.changed(
        runs.TOY, steps=0, objective={"name": "rich"}, teachers=teachers, streams={"more": more},
        stages=stages,
    )  # fmt: skip


def test_an_objective_with_teachers_queue_and_streams_resumes(config, tmp_path):
    seen, feed = {"": [], "more/": []}, loop.feed

    def watch(*args):
        for batch in feed(*args):
            for name, indices in seen.items():
                indices.append(order.join_words(np.asarray(batch[f"{name}index"])))
            yield batch

    with mock.patch.object(loop, "feed", watch):
        assert runs.train(config, tmp_path / "whole") == 0
    np.testing.assert_array_equal(np.concatenate(seen[""]), np.arange(5 * 8 + 4 * 16))
    np.testing.assert_array_equal(np.concatenate(seen["more/"]), np.arange(5 * 16 + 4 * 4))

    rows = runs.rows(tmp_path / "whole")
    assert [row["turns"] for row in rows] == list(range(1, 10))
    assert {"ema", "start", "other", "queue", "more"} < rows[0].keys()
    assert rows[0]["ema"] < 1e-12 and rows[0]["start"] < 1e-12 < rows[0]["other"]
    assert 1e-12 < rows[4]["ema"] < rows[4]["start"]
    assert rows[5]["start"] < 1e-12 < rows[5]["ema"]
    end = runs.saved(tmp_path / "whole")
    other = runs.saved(tmp_path / "other")
    names = [name for name in other if name.startswith("params/")]
    assert len(names) == 4
    for name in names:
        np.testing.assert_array_equal(end[f"rest/teachers/other/{name[7:]}"], other[name])

    for number in (
        2,
        3,
        2,
    ):  # each start dies at a save further on: before steps 4, 6 (stage 2) and 8
        dying = mock.Mock(side_effect=dies_at(number, loop.save))
        with mock.patch.object(loop, "save", dying), pytest.raises(runs.Killed):
            runs.train(config, tmp_path / "run")
    assert runs.train(config, tmp_path / "run") == 0
    runs.assert_same_run(tmp_path / "run", tmp_path / "whole")


def dies_at(number, function):
    calls = iter(range(1, 100))

    def call(*args):
        if next(calls) == number:
            raise runs.Killed
        return function(*args)

    return call


def test_an_objective_with_teachers_queue_and_streams_fits_any_mesh(config, tmp_path):
    """The numbers are the same on another mesh."""
    config = runs.changed(config, **{"streams.more.batch": 16, "stages.1.streams.more.batch": 8})
    config = runs.changed(config, **{"stages.0.micro_batches": 1})
    assert runs.train(config, tmp_path / "one") == 0
    mesh = dict(zip(meshes.AXES, (2, 2, 2)))
    assert runs.train(runs.changed(config, mesh=mesh), tmp_path / "eight", devices=8) == 0
    for row, wanted in zip(runs.rows(tmp_path / "eight"), runs.rows(tmp_path / "one"), strict=True):
        for name, value in wanted.items():
            same = value if isinstance(value, str) else pytest.approx(value, rel=1e-4, abs=1e-12)
            assert row[name] == same, name


def test_a_stream_that_is_not_there(config, tmp_path, capsys):
    config = runs.changed(config, streams={})
    for stage in config["stages"]:
        stage.pop("streams", None)
    with mock.patch.object(loop, "open_session", side_effect=AssertionError("too late")):
        assert runs.train(config, tmp_path / "run") == 2
    assert "config.objective: got no batch leaf ['more/image']" in capsys.readouterr().err
