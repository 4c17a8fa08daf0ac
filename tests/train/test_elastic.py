"""A run that was saved on eight devices goes on with other meshes, numbers of devices and workers.

The state that is restored is that of the checkpoint to the bit, and the samples are the same. Losses differ by rounding
alone: by 1e-5 of their value at most; on the same mesh not at all. Other numbers of processes: runtime/test_hosts.py.
"""

import shutil

import jax
import numpy as np
import pytest

from helpers import runs
from vlp.core import mesh as meshes
from vlp.core import tree
from vlp.data import order
from vlp.train import loop, start

CONFIG = runs.changed(
    runs.TOY, batch=16, steps=5, teachers={"ema": {"decay": 0.9}}, **{"model.embed": 16}
)
IDS = order.record_ids(0, 5 * 16, runs.DATA["num_records"], seed=0)


def on(*sizes, **changes):
    return runs.changed(CONFIG, mesh=dict(zip(("data", "fsdp", "tensor"), sizes)), **changes)


@pytest.fixture(scope="module")
def eight(tmp_path_factory):
    """(a run on 8·1·1 that died after its checkpoint of step 2, the same run to its end)."""
    folder = tmp_path_factory.mktemp("elastic")
    save = loop.save

    def die(*args):
        save(*args)
        raise runs.Killed

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(runs.MODELS, "toy", runs.Toy)
        patch.setitem(runs.OBJECTIVES, "toy", runs.ToyObjective)
        assert runs.train(on(8, 1, 1), folder / "whole", devices=8) == 0
        patch.setattr(loop, "save", die)
        with pytest.raises(runs.Killed):
            runs.train(on(8, 1, 1), folder / "saved", devices=8)
    return folder / "saved", folder / "whole"


@pytest.mark.parametrize(
    "sizes, changes",
    [
        ((8, 1, 1), {}),
        ((8, 1, 1), {"data.workers": 2}),
        ((4, 1, 1), {"data.read_threads": 0}),
        ((2, 1, 1), {}),
        ((1, 1, 1), {}),
        ((4, 2, 1), {}),
        ((1, 8, 1), {"micro_batches": 2}),
        ((2, 2, 2), {}),
    ],
)
def test_it_goes_on_on_another_mesh(toy, eight, tmp_path, monkeypatch, sizes, changes):
    saved, whole = eight
    shutil.copytree(saved, tmp_path / "run")
    restored, records = [], []
    restore, to_global = start.restore, meshes.to_global

    def watched_restore(*args):
        state = restore(*args)
        restored.append(jax.device_get(state))  # before training gives its arrays away
        return state

    def watched(batch, mesh):
        records.append(order.join_words(batch["record"]))
        return to_global(batch, mesh)

    monkeypatch.setattr(start, "restore", watched_restore)
    monkeypatch.setattr(meshes, "to_global", watched)
    devices = int(np.prod(sizes))
    assert runs.train(on(*sizes, **changes), tmp_path / "run", devices=devices) == 0
    np.testing.assert_array_equal(np.concatenate(records), IDS[2 * 16 :])
    wanted = runs.saved(saved)
    for name, value in tree.named(restored[0].params).items():
        np.testing.assert_array_equal(value, wanted[f"params/{name}"], err_msg=name)
    rest = {"opt": restored[0].opt, "teachers": restored[0].teachers}
    for name, value in tree.named(rest).items():
        np.testing.assert_array_equal(value, wanted[f"rest/{name}"], err_msg=name)
    if sizes == (8, 1, 1):
        runs.assert_same_run(tmp_path / "run", whole)
    assert_near(tmp_path / "run", whole)


def assert_near(run, whole, tolerance=1e-5):
    for row, other in zip(runs.rows(run), runs.rows(whole), strict=True):
        assert row["step"] == other["step"]
        for key in ("loss", "grad_norm", "param_norm"):
            assert row[key] == pytest.approx(other[key], rel=tolerance), (row["step"], key)


def test_sixteen_devices_go_on(eight, tmp_path, monkeypatch):
    """A process of its own."""
    saved, whole = eight
    shutil.copytree(saved, tmp_path / "run")
    monkeypatch.setenv("JAX_NUM_CPU_DEVICES", "16")
    process = runs.command(*runs.arguments(on(8, 2, 1), tmp_path / "run"))
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    assert '"devices": 16' in (tmp_path / "run" / "versions.json").read_text()
    assert_near(tmp_path / "run", whole)
