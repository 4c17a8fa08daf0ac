"""Batch norm's running statistics and a router's loss in training steps: meshes, micro-batches, teachers, resume."""

import dataclasses
import functools
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from helpers import runs
from vlp.core import tree
from vlp.core.types import Apply, Ctx, Out, Term
from vlp.models import TOWERS
from vlp.models.convnext import ConvNeXt
from vlp.models.convs import pixels
from vlp.models.layers import AuxiliaryLoss, Linear, rematerialised
from vlp.models.resnet import ResNet
from vlp.models.text import Text
from vlp.models.two_tower import TwoTower
from vlp.ops import statistics
from vlp.optim import make as optimisers

TEXT = Text(vocab=24, pool="eos", width=8, depth=1, heads=2, mlp=16)
RESNET = TwoTower(ResNet(depths=(2,), width=4, heads=2, momentum=0.75), TEXT, embed=8)
SHAPES = [(8, 1, 1), (2, 2, 2)]


@dataclasses.dataclass(frozen=True)
class Pairs:
    """Cosine of each pair, one minus: no batch in the loss, so that only the batch norm couples the rows.

    looks: the EMA teacher looks at the image turned around first, and a pass of the student without gradient does too.
    """

    reads: ClassVar[frozenset[str]] = frozenset({"image", "text"})
    looks: bool = False

    def __call__(self, ctx: Ctx) -> Out:
        return Out({"pairs": Term.mean_of(1 - ctx.map(self.cosine))})

    def cosine(self, ctx: Ctx) -> Any:
        image = ctx.batch["image"]
        if self.looks:
            ctx.teacher("ema").student("image", 255 - image)
            jax.lax.stop_gradient(ctx.student("image", 255 - image)["embed"])
        zi_BE = ctx.student("image", image)["embed"]
        return (zi_BE * ctx.student("text", ctx.batch["text"])["embed"]).sum(-1)


def slots(params):
    return {k: v for k, v in tree.named(params).items() if statistics.is_slot(k)}


def first_conv(params, image):
    """What the first batch norm of the ResNet sees."""
    tower = params["image_tower"]
    args = (2, 2), [(1, 1)] * 2
    x = pixels(jnp.asarray(image), (0.5,) * 3, (0.5,) * 3)
    names = {"dimension_numbers": ("NHWC", "HWIO", "NHWC")}
    return np.asarray(jax.lax.conv_general_dilated(x, tower["stem0"]["kernel"], *args, **names))


@pytest.fixture(scope="module")
def case(training, random_params):
    return training(model=RESNET, objective=Pairs(), params=random_params(RESNET, 16, 8), lr=1e-2)


@pytest.fixture(scope="module")
def two_steps(case, make_batch):
    """States and metrics of two steps on a mesh in so many micro-batches."""
    batches = [make_batch(), make_batch(start=8)]
    return functools.cache(lambda shape, num_micro: case.steps(batches, shape, num_micro))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_meshes_change_nothing(shape, two_steps, case, make_batch, error):
    """Not the gradients (of a step's parameters, Adam makes more of rounding), nor two steps' statistics and losses."""
    grads, want_grads = (case.value(make_batch(), s, grads=True)[1] for s in (shape, (1, 1, 1)))
    assert error(grads, want_grads) < 1e-5
    (_, *ours), our_metrics = two_steps(shape, 1)
    (_, *want), metrics = two_steps((1, 1, 1), 1)
    for a, b, m, n in zip(ours, want, our_metrics, metrics):
        assert error(slots(a.params), slots(b.params)) < 1e-4
        np.testing.assert_allclose(m["loss"], n["loss"], rtol=1e-4)


def test_convolutions_without_statistics_are_sharded_alike(
    training, random_params, make_batch, error
):
    tower = ConvNeXt(depths=(1, 1), widths=(8, 16), drop_path=0.2)
    model = TwoTower(tower, TEXT, embed=8)
    case = training(model=model, objective=Pairs(), params=random_params(model, 16, 8))
    loss, grads = case.value(make_batch(), (2, 2, 2), grads=True)
    want, want_grads = case.value(make_batch(), num_micro=2, grads=True)
    np.testing.assert_allclose(loss, want, rtol=1e-5)
    assert error(grads, want_grads) < 1e-5


@pytest.mark.parametrize("num_micro", [1, 2, 4])
def test_the_running_mean_is_the_mean_over_the_batch(num_micro, two_steps, case, make_batch):
    """For any number of micro-batches: momentum · old + (1 − momentum) · the whole batch's mean."""
    states, _ = two_steps((1, 1, 1), num_micro)
    name = "image_tower/stem0_norm/stat_mean"
    want = tree.named(states[0].params)[name]
    for state, start in zip(states[:-1], (0, 8)):
        seen = first_conv(state.params, make_batch(start=start)["image"])
        want = 0.75 * want + 0.25 * seen.mean((0, 1, 2))
    np.testing.assert_allclose(tree.named(states[-1].params)[name], want, rtol=1e-4, atol=1e-5)
    share = {k: v for k, v in slots(states[-1].params).items() if k.endswith("share")}
    assert share and all((np.asarray(v) == 1).all() for v in share.values())


def test_statistics_have_no_optimiser_memory_and_no_part_in_norms(two_steps, case):
    states, metrics = two_steps((1, 1, 1), 1)
    names = tree.named(states[0].opt)
    assert names and not any(map(statistics.is_slot, names))
    updater = optimisers.make(case.optim, case.params)
    assert {k for k, v in tree.named(updater.statistics).items() if v} == set(slots(case.params))
    weights = {k: v for k, v in tree.named(states[1].params).items() if not statistics.is_slot(k)}
    np.testing.assert_allclose(metrics[0]["param_norm"], tree.norm(weights), rtol=1e-5)
    trained = {k: v for k, v in tree.named(updater.trainable).items() if v}
    assert set(trained) == set(weights)
    rows = optimisers.table(case.optim.rules, case.params).splitlines()
    assert "running statistics, not trained" in rows[-1]


def test_teachers_and_passes_without_gradient_write_nothing(case, make_batch, two_steps):
    """The student's statistics are those of its own pass alone; the EMA teacher's follow at its decay."""
    teachers = {"ema": (RESNET, 0.5, case.params)}
    looking = dataclasses.replace(case, objective=Pairs(looks=True), teachers=teachers, programs={})
    states, _ = looking.steps([make_batch()])
    want = slots(two_steps((1, 1, 1), 1)[0][1].params)
    for name, x in slots(states[1].params).items():
        np.testing.assert_allclose(x, want[name], rtol=1e-5, atol=1e-6, err_msg=name)
    for name, x in slots(states[1].teachers["ema"]).items():
        old, new = tree.named(case.params)[name], want[name]
        between = (np.asarray(x) - old) * (new - np.asarray(x))
        assert (between >= -1e-6).all(), name  # on the way from the old one to the student's


def test_a_frozen_tower_keeps_its_statistics(case, make_batch):
    rules = (optimisers.Rule("image_tower/.*", freeze=True), *optimisers.DEFAULT_RULES)
    frozen = dataclasses.replace(case, optim=optimisers.Optim(rules=rules), programs={})
    states, _ = frozen.steps([make_batch()])
    for name, x in slots(states[1].params).items():
        np.testing.assert_array_equal(x, slots(case.params)[name], err_msg=name)


def test_a_run_that_dies_ends_as_one_that_lives(tmp_path):
    """Bit-equal, and its evaluation reads the running statistics."""
    tower = {"name": "resnet", "depths": (1, 1), "width": 4, "heads": 2}
    config = runs.changed(runs.CLIP, **{"model.image_tower": tower, "steps": 4})
    with runs.mock.patch.object(runs.loop, "save", side_effect=_die_after_first(runs.loop.save)):
        with pytest.raises(runs.Killed):
            runs.train(config, tmp_path / "dead")
    assert runs.train(config, tmp_path / "dead") == 0
    assert runs.train(config, tmp_path / "whole") == 0
    runs.assert_same_run(tmp_path / "dead", tmp_path / "whole")
    moved = {k: v for k, v in runs.saved(tmp_path / "whole").items() if k.endswith("stat_var")}
    assert moved and all((v != 1).all() for v in moved.values())


def _die_after_first(save):
    def saving(*args, **kwargs):
        save(*args, **kwargs)
        raise runs.Killed

    return saving


class Gate(nn.Module):
    """Routes tokens to 4 experts, which do nothing; Switch Transformer's balance (Fedus et al. 2021, eq. 4)."""

    @nn.compact
    def __call__(self, x: Any, _: None, train: bool) -> Any:
        logits_BNX = Linear((x.shape[-1],), (4,), ("embed", "mlp"), name="gate")(x)
        probs_BNX = nn.softmax(logits_BNX)
        chosen_BNX = jax.nn.one_hot(probs_BNX.argmax(-1), 4)
        balance = 4 * (chosen_BNX.mean((0, 1)) * probs_BNX.mean((0, 1))).sum()
        x = x + probs_BNX.max(-1, keepdims=True) * x
        return AuxiliaryLoss(0.5, name="balance")(x, balance, train=train), None


class Routed(nn.Module):
    """Pixels' means through two gates under one scan."""

    kind: ClassVar[str] = "image"
    remat: str = "none"

    @nn.compact
    def __call__(self, image, *, keep_ratio=1.0, keys=None, kept=None, layers=False):
        x = pixels(image, (0.5,) * 3, (0.5,) * 3).reshape(image.shape[0], -1, 4 * 3)
        x = Linear((12,), (8,), ("pixels", "embed"), name="embed")(x)
        gates = nn.scan(
            rematerialised(Gate, self.remat, prevent_cse=False, static_argnums=(3,)),
            variable_axes={"params": 0}, split_rngs={"params": True}, in_axes=(0, nn.broadcast), length=2,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )  # fmt: skip
        x, _ = gates(name="blocks")(x, None, keys is not None)
        return {"tokens": x, "pooled": x.mean(1), "kept": None}


ROUTED = TwoTower(Routed(), TEXT, embed=8)
METRIC = "image_tower/blocks/balance"


def balances(params, image):
    """The two layers' losses of one call, plainly."""
    p = params["image_tower"]
    x = pixels(image, (0.5,) * 3, (0.5,) * 3).reshape(image.shape[0], -1, 12)
    x, out = x @ p["embed"]["kernel"] + p["embed"]["bias"][None, None], []
    for n in range(2):
        gate = jax.tree.map(lambda a, n=n: a[n], p["blocks"]["gate"])
        probs = nn.softmax(x @ gate["kernel"] + gate["bias"][None, None])
        chosen = jax.nn.one_hot(probs.argmax(-1), 4)
        out.append(4 * (chosen.mean((0, 1)) * probs.mean((0, 1))).sum())
        x = x + probs.max(-1, keepdims=True) * x
    return jnp.stack(out)


@pytest.mark.parametrize("remat, num_micro", [("none", 1), ("full", 4)])
def test_a_routers_loss_is_trained_and_logged(
    remat, num_micro, training, random_params, make_batch, error
):
    """Gradients are those of loss + 0.5 · the layers' losses, averaged over micro-batches (rows j::k)."""
    model, batch = ROUTED.clone(image_tower=Routed(remat)), make_batch()
    params = jax.tree.map(jnp.asarray, random_params(model, 16, 8))
    case = training(
        model=model, objective=Pairs(), params=params, optim=optimisers.Optim(clip_norm=None)
    )

    placed = jax.tree.map(jnp.asarray, batch)
    alone = jax.jit(lambda params: Pairs()(Ctx(Apply(model, params), placed)).loss())

    def plain(params):
        loss = alone(params)
        parts = [
            balances(params, jnp.asarray(batch["image"][j::num_micro])) for j in range(num_micro)
        ]
        return loss + 0.5 * jnp.stack(parts).mean(0).sum(), jnp.stack(parts)

    want, parts = jax.jit(jax.grad(plain, has_aux=True))(params)
    _, grads = case.value(batch, num_micro=num_micro, grads=True)
    weights = lambda t: {k: v for k, v in tree.named(t).items() if not statistics.is_slot(k)}
    assert error(weights(grads), weights(want)) < 1e-5
    states, metrics = case.steps([batch], num_micro=num_micro)
    np.testing.assert_allclose(metrics[0][METRIC], np.mean(parts), rtol=1e-5)
    value = tree.named(states[1].params)[f"{METRIC}/stat_value"]
    np.testing.assert_allclose(value, np.mean(parts, axis=0), rtol=1e-5)
    np.testing.assert_allclose(metrics[0]["loss"], alone(params), rtol=1e-5)


def test_a_gate_learns_balance(training, random_params, make_batch):
    """A gate that sends all tokens to one expert: training spreads them."""
    params = random_params(ROUTED, 16, 8)
    params["image_tower"]["blocks"]["gate"]["bias"] += np.float32([[2, 0, 0, 0]] * 2)
    case = training(model=ROUTED, objective=Pairs(), params=params, lr=0.1)
    _, metrics = case.steps([make_batch()] * 12)
    assert metrics[0][METRIC] > 1.5 and metrics[-1][METRIC] < 1.2


def test_a_tower_from_outside_by_name(tmp_path, monkeypatch):
    """`image_tower.name` finds it, and a run logs its loss."""
    monkeypatch.setitem(TOWERS, "routed", Routed)
    config = runs.changed(runs.CLIP, **{"model.image_tower": {"name": "routed"}, "steps": 2})
    assert runs.train(config, tmp_path / "run") == 0
    assert all(row[METRIC] > 0 for row in runs.rows(tmp_path / "run") if row["kind"] == "train")
