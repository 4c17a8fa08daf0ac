"""`vlp average`: the mean of checkpoints, which is then a model like any other."""

import json

import numpy as np
import pytest

from helpers import runs
from vlp.core import check, tree
from vlp.infer import average
from vlp.infer.load import load


def test_the_mean_of_checkpoints(clip_run, tmp_path, capsys):
    """A weighted mean of two steps: right in every leaf, and usable by `vlp eval` and `init`."""
    out = tmp_path / "mean"
    argv = ["average", f"{clip_run}@2", clip_run, "--weights", "0.25,0.75", "--out", out]
    assert runs.vlp(*argv) == 0
    early, late, found = (
        tree.named(m.apply.params) for m in (load(clip_run, 2), load(clip_run), load(out))
    )
    assert any((early[name] != late[name]).any() for name in early)
    for name, leaf in found.items():
        want = 0.25 * np.float64(early[name]) + 0.75 * np.float64(late[name])
        np.testing.assert_allclose(leaf, want, rtol=1e-6, err_msg=name)
        assert leaf.dtype == late[name].dtype
    assert runs.vlp("eval", "--workdir", out) == 0
    assert "config.evals is empty" in capsys.readouterr().out
    config = runs.changed(runs.CLIP, init=str(out), steps=1, **{"schedule.lr": 1e-9})
    assert runs.train(config, tmp_path / "run") == 0
    started = tree.named(load(tmp_path / "run").apply.params)
    for name, leaf in found.items():
        np.testing.assert_allclose(started[name], leaf, atol=1e-6, err_msg=name)


def test_of_one_run_what_it_evaluates(coca_run, tmp_path):
    """The average of one run is its moving average, saved as ordinary parameters."""
    assert runs.vlp("average", coca_run, "--out", tmp_path / "one") == 0
    want, found = load(coca_run), load(tmp_path / "one")
    assert "eval_params" not in json.dumps(found.meta["config"])
    for name, leaf in tree.named(found.apply.params).items():
        np.testing.assert_array_equal(leaf, tree.named(want.apply.params)[name], err_msg=name)


def test_extrapolation_and_types():
    a, b = ({"w": np.full(3, x, np.float32), "n": np.float16(x)} for x in (1.0, 2.0))
    found = average.mean([a, b], [-0.5, 1.5])
    np.testing.assert_array_equal(found["w"], np.float32([2.5] * 3))
    assert (found["w"].dtype, found["n"].dtype) == (np.float32, np.float16)


def test_models_that_do_not_match():
    a, b = {"w": np.zeros((2, 3)), "v": np.zeros(1)}, {"w": np.zeros((2, 4)), "v": np.zeros(1)}
    with pytest.raises(
        check.UserError, match=r"model 2: w: got shape \(2, 4\), expected .* \(2, 3"
    ):
        average.mean([a, b], [0.5, 0.5])
    with pytest.raises(check.UserError, match="model 3: v: got shape none"):
        average.mean([a, a, {"w": a["w"]}], [1 / 3] * 3)


@pytest.mark.parametrize("weights", ["0.5", "0.5,x", "0.5,0.6", "nan,nan"])
def test_weights_that_are_no_average_are_refused(clip_run, tmp_path, capsys, weights):
    argv = ["average", clip_run, clip_run, f"--weights={weights}", "--out", tmp_path / "out"]
    assert runs.vlp(*argv) == 2
    error = capsys.readouterr().err
    assert error.startswith("vlp: --weights: got ") and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_models_and_outputs_that_cannot_be_are_refused(clip_run, tmp_path, capsys):
    for model, out in [(clip_run, clip_run), (f"{clip_run}@3", "new"), (tmp_path / "none", "new")]:
        assert runs.vlp("average", model, "--out", tmp_path / out) == 2
        assert capsys.readouterr().err.count("\n") == 1
    assert not (tmp_path / "new").exists()
