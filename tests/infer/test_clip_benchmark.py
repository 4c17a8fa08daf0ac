"""Our numbers on CLIP_benchmark's WebDataset layout; clip_benchmark's own, where it and torch are installed.

clip_benchmark 1.6.2 needs an environment of its own (docs/evaluation.md); there this file runs in full.
"""

import io
import itertools
import json
import sys
import tarfile
import types

import numpy as np
import pytest
from PIL import Image

from helpers import runs

CLASSES = ("red circle", "green square", "blue ring", "small bar", "white cross", "black diamond")
TEMPLATES = ("a {c}", "the big {c} on white", "{c}")
WORDS = (
    "a small red circle",
    "green square on white",
    "a blue ring",
    "the big bar",
    "cross",
    "a black diamond",
)


def write(root):
    """A classification and a retrieval set, each in two shards; images have one to three captions."""
    rng = np.random.default_rng(0)
    captions = rng.permutation([*itertools.permutations(WORDS, 3)]).tolist()

    def png():
        pixels = rng.integers(0, 256, (3, 3, 3), dtype=np.uint8)
        out = io.BytesIO()
        Image.fromarray(pixels).resize((20, 20), Image.Resampling.NEAREST).save(out, "PNG")
        return out.getvalue()

    def sample(tar, key, files):
        for ending, data in files.items():
            member = tarfile.TarInfo(f"{key}.{ending}")
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))

    for name in ("classes", "pairs"):
        (root / name / "test").mkdir(parents=True)
        (root / name / "test" / "nshards.txt").write_text("2")
        for shard in range(2):
            with tarfile.open(root / name / "test" / f"{shard}.tar", "w") as tar:
                for k in range(11):
                    lines = [
                        " ".join(captions.pop()) for _ in range(1 + k % 3)
                    ]  # none twice: no ties
                    files = {"png": png()}
                    if name == "classes":
                        files["cls"] = str(rng.integers(0, 6)).encode()
                    else:
                        files["txt"] = "\n".join(lines).encode()
                    sample(tar, f"s{11 * shard + k:07d}", files)
    (root / "classes" / "classnames.txt").write_text("\n".join(CLASSES))
    file = root / "classes" / "zeroshot_classification_templates.txt"
    file.write_text("\n".join(TEMPLATES))
    (root / "pairs" / "dataset_type.txt").write_text("retrieval")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run whose texts have room for every prompt: clip_benchmark would cut the class off, `Zeroshot` the template."""
    directory = tmp_path_factory.mktemp("clip") / "run"
    config = runs.changed(runs.CLIP, **{"data.text_len": 48, "steps": 2})
    assert runs.train(config, directory) == 0
    return directory


@pytest.fixture(scope="module")
def ours(run, tmp_path_factory):
    """The folder of the sets, and our numbers by (set, metric)."""
    root = tmp_path_factory.mktemp("wds")
    write(root)
    suite = f"{runs.ROOT}/configs/evals/zeroshot_suite.py:root={root},batch=8"
    out = root / "out.jsonl"
    assert runs.vlp("eval", "--workdir", run, "--evals", suite, "--json", out) == 0
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert {(r["eval"], r["num"]) for r in rows} == {("classes", 22), ("pairs", 22)}
    (num,) = {r["num_captions"] for r in rows if r["eval"] == "pairs"}
    assert num == 2 * sum(1 + k % 3 for k in range(11))
    return root, {(r["eval"], r["metric"]): r["value"] for r in rows}


class Tensor(np.ndarray):
    """The little of a torch tensor that clip_benchmark's model needs."""

    def cpu(self):
        return self


def test_the_object_gives_our_embeddings(ours, run, monkeypatch):
    """With a stand-in for torch: images through its transform, texts through its tokenizer."""
    from vlp.infer import clip_benchmark

    stub: types.ModuleType = types.ModuleType("torch")
    stub.from_numpy = lambda x: x.view(Tensor)
    monkeypatch.setitem(sys.modules, "torch", stub)
    model, transform, tokenizer = clip_benchmark.load_model(str(run))
    root, values = ours
    keys, images = [], []
    for shard in range(2):
        with tarfile.open(root / "classes" / "test" / f"{shard}.tar") as tar:
            for member in tar:
                data = tar.extractfile(member).read()
                if member.name.endswith("cls"):
                    keys.append(int(data))
                else:
                    images.append(transform(Image.open(io.BytesIO(data))))
    unit = lambda z: z / np.linalg.norm(z, axis=-1, keepdims=True)
    rows = np.stack(images).view(Tensor)
    assert rows.shape == (22, 16, 16, 3)
    zi = unit(np.asarray(model.eval().encode_image(rows), np.float64))
    text = lambda c: [t.format(c=c) for t in TEMPLATES]
    each = [unit(np.asarray(model.encode_text(tokenizer(text(c))), np.float64)) for c in CLASSES]
    scores = zi @ unit(np.stack([z.mean(0) for z in each])).T
    right = np.mean(scores.argmax(1) == np.array(keys))
    assert values["classes", "accuracy"] == pytest.approx(right)


def test_clip_benchmark_gives_our_numbers(ours, run):
    """parity: its own zero-shot and retrieval code, through its registry of models."""
    torch = pytest.importorskip("torch")
    library = torch.library.Library("torchvision", "DEF")  # which a CPU torch lacks
    try:
        library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    except RuntimeError:
        pass  # it has them
    load = lambda name: pytest.importorskip(f"clip_benchmark.{name}", exc_type=ImportError)
    build_dataset, load_clip = load("datasets.builder").build_dataset, load("models").load_clip
    zeroshot_classification = load("metrics.zeroshot_classification")
    zeroshot_retrieval = load("metrics.zeroshot_retrieval")

    from vlp.infer import clip_benchmark

    clip_benchmark.register()
    model, transform, tokenizer = load_clip("vlp", str(run), "", "", "cpu")
    root, values = ours
    loaders = {}
    for name in ("classes", "pairs"):
        options = {"dataset_name": f"wds/{name}", "root": str(root / name), "split": "test"}
        options["task"] = f"zeroshot_{'classification' if name == 'classes' else 'retrieval'}"
        dataset = build_dataset(transform=transform, download=False, **options)
        loader = torch.utils.data.DataLoader(dataset.batched(8), batch_size=None)
        loaders[name] = dataset, loader
    dataset, loader = loaders["classes"]
    classes = dataset.classes, dataset.templates
    args = model, loader, tokenizer, *classes, "cpu"
    found = zeroshot_classification.evaluate(*args, amp=False)
    assert values["classes", "accuracy"] == pytest.approx(found["acc1"], abs=1e-6)
    assert values["classes", "top5"] == pytest.approx(found["acc5"], abs=1e-6)
    assert values["classes", "mean_per_class"] == pytest.approx(
        found["mean_per_class_recall"], abs=1e-6
    )
    args = model, loaders["pairs"][1], tokenizer, "cpu"
    found = zeroshot_retrieval.evaluate(*args, amp=False, recall_k_list=[1, 5, 10])
    for k in (1, 5, 10):
        i2t, t2i = found[f"text_retrieval_recall@{k}"], found[f"image_retrieval_recall@{k}"]
        assert values["pairs", f"i2t/R@{k}"] == pytest.approx(i2t, abs=1e-6)
        assert values["pairs", f"t2i/R@{k}"] == pytest.approx(t2i, abs=1e-6)
