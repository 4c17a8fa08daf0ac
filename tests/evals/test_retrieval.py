"""Retrieval: ranks against a count by hand, known models, and every record once for any batch and mesh."""

import dataclasses
import io
import tracemalloc
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from vlp.core import check
from vlp.core import mesh as meshes
from vlp.core.types import Apply
from vlp.data import records, tokenizer
from vlp.data.config import Data
from vlp.data.dataset import open_dataset
from vlp.evals import io as ios
from vlp.evals import ranks as rank_lib
from vlp.evals.retrieval import Retrieval

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
    given = ios.IO(data, open_dataset(data).tokenizer, write)
    rows = given.open("test").eval_batch(0, len(zi_NE))
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
        results = list(Retrieval(batch=batch)(Apply(Lookup(), tables), device_mesh, given))
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


def ranks(images, texts, owner=None, tile=4096, devices=8):
    """`ranks` on a mesh of simulated devices."""
    images, texts = (np.asarray(x, np.float32) for x in (images, texts))
    owner = np.arange(len(texts)) if owner is None else np.asarray(owner)
    mesh = meshes.make(meshes.MeshShape(), jax.devices()[:devices])
    return rank_lib.ranks(images, texts, owner, mesh, tile)


def counted(images, texts, owner):
    """The ranks, one pair at a time in float64: wrong answers that are not worse than the best right one."""
    images, texts = np.asarray(images, np.float64), np.asarray(texts, np.float64)
    score = [[float(sum(x * y for x, y in zip(a, b))) for b in texts] for a in images]
    out = [], []
    for i in range(len(images)):
        best = max(score[i][j] for j in range(len(texts)) if owner[j] == i)
        wrong = [score[i][j] for j in range(len(texts)) if owner[j] != i]
        out[0].append(1 + sum(not s < best for s in wrong))
    for j in range(len(texts)):
        wrong = [score[i][j] for i in range(len(images)) if owner[j] != i]
        out[1].append(1 + sum(not s < score[owner[j]][j] for s in wrong))
    return out


def test_ranks_equal_a_count_by_hand():
    scores = np.array([[5.0, 1, 2, 3], [9, 9, 1, 9], [0, 0, 0, 0], [1, 2, 3, 2]])
    for_images, for_texts = ranks(scores, np.eye(4))
    np.testing.assert_array_equal(for_images, [1, 3, 4, 3])
    np.testing.assert_array_equal(for_texts, [2, 1, 4, 3])


def test_five_captions_an_image_with_ties_by_hand():
    """An image finds any of its captions; its own captions are no rivals; a tie with a wrong one is lost."""
    images = [[1.0, 0], [0, 1]]
    owner = [0, 0, 0, 0, 0, 1, 1, 1, 1, 1]
    texts = [
        [0.9, 0],
        [0.1, 0],
        [0.8, 0],
        [0, 0],
        [0.9, 0],
        [0.9, 0.3],
        [0.5, 0.2],
        [0, 0.2],
        [0, 0],
        [0, 0],
    ]
    for_images, for_texts = ranks(images, texts, owner)
    np.testing.assert_array_equal(for_images, [2, 1])  # 0.9 is tied by a caption of image 1
    np.testing.assert_array_equal(for_texts, [1, 1, 1, 2, 1, 2, 2, 1, 2, 2])


@pytest.mark.parametrize(("tile", "devices"), [(4096, 8), (7, 1), (16, 8), (5, 2), (1, 1)])
def test_ranks_are_those_of_float64_for_any_tile_and_mesh(tile, devices):
    """Near ties that float32 cannot tell apart, exact ties, and images with one to five captions."""
    rng = np.random.default_rng(3)
    images = rng.normal(size=(23, 40)).astype(np.float32)
    owner = np.sort(np.concatenate([np.arange(23), rng.integers(0, 23, 40)]))
    texts = images[owner] + rng.normal(size=(63, 40)).astype(np.float32)
    texts[5] = texts[40]  # a tie
    images[3] = images[9]
    for k in range(0, 60, 3):  # a hair's breadth apart: less than float32's error of the product
        texts[k + 1] = np.nextafter(texts[k], np.float32(np.inf * (-1) ** k))
    expected = counted(images, texts, owner)
    for found, right in zip(ranks(images, texts, owner, tile, devices), expected):
        np.testing.assert_array_equal(found, right)
    exact = images.astype(np.float64) @ texts.T.astype(np.float64)
    rough = images @ texts.T
    assert ((exact[:, 1::3] > exact[:, 0:-1:3]) != (rough[:, 1::3] > rough[:, 0:-1:3])).any()


def test_a_score_that_is_not_a_number_is_no_hit():
    for found in ranks(np.full((3, 2), np.nan), np.ones((3, 2))):
        np.testing.assert_array_equal(found, [3, 3, 3])
    images = np.eye(3)
    images[1, 1] = np.nan
    np.testing.assert_array_equal(ranks(images, np.eye(3))[0], [1, 3, 1])


def test_ranks_of_permuted_records():
    rng = np.random.default_rng(0)
    scores, order = rng.integers(0, 6, (12, 12)).astype(float), rng.permutation(12)
    shuffled = ranks(scores[order][:, order], np.eye(12))[0]
    np.testing.assert_array_equal(shuffled, ranks(scores, np.eye(12))[0][order])


@pytest.mark.parametrize("constant", [False, True])
def test_memory_is_that_of_tiles_not_of_all_pairs(constant, monkeypatch):
    """On the host by tracemalloc; on the device by what the compiler reserves for a tile of 4096 × 4096, width 512.

    Also for a model whose scores are all tied, so that each is computed again.
    """
    monkeypatch.setattr(rank_lib, "CHUNK_BYTES", 2**18)
    rng = np.random.default_rng(0)
    images, texts = rng.normal(size=(2, 2000, 16)).astype(np.float32)
    if constant:
        images[:], texts[:] = images[0], texts[0]
    tracemalloc.start()
    found = ranks(images, texts, tile=128, devices=1)[0]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (found == 2000).all() == constant
    assert peak < 2 * images.nbytes + 100 * 2000 + 60 * 128**2 + 8 * 2**18 < 2000**2
    side = {"z": (4096, 512), "group": (4096,), "low": (4096,), "high": (4096,)}
    kinds = {"z": "f4", "group": "i4", "low": "f4", "high": "f4"}
    one = {k: jax.ShapeDtypeStruct(s, kinds[k]) for k, s in side.items()}
    size = rank_lib._tile.lower(one, one).compile().memory_analysis()
    assert size.temp_size_in_bytes + size.output_size_in_bytes + size.argument_size_in_bytes < 4e8


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


@dataclasses.dataclass(frozen=True)
class Bag:
    """A "model" of mean colours and bags of tokens."""

    def apply(self, variables, x, method) -> Any:
        tables = variables["params"]
        if method == "text":
            return {"embed": tables["text"][x].mean(axis=1)}
        return {"embed": x.astype(jnp.float32).mean(axis=(1, 2)) @ tables["image"] / 100}

    image = text = None


@pytest.mark.parametrize(("num", "batch", "devices"), [(0, 8, 8), (5, 3, 1), (2, 16, 2)])
def test_every_caption_is_a_query_of_its_own(tmp_path, num, batch, devices):
    """Images with one to six captions, ragged batches; a record that is not in the list of ids is no answer."""
    rng = np.random.default_rng(5)
    texts = [[f"number {rng.integers(99)} and {k}" for k in range(1 + i % 6)] for i in range(13)]
    words = tokenizer.train([t for ts in texts for t in ts], vocab_size=48)
    rows = []
    for i, found in enumerate(texts):
        image = io.BytesIO()
        Image.new("RGB", (9, 9), tuple(rng.integers(0, 255, 3).tolist())).save(image, "PNG")
        captions = [{"text": t, "source": "", "lang": "en"} for t in found]
        captions.insert(1, {"text": "deutsch", "source": "", "lang": "de"})
        rows.append({"key": f"k{i}", "image": image.getvalue(), "captions": captions})
    files = {"tokenizer.model": words.to_bytes()}
    records.write(str(tmp_path / "d"), {"test": rows}, name="d", info={}, files=files)
    order = [12, 3, 4, 0, 7, 8, 5, 11]
    (tmp_path / "ids.txt").write_text("".join(f"k{i}\n" for i in order))
    tables = {"image": rng.normal(size=(3, 4)), "text": rng.normal(size=(64, 4))}
    tables = {k: jnp.asarray(v, jnp.float32) for k, v in tables.items()}
    own = ios.Source(path=str(tmp_path / "d"), langs=("en",), ids=str(tmp_path / "ids.txt"))
    evaluator = Retrieval(batch=batch, num_captions=num, data=own, tile=4)
    kept, mesh = {}, meshes.make(meshes.MeshShape(), jax.devices()[:devices])
    given = ios.IO(Data(source="shapes", image_px=8, text_len=12), words, kept.__setitem__)
    with jax.set_mesh(mesh):
        ios.check_ready(evaluator, mesh, given, "config.evals.retrieval")
        results = ios.run({"r": evaluator}, "r", Apply(Bag(), tables), mesh, given)
    dataset = given.of(evaluator).open("test")
    assert [dataset.key(i) for i in range(8)] == [f"k{i}" for i in order]
    owner = [k for k, i in enumerate(order) for _ in texts[i][: num or None]]
    said = [t for i in order for t in texts[i][: num or None]]
    image = [
        dataset.eval_batch(k, 1, reads=("image",))["image"][0].reshape(-1, 3) for k in range(8)
    ]
    zi = np.stack([x.astype(np.float32).mean(0) for x in image]) @ np.asarray(tables["image"]) / 100
    zt = np.stack([np.asarray(tables["text"])[words.encode(t, 12)].mean(0) for t in said])
    values = {r.metric: r.value for r in results}
    for way, found in zip(("i2t", "t2i"), counted(zi, zt, owner)):
        for k in (1, 5):
            assert values[f"{way}/R@{k}"] == pytest.approx(np.mean([r <= k for r in found]))
    where = results[0].provenance
    assert (where["num"], where["num_captions"], where["langs"]) == (8, len(said), "en")
    assert where["fingerprint"] != given.of(evaluator).open("test").source.source.fingerprint
    queries = kept["retrieval_test"]["queries"]
    for k, query in zip(range(8), queries):
        assert query["caption"] == texts[order[k]][0]
        assert all(t["right"] == (t["caption"] in texts[order[k]]) for t in query["top_texts"])


def test_images_without_a_caption_are_left_out_and_counted(tmp_path):
    """And those that cannot be read, with bad_records "replace"; else they are an error."""
    words = tokenizer.train([f"number {i}" for i in range(9)], vocab_size=40)
    rows = []
    for i in range(8):
        image = io.BytesIO()
        Image.new("RGB", (9, 9), (30 * i, 9, 200 - 9 * i)).save(image, "PNG")
        captions = [{"text": f"number {i}", "source": "", "lang": "en"}] * (1 + i % 2) * (i != 3)
        data = image.getvalue() if i != 5 else b"no image"
        rows.append({"key": f"k{i}", "image": data, "captions": captions, "label": i})
    files = {"tokenizer.model": words.to_bytes()}
    records.write(str(tmp_path / "d"), {"test": rows}, name="d", info={}, files=files)
    rng = np.random.default_rng(0)
    tables = {"image": rng.normal(size=(3, 4)), "text": rng.normal(size=(64, 4))}
    apply = Apply(Bag(), {k: jnp.asarray(v, jnp.float32) for k, v in tables.items()})
    mesh = meshes.make(meshes.MeshShape(), jax.devices()[:1])
    evaluator = Retrieval(batch=3, num_captions=0, data=ios.Source(path=str(tmp_path / "d")))
    data = Data(source="shapes", image_px=8, text_len=12, read_threads=0, bad_records="replace")
    with jax.set_mesh(mesh):
        results = ios.run({"r": evaluator}, "r", apply, mesh, ios.IO(data, words))
        where = results[0].provenance
        assert (where["num"], where["num_bad"], where["num_captions"]) == (6, 2, 8)
        strict = ios.IO(dataclasses.replace(data, bad_records="error"), words)
        with pytest.raises(check.UserError, match="k[35]"):
            ios.run({"r": evaluator}, "r", apply, mesh, strict)


def test_a_list_of_ids_must_fit_the_split(tmp_path):
    data = Data(source="shapes", num_records=9, image_px=8, text_len=16)
    given = ios.IO(data, open_dataset(data).tokenizer)
    keys = [open_dataset(dataclasses.replace(data, split="test")).key(i) for i in range(9)]
    file = tmp_path / "ids.txt"
    own = given.of(Retrieval(data=ios.Source(ids=str(file))))
    for text, message in (
        (f"{keys[0]}\nnone\n", "1 of 2 keys"),
        (f"{keys[0]}\n{keys[0]}\n", "twice"),
        ("\n", "empty file"),
    ):
        file.write_text(text)
        with pytest.raises(check.UserError, match=message):
            own.open("test")
