"""OpenCLIP's models, random and trained-like, against ours after import; and the exported folder in OpenCLIP."""

import dataclasses
import glob
import json
import os

import numpy as np
import pytest

from parity import originals
from vlp.exchange import compare, folders
from vlp.exchange import open_clip as ours

torch = pytest.importorskip("torch")
open_clip = pytest.importorskip("open_clip")
pytest.importorskip("safetensors")
pytestmark = pytest.mark.parity
EMBED, LOGITS = 1e-6, 1e-4  # the largest differences that are accepted


@pytest.mark.parametrize("name", originals.OPEN_CLIP)
def test_embeddings_and_logits_are_the_originals(name, tmp_path):
    """A short, a middle and a full text; CoCa with both masks. The export has the same tensors, and loads there."""
    cfg = originals.OPEN_CLIP[name]
    model = originals.open_clip_model(cfg)
    folder = originals.open_clip_folder(cfg, model, tmp_path / "theirs", PREPROCESS.get(name))
    exchanged = folders.read(folder)
    image, text = originals.inputs(exchanged.data["image_px"], exchanged.data["text_len"])
    tower = exchanged.model["image_tower"]
    pixels = originals.torch_image(image, tower["mean"], tower["std"])
    rows = torch.from_numpy(text).long()
    for mask in ("shifted", "real") if "coca" in name else ("",):
        if mask:
            model.text.correct_cls_mask = mask == "real"
            lower = {**exchanged.model["text_tower"], "cls_mask": mask}
            exchanged = dataclasses.replace(
                exchanged, model={**exchanged.model, "text_tower": lower}
            )
        found = compare.outputs(exchanged, image, text)
        with torch.no_grad():
            assert (
                np.abs(originals.unit(model.encode_image(pixels)) - found["image"]).max() <= EMBED
            )
            assert np.abs(originals.unit(model.encode_text(rows)) - found["text"]).max() <= EMBED
            if mask:
                logits = model(pixels, rows)["logits"].numpy()
                real = (text != 0)[:, :-1]
                assert np.abs(logits - found["logits"][:, :-1])[real].max() <= LOGITS
    out = tmp_path / "ours"
    exchanged = folders.read(folder)
    assert folders.write(exchanged, out, "open_clip") == []
    theirs, again = (folders._weights(f, "open_clip") for f in (folder, out))
    assert theirs.keys() == again.keys()
    assert all((theirs[n] == again[n]).all() for n in theirs)
    difference = compare.difference(folders.read(out), out, "open_clip")
    assert isinstance(difference, dict), difference
    assert difference.pop("logits", 0) <= LOGITS and max(difference.values()) <= EMBED
    assert difference.keys() == {"image", "text"}


HALF = dict(mean=[0.5] * 3, std=[0.5] * 3, interpolation="bicubic", resize_mode="squash")
PREPROCESS = {"ViT-B-16-SigLIP": HALF}


def test_its_model_jsons_are_read_or_named():
    """Of open_clip 3.3.0's, 80 are ours; every other one says what it has that we have not."""
    files = sorted(
        glob.glob(os.path.join(os.path.dirname(open_clip.__file__), "model_configs", "*.json"))
    )
    read, named = [], {}
    for file in files:
        name = os.path.basename(file)[: -len(".json")]
        with open(file) as f:
            cfg = json.load(f)
        try:
            ours.config(cfg, {}, name)
            read.append(name)
        except ours.Foreign as e:
            named[name] = e.part
    assert {
        "ViT-B-32",
        "ViT-B-32-quickgelu",
        "ViT-B-16-SigLIP",
        "ViT-H-14-CLIPA",
        "coca_ViT-B-32",
    } <= {*read}
    assert all(named.values()) and len(read) >= 80
    if open_clip.__version__ == "3.3.0":
        assert (len(read), len(named)) == (80, 64)
