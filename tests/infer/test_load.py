"""Loading a trained model from its workdir needs no mesh, optimiser or data."""

import json
import shutil
import subprocess
import sys
import textwrap

import numpy as np
import pytest

from helpers import runs
from vlp.core import check, tree
from vlp.core import mesh as meshes
from vlp.infer.load import load


def named(params):
    return {f"params/{name}": value for name, value in tree.named(params).items()}


def test_a_loaded_run_holds_model_tokenizer_and_preprocessing(clip_run):
    loaded = load(clip_run)
    on_disk = runs.saved(clip_run)
    params = {name: value for name, value in on_disk.items() if name.startswith("params/")}
    np.testing.assert_equal(named(loaded.apply.params), params)
    assert all(type(value) is np.ndarray for value in tree.named(loaded.apply.params).values())
    assert (loaded.step, loaded.data.image_px, loaded.data.text_len) == (4, 16, 8)
    assert loaded.tokenizer.to_bytes() == (clip_run / "tokenizer.model").read_bytes()
    assert type(loaded.apply.model).__name__ == "TwoTower"
    assert load(clip_run, step=2).step == 2
    assert load(clip_run) is load(str(clip_run))  # read once


def test_what_the_run_evaluates(coca_run):
    """`eval_params="ema"`: the averaged parameters, of the last stage's model."""
    loaded, on_disk = load(coca_run), runs.saved(coca_run)
    assert loaded.data.image_px == 24
    for name, value in named(loaded.apply.params).items():
        np.testing.assert_array_equal(value, on_disk[f"rest/teachers/ema/{name[7:]}"], err_msg=name)
    assert (
        loaded.apply.params["text_tower"]["embedding"] != on_disk["params/text_tower/embedding"]
    ).any()


ELSEWHERE = """
    import json, sys
    sys.path.insert(0, "tests")
    import jax
    assert jax.device_count() == 1
    import numpy as np
    from vlp.core import tree
    from vlp.infer.load import load
    assert not [m for m in sys.modules if m.startswith(("vlp.optim", "vlp.train", "vlp.objectives"))]
    from vlp.models import MODELS
    from helpers import runs
    MODELS["toy"] = runs.Toy
    loaded = load(sys.argv[1])
    embed = loaded.apply("image", np.full((1, 16, 16, 3), 200, np.uint8))["embed"]
    sums = {name: float(value.sum(dtype=np.float64)) for name, value in tree.named(loaded.apply.params).items()}
    print(json.dumps({"sums": sums, "embed": np.asarray(embed).tolist()}))
"""


def test_on_one_device_from_eight(toy, tmp_path):
    """Saved in shards by eight devices, read by a process that has one."""
    mesh = dict(zip(meshes.AXES, (2, 2, 2)))
    assert runs.train(runs.changed(runs.TOY, mesh=mesh), tmp_path / "run", devices=8) == 0
    shards = (
        tmp_path / "run" / "checkpoints" / "step_000000004" / "params" / "_sharding"
    ).read_text()
    assert "fsdp" in shards and "tensor" in shards
    code = [sys.executable, "-c", textwrap.dedent(ELSEWHERE), tmp_path / "run"]
    done = subprocess.run(code, cwd=runs.ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    params = {
        name[7:]: v
        for name, v in runs.saved(tmp_path / "run").items()
        if name.startswith("params/")
    }
    assert found["sums"] == {
        name: float(value.sum(dtype=np.float64)) for name, value in params.items()
    }
    np.testing.assert_allclose(found["embed"], [params["colour"].sum(0) * 200 / 255], rtol=1e-6)


def test_a_broken_newest_checkpoint(clip_run, tmp_path, caplog):
    run = shutil.copytree(clip_run, tmp_path / "run")
    (run / "checkpoints" / "step_000000004" / "params" / "_METADATA").unlink()
    assert load(run).step == 2
    assert "params/_METADATA is missing" in caplog.text
    with pytest.raises(check.UserError, match="step 4: got params/_METADATA is missing"):
        load(run, step=4)


def test_directories_without_a_run_are_refused(clip_run, tmp_path):
    with pytest.raises(check.UserError, match="got no checkpoints"):
        load(tmp_path / "none")
    with pytest.raises(check.UserError, match=r"got no step 3, expected one of steps \[2, 4\]"):
        load(clip_run, step=3)
    assert not list(tmp_path.iterdir())
