"""Folders of other libraries, made here without them: export and import are each other's inverse."""

import dataclasses
import io
import json

import jax.numpy as jnp
import numpy as np
import pytest
import sentencepiece

from helpers import runs
from helpers.formats import clip_merges
from vlp.core.check import UserError
from vlp.core.config import build_named
from vlp.data.tokenizer import Tokenizer
from vlp.exchange import checkpoint, folders, hugging_face, open_clip, tokenizers
from vlp.exchange.checkpoint import Exchanged
from vlp.infer.load import load
from vlp.models import MODELS, TOWERS

pytest.importorskip("safetensors")
pytest.importorskip("tokenizers")

SIZES = dict(width=16, depth=2, heads=2, mlp=32)
PIXELS = dict(mean=open_clip.OPENAI["mean"], std=open_clip.OPENAI["std"])
VIT = dict(name="vit", patch=4, **SIZES, activation="gelu_exact", eps=1e-5, **PIXELS)
TEXT = dict(name="transformer", vocab=60, **SIZES, activation="gelu_exact", eps=1e-5)
CLIP = dict(
    name="two_tower", embed=8, scale=1 / 0.07, bias=None,
    image_tower=dict(VIT, pool="cls", cls=True, cls_pos=True, pre_norm=True, patch_bias=False),
    text_tower=dict(TEXT, pool="eos", pad_id=-1, eos_id=59, attend_padding=True),
)  # fmt: skip
COCA = dict(
    CLIP, embed=16,
    image_tower=dict(CLIP["image_tower"], pool="none"),
    text_tower=dict(TEXT, pool="cls", pad_id=0, eos_id=1, cls_pos=True, cls_mask="shifted"),
    decoder=dict(depth=2, mlp=32, norm_image=True, mlp_self=True),
    poolers=dict(queries=3, heads=2, cascade=False, shared=True),
)  # fmt: skip
SIGLIP_TEXT = dict(TEXT, pool="last", causal=False, pad_id=-1, eos_id=1, attend_padding=True)
SIGLIP = dict(
    name="two_tower", embed=16, scale=10.0, bias=-10.0, project_image=False, text_bias=True,
    image_tower=dict(name="vit", patch=4, pool="map", **SIZES),
    text_tower=dict(SIGLIP_TEXT, activation="gelu", eps=1e-6),
)  # fmt: skip
CLIPA = dict(
    CLIP,
    image_tower=dict(CLIP["image_tower"], pool="mean_patches", pre_norm=False, pool_first=True),
    text_tower=SIGLIP_TEXT,
)
RESNET = dict(name="resnet", depths=(2, 1), width=16, heads=4, out=8, **PIXELS)
RN = dict(CLIP, image_tower=RESNET, project_image=False)
DATA = dict(image_px=8, text_len=6, eval_crop="torchvision", resize="bicubic")


@pytest.fixture(scope="module")
def words() -> Tokenizer:
    """SigLIP's kind: T5's layout of a SentencePiece model."""
    out = io.BytesIO()
    texts = ["a red cat on a mat", "a blue dog and a fox"] * 20
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts), model_writer=out, model_type="unigram", vocab_size=40,
        pad_id=0, eos_id=1, unk_id=2, bos_id=-1, hard_vocab_limit=False, minloglevel=2,
    )  # fmt: skip
    return tokenizers._sentencepiece(out.getvalue(), "model", "siglip")


def made(section, words, **data) -> Exchanged:
    """A model with random leaves."""
    model = build_named(MODELS, section, "config.model", more=TOWERS)
    data = DATA | data
    rng = np.random.default_rng(0)
    leaves = {
        name: np.ones(x.shape) if name.endswith("stat_share") else rng.normal(size=x.shape)
        for name, x in checkpoint.shapes(model, data["image_px"], data["text_len"]).items()
    }
    leaves = {name: np.asarray(x, np.float32) for name, x in leaves.items()}
    return Exchanged(section, "clip", data, words, leaves, "vlp", "here")


def equal(a, b):
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_array_equal(a[name], b[name], err_msg=name)


@pytest.mark.parametrize(
    ("section", "system"),
    [(CLIP, "open_clip"), (CLIPA, "open_clip"), (RN, "open_clip"), (COCA, "open_clip"), (CLIP, "hugging_face"),
     (SIGLIP, "hugging_face"), (SIGLIP, "big_vision")],
)  # fmt: skip
def test_export_and_import_give_every_leaf_back(section, system, words, tmp_path, monkeypatch):
    monkeypatch.setattr(tokenizers, "fitted", lambda model, *_: dict(model))
    squash = dict(eval_crop="squash") if section is SIGLIP else {}
    first = made(section, words, **squash)
    out = tmp_path / ("theirs.npz" if system == "big_vision" else "theirs")
    assert folders.write(first, out, system) == []
    second = folders.read(out)
    equal(second.leaves, first.leaves)
    assert second.data["image_px"] == 8 and second.data["text_len"] == 6
    if system != "big_vision":
        assert second.tokenizer == first.tokenizer.with_row(clean=second.tokenizer.row.clean)
    again = tmp_path / ("again.npz" if system == "big_vision" else "again")
    folders.write(dataclasses.replace(second, tokenizer=words), again, system)
    if system == "big_vision":
        with np.load(out) as a, np.load(again) as b:
            equal(dict(a), dict(b))
    else:
        equal(folders._weights(out, system), folders._weights(again, system))


def test_an_imported_model_is_a_checkpoint(words, tmp_path, capsys):
    """`vlp ckpt import`, `load`, `vlp ckpt export`: the same tensors; a workdir that exists is not overwritten."""
    theirs, workdir = tmp_path / "theirs", tmp_path / "run"
    folders.write(made(SIGLIP, words, eval_crop="squash"), theirs, "hugging_face")
    assert runs.vlp("ckpt", "import", theirs, "--out", workdir, "--no-compare") == 0
    assert "from hugging_face" in capsys.readouterr().out
    loaded = load(workdir)
    assert loaded.tokenizer == words and loaded.data.eval_crop == "squash"
    image = jnp.zeros((2, 8, 8, 3), jnp.uint8)
    text = jnp.stack([loaded.tokenizer.encode(t, 6) for t in ("a cat", "a dog")])
    for method, x in (("image", image), ("text", text)):
        run = loaded.apply.jit(lambda apply, x, method=method: apply(method, x)["embed"])
        assert run(x).shape == (2, 16)
    out = tmp_path / "out"
    assert (
        runs.vlp("ckpt", "export", workdir, "--to", "hugging_face", "--out", out, "--no-compare")
        == 0
    )
    equal(folders._weights(out, "hugging_face"), folders._weights(theirs, "hugging_face"))
    assert (out / "config.json").read_text() == (theirs / "config.json").read_text()
    assert runs.vlp("ckpt", "import", theirs, "--out", workdir) == 2
    assert "got something that exists" in capsys.readouterr().err


def test_training_starts_from_an_imported_model_and_evaluation_takes_it(words, tmp_path, capsys):
    """CLIP at the size of `smoke`: every parameter comes from the import."""
    sizes = dict(width=32, depth=1, heads=2, mlp=64)
    image = {**CLIP["image_tower"], **sizes, "patch": 8}
    section = dict(CLIP, embed=16, image_tower=image)
    section["text_tower"] = {**CLIP["text_tower"], **sizes, "vocab": 128, "eos_id": 1}
    first = made(section, words, image_px=16, text_len=12)
    checkpoint.write(first, tmp_path / "run")
    given = ("--workdir", tmp_path / "run", "--config.evals.retrieval.split=test")
    more = (
        "--config.evals.retrieval.batch=8",
        "--config.data.source=shapes",
        "--config.data.num_records=16",
    )
    assert runs.vlp("eval", *given, *more) == 0
    assert "i2t" in capsys.readouterr().out
    init = f"--config.init={tmp_path / 'run'}"
    assert (
        runs.vlp(
            "train", "--config", "configs/clip.py:smoke", "--workdir", tmp_path / "tuned", init
        )
        == 0
    )
    out = capsys.readouterr().out
    assert "new, initialised" not in out and "not used" not in out


def test_what_another_library_does_not_have_is_named(words, tmp_path):
    """A FLIP-like model is neither's; the differing fields are named and nothing is written."""
    flip = dict(CLIP, image_tower=dict(VIT, pool="mean", cls=True, pos="sincos"))
    for system in folders.SYSTEMS:
        out = tmp_path / system
        with pytest.raises(UserError, match="image_tower") as caught:
            folders.write(made(flip, words), out, system)
        assert "\n" not in str(caught.value) and not out.exists()


def test_a_model_of_our_own_tokenizer_is_written_with_a_remark(tmp_path):
    from vlp.data import tokenizer

    ours = tokenizer.train(["a red cat on a mat"] * 4, 40)
    text = dict(CLIP["text_tower"], pad_id=0, eos_id=2)
    first = made(dict(CLIP, text_tower=text), ours)
    (remark,) = folders.write(first, tmp_path / "out", "open_clip")
    assert "tokenizer.model" in remark
    cfg = json.loads((tmp_path / "out" / "open_clip_config.json").read_text())["model_cfg"]
    assert cfg["text_cfg"]["pool_type"] == "eos" and cfg["text_cfg"]["eos_id"] == 2
    second = folders.read(tmp_path / "out", str(tmp_path / "out" / "tokenizer.model"))
    equal(second.leaves, first.leaves)
    assert second.tokenizer == ours


def test_a_model_with_our_numbering_of_clips_pieces_goes_out_in_theirs(tmp_path):
    """The table's rows follow their pieces; the pad and the unknown, which CLIP does not have, are left out."""
    from vlp.data import tokenizer_formats

    ours = Tokenizer(tokenizer_formats.clip_bpe(clip_merges(20)))
    text = dict(CLIP["text_tower"], vocab=ours.vocab_size, pad_id=0, eos_id=2)
    first = made(dict(CLIP, text_tower=text), ours)
    folders.write(first, tmp_path / "out", "open_clip")
    second = folders.read(tmp_path / "out", str(merged(tmp_path, clip_merges(20))))
    ids, theirs = ours.encode("abc no", 6), second.tokenizer.encode("abc no", 6)
    real = ids != 0
    a, b = first.leaves["text_tower/embedding"][ids], second.leaves["text_tower/embedding"][theirs]
    np.testing.assert_array_equal(a[real], b[real])
    assert second.model["text_tower"]["vocab"] == ours.vocab_size - 2


def merged(folder, data):
    (folder / "merges.txt").write_bytes(data)
    return folder / "merges.txt"


def test_scanned_blocks_of_big_vision_are_read(words, tmp_path):
    folders.write(made(SIGLIP, words, eval_crop="squash"), tmp_path / "a.npz", "big_vision")
    with np.load(tmp_path / "a.npz") as file:
        arrays = dict(file)
    scanned = {}
    for name, x in arrays.items():
        head, _, rest = name.partition("encoderblock_")
        if not rest:
            scanned[name] = x
        elif rest.startswith("0/"):
            layers = [arrays[f"{head}encoderblock_{i}/{rest[2:]}"] for i in range(2)]
            scanned[f"{head}encoderblock/{rest[2:]}"] = np.stack(layers)
    np.savez(tmp_path / "b.npz", **scanned)
    equal(folders.read(tmp_path / "b.npz").leaves, folders.read(tmp_path / "a.npz").leaves)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(vision_cfg=dict(timm_model_name="swin_base")), "timm's swin_base"),
        (dict(vision_cfg=dict(layers=[3, 4, 6, 3], image_size=100)), "no multiple of the patch 32"),
        (dict(text_cfg=dict(hf_model_name="roberta-base")), "hf_model_name='roberta-base'"),
        (dict(vision_cfg=dict(image_size=100, patch_size=16)), "no multiple of the patch 16"),
        (dict(vision_cfg=dict(ls_init_value=1e-4)), "ls_init_value=0.0001"),
        (dict(depth=3), "the field 'depth'"),
    ],
)
def test_an_architecture_that_is_not_ours_is_named(change, message):
    cfg = dict(embed_dim=8, vision_cfg={}, text_cfg={}) | change
    with pytest.raises(open_clip.Foreign) as caught:
        open_clip.config(cfg, {}, "model.json")
    assert caught.value.part.endswith(message) or message in caught.value.part
    assert "\n" not in str(caught.value)


def test_broken_folders_are_one_line(words, tmp_path):
    with pytest.raises(UserError, match="no such file|nothing of that name"):
        folders.read(tmp_path / "nothing")
    folders.write(made(SIGLIP, words, eval_crop="squash"), tmp_path / "hf", "hugging_face")
    (tmp_path / "hf" / "model.safetensors").write_bytes(b"x")
    with pytest.raises(UserError, match="safetensors"):
        folders.read(tmp_path / "hf")
    (tmp_path / "hf" / "model.safetensors").unlink()
    with pytest.raises(UserError, match="no .safetensors"):
        folders.read(tmp_path / "hf")
    (tmp_path / "hf" / "config.json").write_text("{}")
    with pytest.raises(UserError, match="model_type ''"):
        folders.read(tmp_path / "hf")
    (tmp_path / "x.npz").write_bytes(b"x")
    with pytest.raises(UserError, match="npz"):
        folders.read(tmp_path / "x.npz")


def test_old_files_of_hugging_face_name_the_end_of_text_2():
    """transformers reads the highest id there, and 49,407 where the file says so."""
    for eos, want in ((2, 49_407), (49_407, 49_407), (7, 7)):
        cfg = dict(model_type="clip", text_config=dict(eos_token_id=eos), vision_config={})
        assert hugging_face.config(cfg, {}, "config.json")[0]["text_tower"]["eos_id"] == want


def test_lits_image_tower_is_read(words, tmp_path, capsys):
    """Of a file whose text tower is BERT, --only image gives the tower, for `config.init`."""
    folders.write(made(SIGLIP, words, eval_crop="squash"), tmp_path / "siglip.npz", "big_vision")
    with np.load(tmp_path / "siglip.npz") as file:
        arrays = {n: x for n, x in file.items() if "/txt/" not in n and "MAPHead" not in n}
    arrays |= {"params/txt/BertModel_0/x": np.zeros(3), "params/img/cls": np.ones((1, 1, 16))}
    arrays |= {"params/img/head/kernel": np.zeros((16, 16)), "params/img/head/bias": np.zeros(16)}
    np.savez(tmp_path / "lit.npz", **arrays)
    with pytest.raises(UserError, match="--only image"):
        folders.read(tmp_path / "lit.npz")
    (tmp_path / "words").write_bytes(words.to_bytes())
    given = ("--only", "image", "--tokenizer", tmp_path / "words", "--out", tmp_path / "run")
    assert runs.vlp("ckpt", "import", tmp_path / "lit.npz", *given) == 0
    assert "5 other arrays left out" in capsys.readouterr().out
    params = load(tmp_path / "run").apply.params
    assert set(params) == {"image_tower"}
    np.testing.assert_array_equal(params["image_tower"]["cls"], np.ones(16))
