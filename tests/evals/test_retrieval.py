"""Retrieval: ranks against a count by hand, known models, and every record once for any batch and mesh."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vlp.core import check
from vlp.core import mesh as meshes
from vlp.core.types import Apply
from vlp.data.config import Data
from vlp.data.dataset import open_dataset
from vlp.evals import io as ios
from vlp.evals.retrieval import Retrieval, rank_of_pair

NAMES = [f"{way}/{m}" for way in ("i2t", "t2i") for m in ("R@1", "R@5", "R@10", "median_rank")]


@dataclasses.dataclass(frozen=True)
class Lookup:
    """A "model" that knows the records by heart and gives each the embedding it is told (params: tables)."""

    def apply(self, variables, x, method) -> Any:
        tables = variables["params"]
        known = tables[f"known_{method}"]
        flat = x.reshape(x.shape[0], 1, -1).astype(jnp.float32)
        record = jnp.abs(flat - known.reshape(1, known.shape[0], -1)).sum(-1).argmin(-1)
        return {"embed": tables[method][record]}

    image = text = None


def evaluate(zi_NE, zt_NE, batch=8, mesh=meshes.MeshShape(), num_devices=8, write=lambda *_: None):
    """The evaluator's numbers by name for a model with these embeddings of the test records."""
    data = Data(source="shapes", num_records=len(zi_NE), image_px=8, text_len=16, read_threads=0)
    io = ios.IO(data, open_dataset(data).tokenizer, write)
    rows = io.open("test").eval_batch(0, len(zi_NE))
    assert len(np.unique(rows["text"], axis=0)) == len(zi_NE)
    tables = {
        "known_image": rows["image"],
        "known_text": rows["text"],
        "image": zi_NE,
        "text": zt_NE,
    }
    tables = {name: jnp.asarray(value, jnp.float32) for name, value in tables.items()}
    device_mesh = meshes.make(mesh, jax.devices()[:num_devices])
    with jax.set_mesh(device_mesh):
        results = list(Retrieval(batch=batch)(Apply(Lookup(), tables), device_mesh, io))
    assert [r.metric for r in results] == NAMES
    assert all(
        r.provenance["num"] == len(zi_NE) and r.provenance["split"] == "test" for r in results
    )
    return {r.metric: r.value for r in results}


def oracle(zi_NE, zt_NE):
    """The same numbers, counted one by one."""
    out = {}
    for way, a, b in (("i2t", zi_NE, zt_NE), ("t2i", zt_NE, zi_NE)):
        ranks = []
        for k in range(len(a)):
            right = float(np.dot(a[k], b[k]))
            ranks.append(
                1 + sum(float(np.dot(a[k], b[j])) >= right for j in range(len(b)) if j != k)
            )
        out |= {f"{way}/R@{n}": sum(r <= n for r in ranks) / len(ranks) for n in (1, 5, 10)}
        out[f"{way}/median_rank"] = float(np.median(ranks))
    return out


def test_ranks_equal_a_count_by_hand():
    scores = np.array([[5.0, 1, 2, 3], [9, 9, 1, 9], [0, 0, 0, 0], [1, 2, 3, 2]])
    np.testing.assert_array_equal(rank_of_pair(scores), [1, 3, 4, 3])
    np.testing.assert_array_equal(rank_of_pair(scores.T), [2, 1, 4, 3])


def test_a_score_that_is_not_a_number_is_no_hit():
    np.testing.assert_array_equal(rank_of_pair(np.full((3, 3), np.nan)), [3, 3, 3])
    scores = np.eye(3)
    scores[1, 1] = np.nan
    np.testing.assert_array_equal(rank_of_pair(scores), [1, 3, 1])


def test_ranks_of_permuted_records():
    rng = np.random.default_rng(0)
    scores, order = rng.integers(0, 6, (12, 12)).astype(float), rng.permutation(12)
    shuffled = rank_of_pair(scores[order][:, order])
    np.testing.assert_array_equal(shuffled, rank_of_pair(scores)[order])


def test_perfect_embeddings_have_recall_one():
    values = evaluate(np.eye(21), np.eye(21))
    assert values == {name: 1.0 for name in NAMES}


def test_ties_count_against_the_model():
    values = evaluate(np.ones((21, 4)), np.ones((21, 4)))
    assert values == {name: 21.0 if "median" in name else 0.0 for name in NAMES}


def test_random_is_chance():
    rng = np.random.default_rng(0)
    values = evaluate(*rng.normal(size=(2, 400, 8)), batch=200)
    for way in ("i2t", "t2i"):
        for k in (1, 5, 10):
            deviation = (k / 400 / 400) ** 0.5
            assert values[f"{way}/R@{k}"] == pytest.approx(k / 400, abs=4 * deviation)
        assert values[f"{way}/median_rank"] == pytest.approx(200, abs=50)


@pytest.mark.parametrize(
    ("batch", "mesh", "num_devices"),
    [
        (8, (8, 1, 1), 8), (16, (2, 2, 2), 8), (24, (1, 8, 1), 8), (64, (-1, 1, 1), 8),
        (1, (1, 1, 1), 1), (4, (1, 1, 1), 1), (21, (1, 1, 1), 1), (22, (2, 1, 1), 2),
    ],
)  # fmt: skip
def test_recall_is_the_same_for_any_batch_and_mesh(batch, mesh, num_devices):
    """21 records, embeddings with many ties: the same as counted by hand, ragged or not."""
    rng = np.random.default_rng(1)
    zi_NE, zt_NE = rng.integers(-1, 2, (2, 21, 3))
    zt_NE[:9] = zi_NE[:9]
    values = evaluate(zi_NE, zt_NE, batch, meshes.MeshShape(*mesh), num_devices)
    assert values == pytest.approx(oracle(zi_NE, zt_NE), abs=1e-12)
    assert 0 < values["i2t/R@5"] < 1


def test_the_gallery_agrees_with_the_scores():
    """The artefact's own ranks and best matches fit the scores."""
    kept = {}
    rng = np.random.default_rng(2)
    zi_NE, zt_NE = rng.normal(size=(2, 21, 4))
    evaluate(zi_NE, zt_NE, write=kept.__setitem__)
    gallery = kept["retrieval_test"]
    assert (gallery["kind"], gallery["num"], len(gallery["queries"])) == ("retrieval", 21, 12)
    scores = zi_NE @ zt_NE.T
    first = gallery["queries"][0]
    assert first["rank_i2t"] == (scores[0] >= scores[0, 0]).sum()
    assert first["rank_t2i"] == (scores[:, 0] >= scores[0, 0]).sum()
    assert [t["score"] for t in first["top_texts"]] == pytest.approx(
        sorted(scores[0])[:-6:-1], rel=1e-5
    )
    assert first["image"].startswith("data:image/png;base64,")
    shown = np.linspace(0, 20, 12).astype(int)
    np.testing.assert_allclose(gallery["similarity"], scores[shown][:, shown], atol=1e-4)


def test_batch_that_does_not_divide():
    with pytest.raises(check.UserError, match="got 12, expected a multiple of data×fsdp = 8"):
        evaluate(np.eye(21), np.eye(21), batch=12)
