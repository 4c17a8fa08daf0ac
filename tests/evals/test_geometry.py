"""Modality gap, alignment and uniformity against loops over pairs."""

import math

import numpy as np
import pytest

from vlp.evals import geometry


def test_gap_and_uniformity_equal_loops(monkeypatch):
    monkeypatch.setattr(geometry, "_ROWS", 4)
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(2, 11, 5))
    a, b = (z / np.linalg.norm(z, axis=1, keepdims=True) for z in (a, b))
    mean = lambda z: [sum(float(row[k]) for row in z) / 11 for k in range(5)]
    assert geometry.modality_gap(a, b) == pytest.approx(math.dist(mean(a), mean(b)), abs=1e-12)
    total = sum(
        math.exp(-2 * math.dist(a[i], a[j]) ** 2) for i in range(11) for j in range(11) if i != j
    )
    assert geometry.uniformity(a) == pytest.approx(math.log(total / 110), abs=1e-12)
    same = np.tile(a[:1], (6, 1))
    assert geometry.uniformity(same) == pytest.approx(0, abs=1e-12)
    assert geometry.modality_gap(same, same) == 0


def test_the_evaluator_gives_them_of_unit_vectors():
    import jax
    import jax.numpy as jnp
    from test_retrieval import Bag

    from vlp.core import mesh as meshes
    from vlp.core.types import Apply
    from vlp.data.config import Data
    from vlp.data.dataset import open_dataset
    from vlp.evals import io as ios

    data = Data(source="shapes", num_records=13, image_px=8, text_len=12, read_threads=0)
    rng = np.random.default_rng(0)
    tables = {"image": rng.normal(size=(3, 4)), "text": rng.normal(size=(128, 4))}
    given = ios.IO(data, open_dataset(data).tokenizer)
    mesh = meshes.make(meshes.MeshShape(), jax.devices()[:2])
    params = {k: jnp.asarray(v, jnp.float32) for k, v in tables.items()}
    evaluator = geometry.Geometry(batch=8)
    with jax.set_mesh(mesh):
        results = ios.run({"g": evaluator}, "g", Apply(Bag(), params), mesh, given)
    found = {r.metric: r.value for r in results}
    rows = given.open("test").eval_batch(0, 13)
    zi = rows["image"].mean((1, 2)) @ tables["image"]
    zt = tables["text"][rows["text"]].mean(1)
    zi, zt = (z / np.linalg.norm(z, axis=1, keepdims=True) for z in (zi, zt))
    expected = np.mean([((a - b) ** 2).sum() for a, b in zip(zi, zt)])
    assert found["alignment"] == pytest.approx(expected, rel=1e-5)
    assert found["cosine"] == pytest.approx(1 - expected / 2, rel=1e-4)
    assert found["modality_gap"] == pytest.approx(geometry.modality_gap(zi, zt), rel=1e-5)
    assert found["uniformity_text"] == pytest.approx(geometry.uniformity(zt), rel=1e-5)
