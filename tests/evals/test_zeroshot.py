"""Zero-shot classification: class vectors, ranks and confusion against NumPy loops; labels from the records."""

import collections
import dataclasses
import importlib.util
import io as io_lib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from vlp.core import check
from vlp.core import mesh as meshes
from vlp.core.types import Apply
from vlp.data import emoji, records, toy_shapes
from vlp.data.config import Data, Part, Reweight
from vlp.data.dataset import Dataset, open_dataset
from vlp.evals import calibration, prompt_sets
from vlp.evals import io as ios
from vlp.evals import zeroshot as zs

CLASSES = ("circle", "square", "triangle", "diamond", "ring", "cross", "bar")
TEMPLATES = ("a {}", "a big {}", "{} on blue")
DATA = Data(source="shapes", num_records=40, image_px=8, text_len=16, read_threads=0)


@dataclasses.dataclass(frozen=True)
class Random:
    """A "model" of random projections: of the pixels, and of a bag of tokens; embeddings are no unit vectors."""

    def apply(self, variables, x, method) -> Any:
        params = variables["params"]
        if method == "text":
            return {"embed": params["text"][x].sum(axis=1)}
        return {"embed": x.reshape(x.shape[0], -1).astype(jnp.float32) @ params["image"] / 100}

    image = text = None


def params():
    rng = np.random.default_rng(0)
    return {
        "image": rng.normal(size=(8 * 8 * 3, 6)).astype(np.float32),
        "text": rng.normal(size=(128, 6)).astype(np.float32),
    }


def evaluate(batch=8, num_devices=8, **settings):
    kept = {}
    io = ios.IO(DATA, open_dataset(DATA).tokenizer, kept.__setitem__)
    evaluator = zs.Zeroshot("shape", CLASSES, templates=TEMPLATES, batch=batch, **settings)
    mesh = meshes.make(meshes.MeshShape(), jax.devices()[:num_devices])
    with jax.set_mesh(mesh):
        evaluator.check(io, "config.evals.shapes")
        results = list(evaluator(Apply(Random(), params()), mesh, io))
    (artefact,) = kept.values()
    return {r.metric: r.value for r in results}, artefact, results[0].provenance


def class_vectors():
    """The mean of each class's unit prompt vectors, made a unit vector; one prompt at a time."""
    tables, tok = params(), open_dataset(DATA).tokenizer
    length = lambda v: sum(float(x) ** 2 for x in v) ** 0.5
    vectors = []
    for name in CLASSES:
        total = np.zeros(6)
        for template in TEMPLATES:
            z = sum(tables["text"][i].astype(float) for i in tok.encode(template.format(name), 16))
            total += z / length(z)
        vectors.append(total / length(total))
    return vectors


def oracle(splits):
    """The same as `evaluate`, one image at a time."""
    tables, vectors = params(), class_vectors()
    counts, ranks = np.zeros((7, 7), int), []
    for split in splits:
        dataset = open_dataset(dataclasses.replace(DATA, split=split))
        for i in range(len(dataset.source)):
            image = dataset.eval_batch(i, 1)["image"].reshape(-1).astype(float)
            scores = [float(image @ tables["image"] @ v) for v in vectors]
            truth = CLASSES.index(dataset.source[i]["shape"])
            counts[truth, int(np.argmax(scores))] += 1
            ranks.append(1 + sum(s >= scores[truth] for j, s in enumerate(scores) if j != truth))
    return counts, np.array(ranks)


@pytest.mark.parametrize(("batch", "num_devices", "extra"), [(8, 8, ()), (3, 1, ("val",))])
def test_accuracy_equals_a_count_by_loops(batch, num_devices, extra):
    values, artefact, where = evaluate(batch, num_devices, extra_splits=extra)
    counts, ranks = oracle(("test", *extra))
    np.testing.assert_array_equal(artefact["confusion"], counts)
    assert values["accuracy"] == pytest.approx((ranks == 1).mean())
    assert values["top5"] == pytest.approx((ranks <= 5).mean())
    per_class = np.diag(counts) / counts.sum(axis=1)
    assert values["mean_per_class"] == pytest.approx(per_class.mean())
    assert where["num"] == len(ranks) == counts.sum() == 40 * (1 + len(extra))
    assert 0 < values["accuracy"] < values["top5"] < 1
    assert len(artefact["items"]) == 12


@pytest.mark.parametrize(("batch", "num_devices"), [(8, 8), (16, 2), (64, 8)])
def test_class_vectors_are_normalised_means_of_their_prompts(batch, num_devices):
    """21 prompts in ragged batches, or in one that is not full; the norms of their embeddings differ."""
    io = ios.IO(DATA, open_dataset(DATA).tokenizer)
    evaluator = zs.Zeroshot("shape", CLASSES, templates=TEMPLATES, batch=batch)
    mesh = meshes.make(meshes.MeshShape(), jax.devices()[:num_devices])
    with jax.set_mesh(mesh):
        found = zs.embed_classes(Apply(Random(), params()), mesh, io, evaluator)
    np.testing.assert_allclose(found, class_vectors(), rtol=1e-5, atol=1e-6)


def test_broken_model_is_never_right():
    np.testing.assert_array_equal(
        calibration.rank_of_class(np.full((2, 3), np.nan), np.array([0, 2])), 3
    )
    np.testing.assert_array_equal(calibration.rank_of_class(np.zeros((2, 3)), np.array([0, 2])), 3)


def test_an_empty_phrase_leaves_no_blank_in_the_prompt():
    assert prompt_sets.prompts("", ("person {} walking", "{}, a hand")) == [
        "person walking",
        ", a hand",
    ]
    assert prompt_sets.prompts("dark {}", ("a {}",)) == ["a dark {}"]


def test_long_prompts_keep_the_class():
    """The template's words go first, from its beginning; then, if it must be, the end of the class."""
    small_tokenizer = toy_shapes.Shapes(8).tokenizer()
    ids = lambda text, length=8: small_tokenizer.encode(text, length).tolist()
    encoded = lambda *args: (lambda ids_L, cut: (ids_L.tolist(), cut))(
        *prompt_sets.encoded(small_tokenizer, *args)
    )
    assert encoded("red", "a big {}", 8) == (ids("a big red"), False)
    long = "red red red red red red {} red"
    kept = [n for n in range(7) if ids("red " * n + "blue red", 99)[8:].count(0) == 91]
    assert kept and encoded("blue", long, 8) == (ids("red " * kept[-1] + "blue red"), True)
    assert encoded("blue " * 9, long, 8) == (ids("blue " * 9), True)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"label": "shap"}, "did you mean 'shape'"),
        ({"classes": ("circle", "cube")}, r"no record of \['cube'\] in \['test'\]"),
        ({"classes": ("circle", "circle")}, "two or more, all different"),
        ({"classes": ("circle", "bar"), "phrases": ("x",)}, "one for each of 2 classes"),
        ({"templates": ("a photo",)}, "texts with {}"),
    ],
)
def test_mistakes_in_the_settings_are_one_line(settings, message):
    io = ios.IO(DATA, open_dataset(DATA).tokenizer)
    with pytest.raises(check.UserError, match=message):
        evaluator = zs.Zeroshot(**({"label": "shape", "classes": CLASSES} | settings))
        evaluator.check(io, "config.evals.shapes")


@pytest.mark.parametrize(
    ("key", "tone"),
    [
        ("1F44B", "none"), ("1F44B-1F3FB", "light"), ("1F44B-1F3FF", "dark"), ("1F600", ""),
        ("1F469-200D-1F680", "none"), ("1F469-1F3FD-200D-1F680", "medium"), ("1F3FC", ""),
        ("1F9D1-1F3FB-200D-1F91D-200D-1F9D1-1F3FC", ""),
        ("1F9D1-1F3FC-200D-1F91D-200D-1F9D1-1F3FC", "medium-light"),
    ],
)  # fmt: skip
def test_the_tone_of_an_emoji_is_read_from_its_key(key, tone):
    keys = {"1F44B-1F3FB", "1F469-1F3FB-200D-1F680", "1F3FB"}
    assert emoji.tone_of(key, keys) == tone


def test_tones_are_balanced():
    """In each kind of split as many emoji of no tone as of each tone (flat: Unicode gives all five, or none)."""
    dist, names, _ = emoji.dataset.demo_packages()
    keys = {e.key for e in emoji.find(dist, names)}
    counts = collections.Counter(emoji.tone_of(key, keys) for key in keys)
    assert len({counts[tone] for tone in emoji.TONES}) == 1
    assert counts["none"] <= counts["light"] < 1.1 * counts["none"]


def test_records_of_labels_alone(tmp_path):
    """Images and classes without captions: the same results as with captions, and no text in the report."""
    source = open_dataset(DATA).source
    results = []
    for name in ("with", "without"):
        rows = []
        for i in range(16):
            pixels = Image.fromarray(source[i]["image"])
            pixels.save(out := io_lib.BytesIO(), "PNG")
            captions = [{"text": "words", "source": "s", "lang": "en"}] * (name == "with")
            label = source[i]["shape"]
            rows.append(
                {"key": f"{i}", "image": out.getvalue(), "label": label, "captions": captions}
            )
        records.write(tmp_path / name, {"test": rows}, name="n", info={})
        data = Data(path=str(tmp_path / name), image_px=8, text_len=16, read_threads=0)
        kept = {}
        io = ios.IO(data, open_dataset(DATA).tokenizer, kept.__setitem__)
        classes = tuple(sorted({r["label"] for r in rows}))
        evaluator = zs.Zeroshot("label", classes, batch=8)
        mesh = meshes.make(meshes.MeshShape())
        with jax.set_mesh(mesh):
            evaluator.check(io, "config.evals.shapes")
            results.append([r.value for r in evaluator(Apply(Random(), params()), mesh, io)])
        (artefact,) = kept.values()
        assert {x["caption"] for x in artefact["items"]} == {"words" * (name == "with")}
    assert results[0] == results[1]


class Some:
    """Records some of which lack the label, or captions, or a picture that can be read."""

    fingerprint = "x"

    def __init__(self, change):
        self.records, self.change = open_dataset(dataclasses.replace(DATA, split="test")), change

    def __len__(self):
        return 40

    def __getitem__(self, i):
        record = dict(self.records.source[i])
        self.change(i, record)
        return record


def evaluate_changed(monkeypatch, change, **data):
    """Values, provenance and artefact of the records as `change(i, record)` leaves them."""
    kept, mesh = {}, meshes.make(meshes.MeshShape(), jax.devices()[:1])
    tokenizer = open_dataset(DATA).tokenizer
    changed = lambda data, tokenizer, _: Dataset(data, Some(change), tokenizer)
    monkeypatch.setattr(ios, "_open", changed)
    io = ios.IO(dataclasses.replace(DATA, **data), tokenizer, kept.__setitem__)
    evaluator = zs.Zeroshot("shape", CLASSES, templates=TEMPLATES, batch=8)
    with jax.set_mesh(mesh):
        evaluator.check(io, "config.evals.shapes")
        results = list(evaluator(Apply(Random(), params()), mesh, io))
    (artefact,) = kept.values()
    return {r.metric: r.value for r in results}, results[0].provenance, artefact


def without_label(i, record):
    value = {1: None, 5: "", 6: float("nan"), 9: "hexagon"}
    if i in value:
        record["shape"] = value[i]
    if i == 0:  # the first one has not even the field
        del record["shape"]


def test_records_without_the_label_are_left_out(monkeypatch):
    """Counted, and the others as if they were alone."""
    counts, ranks = oracle(("test",))
    left = np.setdiff1d(np.arange(40), (0, 1, 5, 6, 9))
    values, where, artefact = evaluate_changed(monkeypatch, without_label)
    assert values["accuracy"] == pytest.approx((ranks[left] == 1).mean())
    expected = {"num": 35, "num_unlabelled": 4, "num_other_classes": 1, "num_bad": 0}
    assert expected.items() <= where.items() and np.sum(artefact["confusion"]) == 35
    assert counts.sum() == 40


def test_captions_are_not_needed(monkeypatch):
    def change(i, record):
        if i % 2:
            record["captions"] = []
        elif i % 3:
            del record["captions"]

    _, ranks = oracle(("test",))
    values, where, artefact = evaluate_changed(monkeypatch, change, langs=("xx",))
    assert values["accuracy"] == pytest.approx((ranks == 1).mean()) and where["num"] == 40
    captions = [item["caption"] for item in artefact["items"]]
    assert "" in captions and any(captions)


def test_substitutes_do_not_count(monkeypatch):
    """A picture that cannot be read is replaced by another record's, whose class it has not."""

    def change(i, record):
        if i in (3, 4):
            record["image"] = b"<html>"
        if i == 7:
            raise OSError("a bad block")

    _, ranks = oracle(("test",))
    values, where, _ = evaluate_changed(monkeypatch, change, bad_records="replace")
    left = np.setdiff1d(np.arange(40), (3, 4, 7))
    assert values["accuracy"] == pytest.approx((ranks[left] == 1).mean())
    assert (where["num"], where["num_bad"]) == (37, 3)
    with pytest.raises(check.UserError, match="got record 7, which cannot be read .OSError: a bad"):
        evaluate_changed(monkeypatch, change)


def test_no_record_with_the_label(monkeypatch):
    with pytest.raises(check.UserError, match="shapes.label: got 'shape', expected one of"):
        evaluate_changed(monkeypatch, lambda i, record: record.update(shape=None))


def test_evaluations_of_captions_need_captions(monkeypatch):
    """Told before training, not after it."""
    none = lambda i, record: record.update(captions=[])
    changed = lambda data, tokenizer, _: Dataset(data, Some(none), tokenizer)
    monkeypatch.setattr(ios, "_open", changed)
    io = ios.IO(DATA, open_dataset(DATA).tokenizer)
    with pytest.raises(
        check.UserError, match="config.evals.r.split: got 'test', in which 40 of 40"
    ):
        ios.check_captions(io.open("test"), "config.evals.r.split")


def test_what_is_of_training_alone():
    """Evaluations see the whole split, by one caption, of those parts of a mixture that have it."""
    parts = (Part("a", split="train", num_records=7), Part("b", path="/none", source="records"))
    data = dataclasses.replace(
        DATA, captions="all", num_captions=3, mixture=parts, reweight=(Reweight(8, (1.0, 2.0)),),
        skip="/none/quarantine_0.jsonl", group_by="shape",
    )  # fmt: skip
    dataset = ios.IO(data, open_dataset(DATA).tokenizer).open("test")
    assert dataset.num_records == 7 and dataset.data.mixture[0].split == ""
    part = dataclasses.replace(DATA, num_records=7, split="test")
    np.testing.assert_array_equal(
        dataset.eval_batch(0, 7)["image"], open_dataset(part).eval_batch(0, 7)["image"]
    )
    assert dataset.eval_batch(0, 7)["text"].shape == (7, 16)


def test_sets_are_files_and_their_digests_are_kept(tmp_path):
    """Names without values belong to the sorted labels; CLIP_benchmark's {c} is our {}. Numbers equal inline ones."""
    names = sorted(CLASSES)
    (tmp_path / "names.txt").write_text("".join(f"{n}\n" for n in names))
    rows = "".join(f"{n}\t{n} shape\n" for n in reversed(names))
    (tmp_path / "rows.txt").write_text(rows)
    (tmp_path / "templates.txt").write_text("a {c}\na big {c}\n\n{} on blue\n")
    own = {"items": 0, "batch": 8, "template_set": str(tmp_path / "templates.txt")}
    io = ios.IO(DATA, open_dataset(DATA).tokenizer)
    mesh = meshes.make(meshes.MeshShape(), jax.devices()[:1])
    found = {}
    for name in ("names", "rows"):
        evaluator = zs.Zeroshot("shape", class_set=str(tmp_path / f"{name}.txt"), **own)
        with jax.set_mesh(mesh):
            evaluator.check(io, "config.evals.shapes")
            found[name] = list(evaluator(Apply(Random(), params()), mesh, io))
    values, _, where = evaluate(num_devices=1)
    assert {r.metric: r.value for r in found["names"]} == pytest.approx(values)
    assert found["names"][0].provenance["templates"] == where["templates"]
    assert found["names"][0].provenance["classes"] != where["classes"]  # another order
    assert {r.metric: r.value for r in found["rows"]} != values  # "ring shape"
    with pytest.raises(check.UserError, match="6 names for 7 values"):
        (tmp_path / "names.txt").write_text("".join(f"{n}\n" for n in names[1:]))
        zs.Zeroshot("shape", class_set=str(tmp_path / "names.txt")).check(io, "x")
    with pytest.raises(check.UserError, match="or one of .*'digits'.*'openai'"):
        zs.Zeroshot("shape", CLASSES, template_set="opnai").check(io, "x")


def test_every_shipped_set_can_be_read():
    assert prompt_sets.templates("photo", "x") == ("a photo of a {}.",)
    assert len(prompt_sets.templates("short", "x")) == 7
    assert len(prompt_sets.classes("digits", "x")[1]) == 10
    for path in prompt_sets.SHIPPED.glob("*.txt"):
        assert prompt_sets._lines(path.stem, "x")


def test_openais_sets_are_those_of_open_clip():
    if importlib.util.find_spec("open_clip") is None:
        with pytest.raises(check.UserError, match="pip install open_clip_torch"):
            prompt_sets.templates("openai", "x")
        return
    found = prompt_sets.templates("openai", "x")
    assert len(found) == 80
    assert found[0] == "a bad photo of a {}." and len(set(found)) == 80
    assert len(prompt_sets.templates("openai_simple", "x")) == 7
    names = prompt_sets.classes("imagenet", "x")[1]
    assert len(names) == 1000 and names[0] == "tench" and len(set(names)) == 998


def test_calibration_error_equals_a_count_by_bins():
    rng = np.random.default_rng(0)
    confidence = np.concatenate([rng.random(500), [1.0, 0.2, 1 / 15, 0.0]])
    right = rng.random(504) < confidence**2
    total = 0.0
    for b in range(15):
        inside = [
            k for k, c in enumerate(confidence) if b / 15 < c <= (b + 1) / 15 or (b == c == 0)
        ]
        if inside:
            gap = np.mean([right[k] for k in inside]) - np.mean([confidence[k] for k in inside])
            total += abs(gap) * len(inside) / 504
    assert calibration.ece(confidence, right) == pytest.approx(total, abs=1e-12)
    assert calibration.ece(np.ones(4), np.array([True, True, True, False])) == pytest.approx(0.25)


def test_confidence_is_the_softmax_at_the_models_scale():
    rng = np.random.default_rng(0)
    z, c = (np.asarray(x) for x in (rng.normal(size=(9, 4)), rng.normal(size=(5, 4))))
    found = calibration.answers(z, c, np.zeros(9, int), 7.0)
    odds = np.exp(7 * z @ c.T)
    expected = (odds / odds.sum(1, keepdims=True)).max(1)
    np.testing.assert_allclose(found.confidence_N, expected, rtol=1e-9)


def test_accuracy_against_frequency(tmp_path):
    """Spearman's correlation against scipy's, with ties; the rarest and the commonest third."""
    stats = pytest.importorskip("scipy.stats")
    rng = np.random.default_rng(0)
    accuracy, often = rng.integers(0, 5, 12) / 4, rng.integers(0, 6, 12)
    found = calibration.against_frequency(accuracy, often)
    expected = stats.spearmanr(accuracy, often).statistic
    assert found["frequency_spearman"] == pytest.approx(expected, abs=1e-12)
    by = sorted(range(12), key=lambda k: often[k])
    assert found["accuracy_rare"] == pytest.approx(np.mean([accuracy[k] for k in by[:4]]))
    assert found["accuracy_common"] == pytest.approx(np.mean([accuracy[k] for k in by[-4:]]))
    file = tmp_path / "counts.tsv"
    file.write_text("".join(f"{name}\t{k}\n" for k, name in enumerate(CLASSES)))
    values, _, _ = evaluate(num_devices=1, frequency=str(file))
    assert set(found) <= set(values)
    file.write_text("circle\t3\n")
    with pytest.raises(check.UserError, match="6 classes missing"):
        evaluate(num_devices=1, frequency=str(file))
