"""Captions: losses against a count by hand for any batch, shuffled images, greedy captions of known models."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vlp.core import mesh as meshes
from vlp.core.types import Apply
from vlp.data.config import Data
from vlp.data.dataset import open_dataset
from vlp.data.tokenizer import EOS, PAD
from vlp.evals import caption_metrics
from vlp.evals import io as ios
from vlp.evals.captions import Captions

NUM = 21


@dataclasses.dataclass(frozen=True)
class Parrot:
    """A "captioner" that knows the images by heart and says for each what it is told: logits[record, position]."""

    def apply(self, variables, *args, method) -> Any:
        return getattr(self, method)(variables["params"], *args)

    def image(self, tables, image):
        known = tables["known"].reshape(1, NUM, -1)
        flat = image.reshape(image.shape[0], 1, -1).astype(jnp.float32)
        record = jnp.abs(flat - known).sum(-1).argmin(-1)
        return {"feats": jax.nn.one_hot(record, NUM)[:, None]}

    def text(self, tables, text):
        return {"tokens": jnp.zeros((*text.shape, 1))}

    def decode(self, tables, tokens, feats):
        hidden = jnp.einsum("bsn,nlv->blv", feats, tables["logits"])
        return {"hidden": hidden, "unembed": jnp.eye(hidden.shape[-1])}


def open_data(text_len=16):
    data = Data(source="shapes", num_records=NUM, image_px=8, text_len=text_len, read_threads=0)
    dataset = ios.IO(data, open_dataset(data).tokenizer).open("test")
    return dataset, dataset.eval_batch(0, NUM)


def evaluate(logits_NLV, batch=8, mesh=meshes.MeshShape(), num_devices=8):
    """The evaluator's numbers for a model with these logits, and the artefact it keeps."""
    dataset, rows = open_data(logits_NLV.shape[1])
    tables = {
        "known": jnp.asarray(rows["image"], jnp.float32),
        "logits": jnp.asarray(logits_NLV, jnp.float32),
    }
    kept = {}
    io = ios.IO(dataset.data, dataset.tokenizer, kept.__setitem__)
    device_mesh = meshes.make(mesh, jax.devices()[:num_devices])
    with jax.set_mesh(device_mesh):
        results = list(Captions(batch=batch)(Apply(Parrot(), tables), device_mesh, io))
    assert all(r.provenance["num"] == NUM for r in results)
    return {r.metric: r.value for r in results}, kept["captions_test"]


def said(ids_NL, strength=30.0):
    """Logits of a model that says these ids, whatever stands before: position t predicts ids[t + 1]."""
    following = np.concatenate([ids_NL[:, 1:], np.full((len(ids_NL), 1), EOS)], axis=1)
    return strength * np.eye(128)[following]


def oracle(logits_NLV, text_NL, shift):
    """Nats per real token of every text under the image `shift` records on, one by one."""
    total = count = 0.0
    for i, text_L in enumerate(text_NL):
        logits_LV = np.asarray(logits_NLV[(i + shift) % len(text_NL)], np.float64)
        for t in range(len(text_L) - 1):
            if text_L[t + 1] != PAD:
                total += np.log(np.exp(logits_LV[t]).sum()) - logits_LV[t, text_L[t + 1]]
                count += 1
    return total / count


@pytest.mark.parametrize(
    ("batch", "mesh", "num_devices"),
    [
        (8, (8, 1, 1), 8), (16, (2, 2, 2), 8), (64, (-1, 1, 1), 8),
        (1, (1, 1, 1), 1), (4, (1, 1, 1), 1), (20, (1, 1, 1), 1), (21, (1, 1, 1), 1), (22, (2, 1, 1), 2),
    ],
)  # fmt: skip
def test_losses_are_means_over_all_records(batch, mesh, num_devices):
    """Of all records together, ragged or not; shuffled: with the next record's image and never with a filler's."""
    logits = np.random.default_rng(0).normal(size=(NUM, 16, 128)) * 2
    values, _ = evaluate(logits, batch, meshes.MeshShape(*mesh), num_devices)
    text_NL = open_data()[1]["text"]
    assert values["caption_loss"] == pytest.approx(oracle(logits, text_NL, 0), rel=1e-6)
    assert values["caption_loss_shuffled"] == pytest.approx(oracle(logits, text_NL, 1), rel=1e-6)


def test_the_error_of_the_difference_is_that_of_drawing_records():
    """Against the bootstrap: how much the difference varies if the records are drawn anew."""
    logits = np.random.default_rng(0).normal(size=(NUM, 16, 128)) * 2
    values, _ = evaluate(logits)
    text_NL = open_data()[1]["text"]
    count_N = (text_NL[:, 1:] != PAD).sum(axis=1)
    one = lambda i, shift: oracle(np.roll(logits, -shift, axis=0)[i : i + 1], text_NL[i : i + 1], 0)
    gap_N = np.array([one(i, 1) - one(i, 0) for i in range(NUM)]) * count_N
    drawn = np.random.default_rng(1).integers(NUM, size=(20_000, NUM))
    spread = (gap_N[drawn].sum(axis=1) / count_N[drawn].sum(axis=1)).std()
    assert values["caption_gap_se"] == pytest.approx(spread, rel=0.1)


def test_a_perfect_model_scores_one():
    dataset, rows = open_data()
    values, kept = evaluate(said(rows["text"]))
    assert values["exact_match"] == 1 and values["caption_loss"] < 1e-6
    assert values["caption_loss_shuffled"] > 5
    assert values["distinct"] == len({tuple(row) for row in rows["text"]}) / NUM == 1
    assert kept["num"] == NUM and len(kept["items"]) == NUM
    assert all(item["generated"] == item["caption"] for item in kept["items"])
    assert kept["items"][0]["caption"] == dataset.record(0)["captions"][0]["text"]


def test_a_uniform_model_has_the_entropy_of_the_vocabulary():
    values, _ = evaluate(np.zeros((NUM, 16, 128)))
    assert values["caption_loss"] == pytest.approx(np.log(128))
    assert values["caption_loss_shuffled"] == pytest.approx(np.log(128))


@pytest.mark.parametrize("text_len", [3, 16])
def test_a_model_that_ends_at_once_gives_empty_captions(text_len):
    """EOS at once: empty captions, none of them right."""
    values, kept = evaluate(said(np.full((NUM, text_len), EOS)))
    assert (values["exact_match"], values["distinct"]) == (0, 1 / NUM)
    assert {item["generated"] for item in kept["items"]} == {""}


@pytest.mark.parametrize("text_len", [3, 16])
def test_a_model_that_never_ends_fills_the_row(text_len):
    """A model that never ends fills the row."""
    dataset, rows = open_data(text_len)
    piece = int(rows["text"][0, 1])
    values, kept = evaluate(said(np.full((NUM, text_len), piece)))
    expected = dataset.tokenizer.decode([piece] * (text_len - 1))
    assert {item["generated"] for item in kept["items"]} == {expected}


def test_what_follows_the_end_is_not_said():
    dataset, rows = open_data()
    ids = rows["text"].copy()
    ids[:, 4] = EOS
    ids[:, 5:] = ids[0, 1]
    _, kept = evaluate(said(ids))
    for item, row in zip(kept["items"], ids):
        assert item["generated"] == dataset.tokenizer.decode(row[:4])


def test_cut_captions_count_as_right():
    """Text longer than the model's is compared as the model can say it."""
    _, rows = open_data(6)
    values, _ = evaluate(said(rows["text"]))
    assert values["exact_match"] == 1


def test_a_model_of_more_ids_than_pieces():
    """A table padded to 160 rows, whose additional ids score highest: never said, and the run goes on."""
    dataset, rows = open_data()
    logits = np.zeros((NUM, 16, 160))
    logits[..., :128] = said(rows["text"])
    logits[..., dataset.tokenizer.vocab_size :] = 99
    _, kept = evaluate(logits)
    assert all(item["generated"] == item["caption"] for item in kept["items"])


def test_captions_are_scored_against_all_references():
    """Of a model that says each record's first caption: the metrics of those texts, by `caption_metrics`."""
    dataset, rows = open_data()
    values, _ = evaluate(said(rows["text"]))
    captions = [dataset.tokenizer.decode(row) for row in rows["text"]]
    references = [[c["text"] for c in dataset.source[i]["captions"]] for i in range(NUM)]
    assert len(references[0]) == 2
    expected = caption_metrics.score(captions, references)
    assert {k: values[k] for k in expected} == pytest.approx(expected)
    assert values["bleu_4"] > 0.99 and values["cider_d"] > 3 and values["eos_rate"] == 1
    ids = np.full((NUM, 16), int(rows["text"][0, 1]))
    assert evaluate(said(ids))[0]["eos_rate"] == 0
