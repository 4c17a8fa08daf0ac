"""`load_params`: parameters of a checkpoint on other devices, without the code and the memory of training."""

import functools
import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import vlp
from helpers import runs
from helpers.checkpoints import trees
from vlp.ckpt.manager import Checkpoints
from vlp.ckpt.params import load_params
from vlp.core import check, tree
from vlp.core import mesh as meshes


def spread(name, shape, mesh):
    axes = meshes.spec(("embed", "mlp")[: len(shape)], shape, mesh)
    return jax.sharding.NamedSharding(mesh, axes)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A workdir with one checkpoint of eight devices: two towers, a teacher."""
    workdir = tmp_path_factory.mktemp("run")
    mesh = meshes.make(meshes.MeshShape(2, 2, 2))
    put = lambda x: jax.device_put(x, spread("", x.shape, mesh))
    rng = np.random.default_rng(0)
    draw = lambda *shape: put(rng.normal(size=shape).astype(np.float32))
    params = {
        "image_tower": {"blocks": {"kernel": draw(16, 8)}, "pos": draw(4, 8)},
        "text_tower": {"embedding": draw(32, 8).astype(jnp.bfloat16)},
        "logit_scale": jnp.float32(2.5),
        "ids": jnp.arange(4),
    }
    ema = jax.tree.map(lambda x: x + 1, params)
    rest = {"step": jnp.int32(3), "teachers": {"ema": ema}, "method_state": (), "opt": [params]}
    checkpoints = Checkpoints(workdir / "checkpoints")
    checkpoints.save(3, params, rest, {"position": {"step": 3}})
    checkpoints.close()
    return workdir, jax.tree.map(np.asarray, params)


def test_the_tree_comes_back(saved):
    workdir, params = saved
    for path in (workdir, workdir / "checkpoints", workdir / "checkpoints" / "step_000000003"):
        found = vlp.load_params(path)
        jax.tree.map(np.testing.assert_array_equal, found, params)
        assert all(type(x) is np.ndarray for x in jax.tree.leaves(found))
    found = load_params(str(workdir), teacher="ema")
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b + 1), found, params)


def test_dtype_sharding_and_part(saved):
    workdir, params = saved
    place = jax.sharding.SingleDeviceSharding(jax.devices()[3])
    found = load_params(workdir, dtype=jnp.bfloat16, sharding=place, prefix="image_tower/blocks")
    (kernel,) = found.values()
    assert kernel.dtype == jnp.bfloat16 and kernel.devices() == {jax.devices()[3]}
    np.testing.assert_array_equal(
        kernel, params["image_tower"]["blocks"]["kernel"].astype(jnp.bfloat16)
    )
    whole = load_params(workdir, dtype=np.float32)
    kinds = {name: str(x.dtype) for name, x in tree.named(whole).items()}
    assert kinds.pop("ids") == "int32" and set(kinds.values()) == {"float32"}
    np.testing.assert_array_equal(
        load_params(workdir, prefix="image_tower/pos"), params["image_tower"]["pos"]
    )
    mesh = meshes.make(meshes.MeshShape(4, 2, 1))
    found = load_params(workdir, sharding=functools.partial(spread, mesh=mesh))
    assert len(found["image_tower"]["blocks"]["kernel"].sharding.device_set) == 8
    jax.tree.map(np.testing.assert_array_equal, found, params)


def test_mistakes_are_one_line(saved, tmp_path):
    workdir, _ = saved
    for options, told in (
        ({"prefix": "imagetower"}, "did you mean 'image_tower'"),
        ({"prefix": "logit_scale/x"}, "expected a part of the tree"),
        ({"teacher": "emma"}, "got 'emma', expected one of ['ema']"),
        ({"step": 4}, "got no step 4, expected a whole checkpoint"),
    ):
        with pytest.raises(check.UserError) as e:
            load_params(workdir, **options)
        assert told in str(e.value), str(e.value)
    with pytest.raises(check.UserError, match="got no checkpoint"):
        load_params(tmp_path / "absent")


def test_only_the_files_of_the_parameters_need_to_be_whole(three, tmp_path, caplog):
    import shutil

    folder = shutil.copytree(three, tmp_path / "c") / "step_000000006"
    for item, step in (("rest", 6), ("params", 4)):
        (folder / item / "_METADATA").write_text("{}")
        np.testing.assert_array_equal(load_params(tmp_path / "c")["w"], trees(step)[0]["w"])
    assert "params/_METADATA was changed; using step 4 instead" in caplog.text


PEAK = """
import json, sys
import jax
import vlp
status = lambda key: next(int(x.split()[1]) for x in open("/proc/self/status") if x.startswith(key))
assert jax.device_count() == 1
vlp.load_params(sys.argv[1], prefix="small")
before = status("VmRSS")
open("/proc/self/clear_refs", "w").write("5")
params = vlp.load_params(sys.argv[1], prefix="large", **json.loads(sys.argv[2]))
num = sum(x.nbytes for x in jax.tree.leaves(params))
barred = {"optax", "vlp.optim", "vlp.train", "vlp.models", "vlp.data", "flax"} & sys.modules.keys()
print(json.dumps([(status("VmHWM") - before) * 1024 / num, num, sorted(barred)]))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_one_device_needs_the_memory_of_the_parameters_and_no_optimiser(tmp_path):
    """A checkpoint of eight devices, with moments twice its size, in a process with one device."""
    mesh = meshes.make(meshes.MeshShape(1, 8, 1))
    rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("fsdp"))
    rng = np.random.default_rng(0)
    block = rng.normal(size=(1024, 1024)).astype(np.float32)
    params = {"large": {f"w{i}": jax.device_put(block + i, rows) for i in range(48)}}
    params["small"] = jnp.ones(3)
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    checkpoints.save(1, params, {"step": jnp.int32(1), "opt": params}, {})
    checkpoints.close()
    env = runs.os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(runs.ROOT)}
    env.pop("JAX_NUM_CPU_DEVICES", None)
    done = subprocess.run(
        [sys.executable, "-c", PEAK, str(tmp_path), "{}"], env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    ratio, num, barred = json.loads(done.stdout.splitlines()[-1])
    assert num == 48 * 2**22 and not barred
    assert ratio <= 1.2, ratio
