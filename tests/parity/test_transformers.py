"""transformers' CLIPModel and SiglipModel, random and trained-like, against ours after import and export."""

import gzip
import io
import pathlib

import numpy as np
import pytest
import sentencepiece

from helpers import runs
from parity import originals
from vlp.exchange import compare, folders

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytest.importorskip("safetensors")
pytestmark = pytest.mark.parity
SIZES = dict(hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4)
IMAGE = dict(SIZES, image_size=32, patch_size=8)


def clip(folder):
    text = dict(SIZES, hidden_size=32, max_position_embeddings=12)
    config = transformers.CLIPConfig(text_config=text, vision_config=IMAGE, projection_dim=24)
    merges = gzip.decompress(
        pathlib.Path(pytest.importorskip("open_clip").tokenizer.default_bpe()).read_bytes()
    )
    lines = merges.decode().split("\n")[1:48_895]
    (folder / "merges.txt").write_text(
        "\n".join(["#version: 0.2", *lines]) + "\n", encoding="utf-8"
    )
    return transformers.CLIPModel(config)


def siglip(folder):
    text = dict(
        SIZES,
        max_position_embeddings=12,
        vocab_size=200,
        projection_size=64,
        bos_token_id=None,
        eos_token_id=1,
    )
    config = transformers.SiglipConfig(text_config=text, vision_config=IMAGE)
    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["a red cat on a mat", "a blue dog and a fox"] * 20), model_writer=out,
        model_type="unigram", vocab_size=40, pad_id=0, eos_id=1, unk_id=2, bos_id=-1,
        hard_vocab_limit=False, minloglevel=2,
    )  # fmt: skip
    (folder / "spiece.model").write_bytes(out.getvalue())
    return transformers.SiglipModel(config)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("make", [clip, siglip])
def test_embeddings_are_the_originals(make, tmp_path, capsys):
    """The command prints the largest difference; the export has the same tensors, and transformers loads it."""
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    torch.manual_seed(0)
    originals.trained_like(make(theirs)).save_pretrained(theirs)
    assert runs.vlp("ckpt", "import", theirs, "--out", tmp_path / "run") == 0
    assert "largest difference from hugging_face: image" in capsys.readouterr().out
    out = tmp_path / "ours"
    assert runs.vlp("ckpt", "export", tmp_path / "run", "--to", "hugging_face", "--out", out) == 0
    for folder in (theirs, out):
        difference = compare.difference(folders.read(folder), folder, "hugging_face")
        assert isinstance(difference, dict), difference
        assert max(difference.values()) <= 1e-6
    a, b = (folders._weights(f, "hugging_face") for f in (theirs, out))
    assert a.keys() == b.keys() and all((a[n] == b[n]).all() for n in a)


@pytest.mark.filterwarnings("ignore")
def test_the_end_of_text_is_found_as_there(tmp_path):
    """Old files say 2 and mean the highest id; new ones say 49,407. transformers and we pool the same token."""
    torch.manual_seed(0)
    model = originals.trained_like(clip(tmp_path))
    _, text = originals.inputs(32, 12)
    for eos in (2, 49_407):
        model.config.text_config.eos_token_id = eos
        model.text_model.eos_token_id = eos
        model.save_pretrained(tmp_path)
        exchanged = folders.read(tmp_path)
        assert exchanged.model["text_tower"]["eos_id"] == 49_407
        again = transformers.CLIPModel.from_pretrained(tmp_path)
        with torch.no_grad():
            want = again.get_text_features(input_ids=torch.from_numpy(text).long())
            want = getattr(want, "pooler_output", want)
        got = compare.outputs(exchanged, np.zeros((3, 32, 32, 3), np.uint8), text)["text"]
        assert np.abs(originals.unit(want) - got).max() <= 1e-6
