"""Compositional pairs in each published format, against scores computed one by one; video in frames."""

import dataclasses
import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from helpers import runs
from vlp.core import check
from vlp.core import mesh as meshes
from vlp.core.types import Apply
from vlp.data import tokenizer
from vlp.data.config import Data
from vlp.evals import io as ios
from vlp.evals.pairs import Pairs, preferences
from vlp.evals.video import Video, places

WORDS = tokenizer.train(["the red dog sees a big cat", "a cat on the mat"], vocab_size=48)
DATA = Data(source="shapes", image_px=8, text_len=12, read_threads=0)
PX = 16


@dataclasses.dataclass(frozen=True)
class Bag:
    """A dual encoder and captioner of mean colours and bags of tokens; each next token depends on the image alone."""

    def apply(self, variables, *x, method) -> Any:
        return getattr(self, method)(variables["params"], *x)

    def image(self, tables, image):
        colour = image.astype(jnp.float32).mean(axis=(1, 2)) / 100
        return {"embed": colour @ tables["image"], "feats": colour[:, None]}

    def text(self, tables, text):
        return {"embed": tables["text"][text].mean(axis=1), "tokens": tables["text"][text]}

    def decode(self, tables, tokens, feats):
        hidden = jnp.broadcast_to(feats @ tables["out"], (*tokens.shape[:2], 48))
        return {"hidden": hidden, "unembed": jnp.eye(48)}


def tables():
    rng = np.random.default_rng(0)
    shapes = {"image": (3, 4), "text": (64, 4), "out": (3, 48)}
    return {k: rng.normal(size=s).astype(np.float32) for k, s in shapes.items()}


def picture(seed, size=(PX, PX)):
    pixels = np.random.default_rng(seed).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
    return Image.fromarray(np.repeat(np.repeat(pixels[::4, ::4], 4, 0), 4, 1))


def evaluate(evaluator, devices=2):
    given = ios.IO(DATA, WORDS)
    mesh = meshes.make(meshes.MeshShape(), jax.devices()[:devices])
    params = {k: jnp.asarray(v) for k, v in tables().items()}
    with jax.set_mesh(mesh):
        ios.check_ready(evaluator, mesh, given, "config.evals.p")
        results = ios.run({"p": evaluator}, "p", Apply(Bag(), params), mesh, given)
    assert results[0].provenance["fingerprint"]
    return {r.metric: r.value for r in results}


def score(image, text, kind="embedding"):
    """One image and one text, in float64."""
    small = np.asarray(image.resize((8, 8), Image.Resampling.BICUBIC), np.float64)
    colour, ids = small.mean((0, 1)) / 100, WORDS.encode(text, 12)
    if kind == "embedding":
        a, b = colour @ tables()["image"], tables()["text"][ids].mean(0)
        return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))
    logits = colour @ tables()["out"]
    nats = [np.log(np.exp(logits).sum()) - logits[i] for i in ids[1:] if i != WORDS.pad_id]
    return -float(np.sum(nats) if kind == "likelihood" else np.mean(nats))


TEXTS = ["the red dog sees a cat", "a big cat", "the cat sees a dog", "a mat on the red dog"]
ROWS = [(i, TEXTS[i % 4], TEXTS[(i + 1 + i // 4) % 4]) for i in range(7)]


def write(folder, name, rows):
    """ROWS as a benchmark's file; image k is k.png."""
    for i in range(7):
        picture(i).save(folder / f"{i}.png")
    (folder / name).write_text(json.dumps(rows))
    return str(folder / name)


FORMATS = {
    "sugarcrepe": {
        str(i): {"filename": f"{i}.png", "caption": a, "negative_caption": b} for i, a, b in ROWS
    },
    "checklist": [[f"{i}.png", {"POS": [a], "NEG": [b]}] for i, a, b in ROWS],
    "generic": [{"image": f"{i}.png", "captions": [a, b]} for i, a, b in ROWS],
    "aro": [
        {
            "image_path": f"{i}.png", "bbox_x": 0, "bbox_y": 0, "bbox_w": PX, "bbox_h": PX,
            "true_caption": a, "false_caption": b, "relation_name": ("on", "under")[i % 2],
        }
        for i, a, b in ROWS
    ],
}  # fmt: skip


@pytest.mark.parametrize("kind", ["embedding", "likelihood", "likelihood_mean"])
@pytest.mark.parametrize("form", FORMATS)
def test_accuracy_in_each_format(form, kind, tmp_path):
    if form != "aro" and kind == "likelihood_mean":
        pytest.skip("as for another format")
    file = write(tmp_path, "add_att.json", FORMATS[form])
    found = evaluate(Pairs(file, score=kind, batch=4))
    right = [score(picture(i), a, kind) > score(picture(i), b, kind) for i, a, b in ROWS]
    assert 0 < np.mean(right) < 1 or kind != "embedding"
    assert found["accuracy"] == pytest.approx(np.mean(right))
    if form == "aro":
        groups = [np.mean(right[k::2]) for k in (0, 1)]
        assert found["macro"] == pytest.approx(np.mean(groups))
        assert found["accuracy/on"] == pytest.approx(groups[0])


def test_a_box_is_cut_out_first_and_small_groups_do_not_count(tmp_path):
    rows = [dict(row, bbox_x=4, bbox_y=8, bbox_w=8, bbox_h=8) for row in FORMATS["aro"]]
    file = write(tmp_path, "vg.json", rows)
    part = lambda i: picture(i).crop((4, 8, 12, 16))
    right = [score(part(i), a) > score(part(i), b) for i, a, b in ROWS]
    found = evaluate(Pairs(file, batch=2, min_group=4))
    assert found["accuracy"] == pytest.approx(np.mean(right))
    assert found["macro"] == pytest.approx(np.mean(right[::2]))


@pytest.mark.parametrize("lines", [True, False])
def test_winoground_scores(lines, tmp_path):
    rows = [
        {"id": k, "image_0": f"{k}", "image_1": f"{k + 1}", "caption_0": a, "caption_1": b}
        for k, a, b in ROWS[:6]
    ]
    file = write(tmp_path, "examples.json", rows)
    if lines:
        file = str(tmp_path / "examples.jsonl")
        (tmp_path / "examples.jsonl").write_text("\n".join(map(json.dumps, rows)))
    found = evaluate(Pairs(file, batch=4))
    marks = []
    for k, a, b in ROWS[:6]:
        s = [[score(picture(i), t) for t in (a, b)] for i in (k, k + 1)]
        text = s[0][0] > s[0][1] and s[1][1] > s[1][0]
        image = s[0][0] > s[1][0] and s[1][1] > s[0][1]
        marks.append((text, image, text and image))
    expected = dict(zip(("text_score", "image_score", "group_score"), np.mean(marks, axis=0)))
    assert found == pytest.approx(expected)


def test_ties_are_lost(tmp_path):
    assert preferences(np.ones((2, 2))) == (False, False)
    assert preferences(np.array([[2.0, 1], [1, 2]])) == (True, True)
    assert preferences(np.array([[2.0, 1], [2, 3]])) == (True, False)
    rows = [{"image": "0.png", "captions": [TEXTS[0], TEXTS[0]]}]
    assert evaluate(Pairs(write(tmp_path, "x.json", rows), batch=2))["accuracy"] == 0


def test_files_that_cannot_be_read_are_one_line(tmp_path):
    file = write(tmp_path, "x.json", [{"image": "none.png", "captions": ["a", "b"]}])
    for path, message in (
        (file, "none.png"),
        (write(tmp_path, "y.json", [{"picture": 3}]), "SugarCrepe"),
        (write(tmp_path, "z.json", []), "no instance"),
        (str(tmp_path / "absent.json"), "absent.json"),
    ):
        with pytest.raises(check.UserError, match=message) as caught:
            evaluate(Pairs(path, batch=2))
        assert "\n" not in str(caught.value)


def test_frames_are_the_middles_of_equal_parts():
    assert places(10, 5) == [1, 3, 5, 7, 9]
    assert places(3, 6) == [0, 0, 1, 1, 2, 2] and places(1, 3) == [0, 0, 0]


@pytest.mark.parametrize("devices", [1, 2])
def test_retrieval_of_clips(tmp_path, devices):
    """Folders of frames and an animated GIF; the mean of the frames' unit embeddings."""
    texts = {"a": TEXTS[:2], "b": [TEXTS[2]], "c": TEXTS[3:]}
    for k, name in enumerate("ab"):
        (tmp_path / name).mkdir()
        for n in range(4):
            picture(10 * k + n).save(tmp_path / name / f"{n}.png")
    flat = [Image.new("RGB", (PX, PX), (60 * n, 20, 90)) for n in range(4)]
    flat[0].save(tmp_path / "c.gif", save_all=True, append_images=flat[1:])
    for name, lines in texts.items():
        (tmp_path / f"{name}.txt").write_text("\n".join(lines))
    found = evaluate(Video(str(tmp_path), frames=2, batch=2), devices)
    shown = {n: [picture(10 * k + i) for i in (1, 3)] for k, n in enumerate("ab")} | {
        "c": flat[1::2]
    }
    unit = lambda z: z / np.linalg.norm(z)
    clips = []
    for images in shown.values():
        small = [np.asarray(i.resize((8, 8), Image.Resampling.BICUBIC), np.float64) for i in images]
        clips.append(unit(np.mean([unit(s.mean((0, 1)) @ tables()["image"]) for s in small], 0)))
    owner = [k for k, n in enumerate(shown) for _ in texts[n]]
    said = [tables()["text"][WORDS.encode(t, 12)].mean(0) for n in shown for t in texts[n]]
    s = np.array(clips) @ np.array(said).T
    t2i = [1 + sum(s[i, j] >= s[owner[j], j] for i in range(3) if i != owner[j]) for j in range(4)]
    assert found["t2i/R@1"] == pytest.approx(np.mean([r == 1 for r in t2i]))
    assert found["t2i/median_rank"] == pytest.approx(np.median(t2i))
    (tmp_path / "c.gif").write_bytes(b"GIF89a")
    with pytest.raises(check.UserError, match="clip 'c.gif': got a bad image"):
        evaluate(Video(str(tmp_path), batch=2))
    (tmp_path / "b.txt").unlink()
    with pytest.raises(check.UserError, match="clip 'b' without b.txt"):
        evaluate(Video(str(tmp_path), batch=2))


def test_attention_reads_all_frames_of_a_clip(random_params):
    """Clips of equal frames are as their image; the order of frames does not matter; others differ from the mean."""
    from vlp.core.config import build_named
    from vlp.evals.video import pooled
    from vlp.models import MODELS

    model = build_named(MODELS, runs.COCA["model"], "config.model")
    apply = Apply(model, random_params(model, 16, 8))
    image = np.random.default_rng(0).integers(0, 256, (4, 16, 16, 3), dtype=np.uint8)
    run = lambda x, **how: np.asarray(apply.jit(pooled, frames=2, **how)(jnp.asarray(x)))
    single = np.asarray(apply.jit(pooled, frames=1, pool="attention")(jnp.asarray(image)))
    same = run(np.repeat(image, 2, axis=0), pool="attention")
    np.testing.assert_allclose(same, single, atol=1e-5)
    both = run(image, pool="attention")
    np.testing.assert_allclose(run(image[[1, 0, 3, 2]], pool="attention"), both, atol=1e-5)
    assert abs(both - run(image, pool="mean")).max() > 1e-3
    assert both.shape == (2, 8)
