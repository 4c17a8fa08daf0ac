"""ALBEF: values worked by hand, exactness over four micro-batches, queues, and that it learns."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from helpers import runs
from helpers.everything import shapes
from vlp.core import config as configs
from vlp.core.types import Apply, Ctx
from vlp.models.text import Text
from vlp.models.two_tower import TwoTower
from vlp.models.vit import ViT
from vlp.objectives import sampling
from vlp.objectives.albef import Albef
from vlp.objectives.clip import Clip
from vlp.train import stages
from vlp.train import state as states

TOWER = dict(width=16, depth=1, heads=2, mlp=32)
OBJECTIVE = Albef(mask_id=24, vocab_size=24, alpha=0.4, queue=12, mask_ratio=0.4, fusion_depth=1)
MODEL = stages.with_heads(
    TwoTower(
        ViT(patch=4, pool="cls", **TOWER),
        Text(vocab=25, pool="first", causal=False, dropout=0.1, **TOWER),
        embed=8,
    ),
    OBJECTIVE,
)
NETS = {"ema": (None, None)}


@pytest.fixture(scope="module")
def case(training, make_batch):
    batch = shapes(make_batch())
    boxed = states.abstract_params(MODEL, OBJECTIVE, batch, NETS)
    rng = np.random.default_rng(0)
    draw = lambda x: np.float32(0.25 * rng.normal(size=x.shape)) if x.ndim else np.float32(1.0)
    params, ema = (jax.tree.map(draw, nn.unbox(boxed)) for _ in range(2))
    found = training(
        model=MODEL, objective=OBJECTIVE, params=params, teachers={"ema": (MODEL, 0.9, ema)},
        lr=3e-3, layout=boxed,
    )  # fmt: skip
    return found


@pytest.fixture(scope="module")
def reference(case, make_batch):
    return case.value(make_batch(), grads=True)


@pytest.mark.parametrize("alpha, want", [(0.0, 0.479525), (0.4, 0.722227)])
def test_one_direction_of_the_contrast(alpha, want):
    """Logits [[2, 0, 1], [0, 1, 0]], the teacher's [[1, 0, 0], [0, 1, 1]]; the third column is the queue's."""
    logits, theirs = jnp.float32([[2, 0, 1], [0, 1, 0]]), jnp.float32([[1, 0, 0], [0, 1, 1]])
    keys = jnp.eye(3)
    loss = OBJECTIVE.contrast(
        "image", "text", {"image": logits}, {"image": theirs, "text": keys[:2]}, {"text": keys[2:]},
        jnp.float32(1), alpha,
    )  # fmt: skip
    np.testing.assert_allclose(loss["nll"].mean(), want, atol=2e-6)


def test_weights_of_the_negatives():
    weights = sampling.weights(jnp.float32([[1, 2, 0.5], [0, 0, 0], [0, 0, 0]]))
    np.testing.assert_allclose(weights[0], [0, 0.817574, 0.182426], atol=1e-6)


def test_negatives_are_drawn_by_their_weights_and_never_the_own():
    logits = jnp.float32([[1, 2, 0.5], [3, 0, 0], [0, 0, 0]])
    keys = jax.vmap(lambda i: jax.random.split(jax.random.key(i), 3))(jnp.arange(4000))
    drawn = np.asarray(jax.jit(jax.vmap(lambda k: sampling.negatives(k, logits)))(keys))
    assert (drawn != np.arange(3)).all()
    share = np.stack([np.bincount(drawn[:, i], minlength=3) for i in range(3)]) / len(drawn)
    np.testing.assert_allclose(share, sampling.weights(logits), atol=0.03)


def test_without_queue_and_soft_targets_it_contrasts_as_clip_does(case, make_batch):
    """A moving average of decay 0 is the trained model; without keys there is no dropout."""
    params = jax.tree.map(jnp.asarray, case.params)
    plain = dataclasses.replace(OBJECTIVE, alpha=0.0, queue=0)
    state = nn.unbox(states.method_state(plain, MODEL, 0))
    ema = {"ema": Apply(MODEL, params)}

    def both(batch):
        ours = plain(Ctx(Apply(MODEL, params), batch, method_state=state, frozen=ema))
        theirs = Clip()(Ctx(Apply(MODEL, params), batch))
        return ours.terms["contrastive"].mean(), theirs.loss()

    ours, theirs = jax.jit(both)(make_batch())
    np.testing.assert_allclose(ours, theirs, rtol=1e-6)


def test_four_micro_batches_change_nothing(case, reference, make_batch, error):
    loss, grads = case.value(make_batch(), num_micro=4, grads=True)
    np.testing.assert_allclose(loss, reference[0], rtol=1e-6)
    assert error(grads, reference[1]) < 1e-5


def test_the_queues_hold_the_teachers_last_embeddings(case, make_batch):
    run, metrics = case.steps([make_batch()])
    before, after = run[0].method_state, run[1].method_state
    embed = Apply(MODEL, jax.tree.map(jnp.asarray, run[0].teachers["ema"]))
    for name in ("image", "text"):
        np.testing.assert_allclose(np.linalg.norm(before[name], axis=1), 1, rtol=1e-5)
        want = jax.jit(lambda x, name=name: embed(name, x)["embed"])(make_batch()[name])
        np.testing.assert_allclose(after[name][:8], want, atol=1e-5)
        np.testing.assert_array_equal(after[name][8:], before[name][:4])


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Sixty steps on made-up shapes through the command, from the smoke config."""
    directory = tmp_path_factory.mktemp("albef") / "run"
    config = configs.load(f"{runs.ROOT}/configs/albef.py:smoke")
    config = runs.changed(configs.plain(config), **{"stages.0.steps": 60}, log_every_steps=10)
    assert runs.train(config, directory) == 0
    return [row for row in runs.rows(directory) if row["kind"] == "train"]


def test_its_losses_fall_on_shapes(trained):
    first, last = trained[0], trained[-1]
    for name in ("contrastive", "words"):
        assert last[name] < 0.95 * first[name], (name, first[name], last[name])
    assert last["loss"] < first["loss"] and last["matching"] < first["matching"] + 0.05
