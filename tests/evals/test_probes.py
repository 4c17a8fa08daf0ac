"""Probes of frozen features: each classifier against a plain one; which records and examples count."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize

from vlp.core import check
from vlp.core import mesh as meshes
from vlp.core.types import Apply
from vlp.data.config import Data
from vlp.data.dataset import open_dataset
from vlp.evals import io as ios
from vlp.evals import probes, solvers

DATA = Data(source="shapes", num_records=60, image_px=8, text_len=16, read_threads=0)


@dataclasses.dataclass(frozen=True)
class Pixels:
    """A "model" whose pooled features are some of the pixels."""

    def apply(self, variables, x, method) -> Any:
        flat = x.reshape(x.shape[0], -1).astype(jnp.float32) / 255
        return {"pooled": flat[:, ::16], "embed": flat[:, ::8]}

    image = text = None


@dataclasses.dataclass(frozen=True)
class Unpooled:
    """A model of tokens alone."""

    def apply(self, variables, x, method) -> Any:
        return {"pooled": None, "embed": x}

    image = text = None


def features(split, step):
    dataset = open_dataset(dataclasses.replace(DATA, split=split))
    rows = dataset.eval_batch(0, 60)["image"].reshape(60, -1) / np.float32(255)
    return rows[:, ::step].astype(np.float64), [dataset.source[i]["shape"] for i in range(60)]


def evaluate(evaluator, devices=8):
    given = ios.IO(DATA, open_dataset(DATA).tokenizer)
    mesh = meshes.make(meshes.MeshShape(), jax.devices()[:devices])
    with jax.set_mesh(mesh):
        ios.check_ready(evaluator, mesh, given, "config.evals.probe")
        results = ios.run({"p": evaluator}, "p", Apply(Pixels(), {}), mesh, given)
    return {r.metric: r.value for r in results}, results[0].provenance


def points(num, dim, classes, seed=0):
    rng = np.random.default_rng(seed)
    centre = rng.normal(size=(classes, dim))
    y = rng.integers(0, classes, num)
    return (centre[y] + 2 * rng.normal(size=(num, dim))).astype(np.float32), y


def fewshot_lsr(x, y, test, classes, l2):
    """big_vision's evaluators/fewshot_lsr.py: eigenvectors of the Gram matrix, in its two forms."""
    mean, std = x.mean(0, keepdims=True), x.std(0, keepdims=True) + 1e-5
    x, test = (
        (np.pad((z - mean) / std, ((0, 0), (0, 1)), constant_values=100.0)) for z in (x, test)
    )
    y = 2.0 * np.eye(classes)[y] - 1
    num, dim = x.shape
    eigs, rotate = np.linalg.eigh(x.T @ x if num >= dim else x @ x.T)
    if num >= dim:
        weights = (rotate * (1 / (eigs + l2))) @ (rotate.T @ (x.T @ y))
    else:
        weights = x.T @ ((rotate * (1 / (eigs + l2))) @ (rotate.T @ y))
    return (test @ weights).argmax(1)


@pytest.mark.parametrize("num", [12, 200])
def test_ridge_is_big_visions(num):
    x, y = points(num, 20, 5)
    y[:5] = range(5)
    test, _ = points(90, 20, 5, seed=1)
    found = solvers.ridge(x, y, test, 5, 2.0**10)
    expected = fewshot_lsr(x.astype(np.float64), y, test.astype(np.float64), 5, 2.0**10)
    np.testing.assert_array_equal(found, expected)
    assert len(set(found.tolist())) > 2 or num < 20


def test_logistic_regression_is_at_its_optimum():
    x, y = points(80, 6, 3)
    weights, bias = solvers.logistic(x, y, 3, 0.01)

    def loss(flat):
        w, b = flat[:18].reshape(6, 3), flat[18:]
        total = 0.0
        for row, k in zip(x.astype(np.float64), y):
            logits = row @ w + b
            total += np.log(np.exp(logits).sum()) - logits[k]
        return total / len(x) + 0.005 * (w**2).sum()

    best = scipy.optimize.minimize(loss, np.zeros(21), method="BFGS", options={"gtol": 1e-7})
    np.testing.assert_allclose(weights, best.x[:18].reshape(6, 3), atol=2e-3)
    assert loss(np.concatenate([weights.ravel(), bias])) == pytest.approx(best.fun, abs=1e-7)


def test_the_probe_takes_the_l2_that_generalises():
    rng = np.random.default_rng(0)
    x, y = points(60, 40, 2)
    y = np.where(rng.random(60) < 0.25, 1 - y, y)  # noise that little regularisation would learn
    test, truth = points(400, 40, 2, seed=0)
    predicted, l2 = solvers.probe(x, y, test, 2, (1e-6, 1.0))
    assert l2 == 1.0 and (predicted == truth).mean() > 0.8
    assert solvers.probe(x, y, test, 2, (0.3,))[1] == 0.3


def test_neighbours_vote_by_cosine():
    x, y = points(50, 4, 3)
    test, _ = points(30, 4, 3, seed=1)
    unit = lambda z: z / np.linalg.norm(z, axis=1, keepdims=True)
    x, test = unit(x.astype(np.float64)), unit(test.astype(np.float64))
    expected = []
    for row in test:
        near = sorted(range(50), key=lambda n: -float(row @ x[n]))[:7]
        votes = [sum(np.exp(float(row @ x[n]) / 0.07) for n in near if y[n] == c) for c in range(3)]
        expected.append(int(np.argmax(votes)))
    np.testing.assert_array_equal(solvers.neighbours(x, y, test, 3, 7, 0.07), expected)


@pytest.mark.parametrize("devices", [8, 1])
def test_few_shot_is_the_mean_over_the_same_draws(devices):
    x, names = features("train", 16)
    test, truth = features("test", 16)
    classes = sorted(set(names))
    y = np.array([classes.index(n) for n in names])
    evaluator = probes.FewShot("shape", shots=(1, 3), seeds=2, batch=8 if devices == 8 else 7)
    values, where = evaluate(evaluator, devices)
    for shots in (1, 3):
        right = []
        for seed in range(2):
            rng = np.random.default_rng(seed)
            draws = [rng.permutation(np.flatnonzero(y == c)) for c in range(len(classes))]
            some = np.concatenate([d[:shots] for d in draws])
            found = fewshot_lsr(x[some], y[some], test, len(classes), 1024.0)
            right.append(np.mean([classes[k] == t for k, t in zip(found, truth)]))
        assert values[f"shots_{shots}"] == pytest.approx(np.mean(right))
    assert (where["num"], where["num_classes"], where["features"]) == (60, 7, "pooled")


def test_knn_and_linear_probe_classify_all_images():
    x, names = features("train", 8)
    test, truth = features("test", 8)
    values, where = evaluate(probes.Knn("shape", k=1, batch=8, features="embed"))
    near = [names[int(np.argmax(x @ t / np.linalg.norm(x, axis=1)))] for t in test]
    assert values["accuracy"] == pytest.approx(np.mean([a == b for a, b in zip(near, truth)]))
    assert where["num_train"] == 60
    values, where = evaluate(probes.LinearProbe("shape", batch=8, l2=(0.1, 1.0), max_per_class=4))
    assert where["num_train"] == 28 and where["l2"] in (0.1, 1.0) and 0 < values["accuracy"] < 1


def test_mistakes_are_found_before_training():
    for evaluator, message in (
        (probes.Knn("shpae"), "did you mean 'shape'"),
        (probes.FewShot("shape", batch=12), "got 12, expected a multiple"),
        (probes.FewShot("key"), "those of 'train'"),
    ):
        with pytest.raises(check.UserError, match=message):
            evaluate(evaluator)
    apply = Apply(Unpooled(), {})
    with pytest.raises(check.UserError, match="got no 'pooled' of images"):
        ios.check_asks(probes.Knn("shape"), apply, DATA, "config.evals.probe")
    for options, message in (
        ({"features": "poled"}, "did you mean 'pooled'"),
        ({"train_split": "test"}, "another split"),
        ({"shots": ()}, "numbers from 1 on"),
    ):
        with pytest.raises(check.UserError, match=message):
            probes.FewShot("shape", **options)
