"""The golden pair: stored in every checkpoint, computed again on load; what differs is named."""

import dataclasses
import itertools
import re
import shutil

import jax
import numpy as np
import pytest

from helpers import runs
from vlp.ckpt import steps
from vlp.core import check
from vlp.data import image_ops
from vlp.infer import golden, load
from vlp.models import layers


def stored(run, step):
    return steps.meta(run / "checkpoints", step)["golden"]


def verified(loaded, **changes):
    """Compares the golden pair with a run that is loaded with these changes."""
    other = dataclasses.replace(loaded, **changes)
    golden.verify("run", other.meta["golden"], other.apply, other.data, other.tokenizer, "ema")


def told(loaded, **changes):
    with pytest.raises(check.UserError) as e:
        verified(loaded, **changes)
    return str(e.value)


def _embed(apply, image):
    return apply("image", image)["embed"]


@pytest.fixture(scope="module")
def loaded(coca_run):
    return load.load(coca_run)


def test_a_checkpoint_holds_the_pair_and_its_answers(coca_run, loaded):
    """Of the trained parameters and of the average that the run evaluates."""
    pair = stored(coca_run, 9)
    assert pair["answers"].keys() == {"student", "ema"}
    assert pair["answers"]["ema"].keys() == {"image", "text", "caption"}
    assert pair["answers"]["ema"] != pair["answers"]["student"]
    assert len(pair["tokens"]) == loaded.data.text_len == 10
    image = golden._pixels(pair["pixels"])[None]
    ours = loaded.apply.jit(_embed)(image)[0]
    np.testing.assert_allclose(golden._values(pair["answers"]["ema"]["image"]), ours, rtol=1e-4)
    verified(loaded)


def test_another_resize_filter_is_named(loaded, monkeypatch):
    other = dataclasses.replace(loaded.data, resize="bilinear")
    line = told(loaded, data=other)
    assert "golden pixels: got pixels that differ by up to" in line
    assert "likely cause: config.data.resize: 'bilinear', not 'bicubic'" in line
    line = told(loaded, data=dataclasses.replace(loaded.data, image_px=16))
    assert "config.data.image_px: 16, not 24" in line
    monkeypatch.setattr(image_ops, "FILTERS", {"bicubic": image_ops.Image.Resampling.BOX})
    monkeypatch.setattr(golden, "_packages", lambda: {"pillow": "99"})
    assert re.search(r"config.data.resize \(packages: .*pillow: .* -> \"99\"", told(loaded))


def test_another_tokenizer_is_named(loaded):
    from vlp.data import tokenizer

    other = tokenizer.train(["two red squares and three blue dogs end"], 30)
    line = told(loaded, tokenizer=other)
    assert "golden tokens: got token" in line and "likely cause: the tokenizer" in line


def test_another_activation_is_named(loaded, monkeypatch):
    """A field of the model differs; or its fields are equal, and another activation gives training's numbers."""
    tower = dataclasses.replace(loaded.apply.model.text_tower, activation="relu")
    model = dataclasses.replace(loaded.apply.model, text_tower=tower)
    line = told(loaded, apply=dataclasses.replace(loaded.apply, model=model))
    assert "golden answer 'text': got a relative difference of" in line
    assert 'likely cause: config.model.text_tower.activation: "gelu" -> "relu"' in line


def test_an_activation_whose_meaning_changed_is_found_by_trying(loaded, monkeypatch):
    gelu, relu = layers.ACTIVATIONS["gelu"], layers.ACTIVATIONS["relu"]
    monkeypatch.setattr(layers, "ACTIVATIONS", layers.ACTIVATIONS | {"gelu": relu, "relu": gelu})
    golden._compiled.cache_clear()
    line = told(loaded)
    golden._compiled.cache_clear()
    assert "config.model activation: 'relu' gives the checkpoint's numbers" in line


def test_another_epsilon_is_named(loaded, monkeypatch):
    monkeypatch.setattr(golden, "SAME_DEVICE", -1.0)  # any difference
    monkeypatch.setattr(layers.Norm, "eps", 1e-5)
    assert "config.model.layer_norm_eps: 1e-06 -> 1e-05" in told(loaded)


def test_other_parameters_are_no_golden_pair(loaded):
    params = jax.tree.map(lambda x: x * 1.01, loaded.apply.params)
    line = told(loaded, apply=dataclasses.replace(loaded.apply, params=params))
    assert "likely cause: the model's code: activation, eps, pooling" in line


def test_commands_refuse_it_in_one_line_unless_told_otherwise(
    clip_run, tmp_path, capsys, monkeypatch
):
    run = shutil.copytree(clip_run, tmp_path / "run")
    build = load.build
    other = lambda cls, section, where: build(cls, section | {"resize": "box"}, where)
    monkeypatch.setattr(load, "build", other)
    load._load.cache_clear(), load._verify.cache_clear()
    line = runs.refused(capsys, "eval", "--workdir", run)
    assert "config.data.resize: 'box', not 'bicubic'" in line and "--no-golden" in line
    assert runs.vlp("eval", "--workdir", run, "--no-golden") == 0
    load._load.cache_clear(), load._verify.cache_clear()


def test_eight_devices_give_the_answers_of_one(toy, tmp_path):
    assert runs.train(runs.changed(runs.TOY, mesh={"fsdp": 4}), tmp_path / "run", devices=8) == 0
    loaded = load.load(tmp_path / "run")  # on one device: compared there
    assert loaded.meta["golden"]["answers"]["student"].keys() == {"image", "text"}


def test_a_process_that_was_asked_to_stop_compiles_nothing(toy, tmp_path, monkeypatch):
    """Its last checkpoint has no golden pair, and is loaded all the same."""
    from vlp.runtime.stop import Stop

    config = runs.changed(runs.TOY, save_every_steps=100, **{"model.embed": 6})
    polls, poll = itertools.count(1), Stop.poll

    def third(self):
        if next(polls) == 3:
            self.ask("test")
        return poll(self)

    monkeypatch.setattr(Stop, "poll", third)
    assert runs.train(config, tmp_path / "run") == 75
    assert stored(tmp_path / "run", 3) == {}
    assert load.load(tmp_path / "run").step == 3


def test_a_checkpoint_without_a_pair_is_loaded(loaded):
    golden.verify("run", {}, loaded.apply, loaded.data, loaded.tokenizer)


def test_the_picture_tells_filters_apart():
    for px in (16, 64, 224):
        image = golden.picture(px)
        names = ("box", "bilinear", "bicubic", "lanczos")
        made = {n: image_ops.eval_image(image, px, resize=n) for n in names}
        for name, pixels in made.items():
            assert all(golden._most(pixels, o) > 10 for n, o in made.items() if n != name)


def test_an_averaged_checkpoint_has_its_own_pair(clip_run, tmp_path):
    assert runs.vlp("average", f"{clip_run}@2", f"{clip_run}@4", "--out", tmp_path / "mean") == 0
    load.load(tmp_path / "mean")
    ours, theirs = (stored(p, 2)["answers"]["student"] for p in (tmp_path / "mean", clip_run))
    assert ours != theirs
