"""Checkpoints: content, failures, and that broken ones are skipped."""

import json
import logging
import shutil

import jax
import numpy as np
import pytest

from helpers import runs
from helpers.checkpoints import save, trees
from vlp.ckpt import digest
from vlp.ckpt.manager import Checkpoints, select
from vlp.core import check
from vlp.core import mesh as meshes


def test_round_trip_onto_another_mesh(three):
    checkpoints = Checkpoints(three, create=False)
    assert checkpoints.steps() == [2, 4, 6] and checkpoints.newest() == 6
    assert checkpoints.meta(4) == {"position": {"step": 4}, "note": "é"}
    one = meshes.replicated(meshes.make(meshes.MeshShape(), jax.devices()[:1]))
    abstract = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=one)
    params, rest = checkpoints.restore(4, *jax.tree.map(abstract, trees(0)))
    wanted = trees(4)
    assert jax.tree.structure((params, rest)) == jax.tree.structure(wanted)
    jax.tree.map(np.testing.assert_array_equal, (params, rest), wanted)
    assert params["w"].sharding.device_set == {jax.devices()[0]}


def test_parameters_can_be_read_without_the_rest(three):
    checkpoints = Checkpoints(three, create=False)
    for teacher, tree in (("", trees(6)[0]), ("ema", trees(6)[1]["teachers"]["ema"])):
        params = checkpoints.params(6, teacher)
        assert list(params) == ["w"] and type(params["w"]) is np.ndarray
        np.testing.assert_array_equal(params["w"], tree["w"])


def test_reading_writes_nothing(three):
    before = runs.contents(three)
    checkpoints = Checkpoints(three, create=False)
    checkpoints.meta(checkpoints.newest())
    checkpoints.params(2)
    assert runs.contents(three) == before


def test_only_the_newest_checkpoints_are_kept(tmp_path):
    checkpoints = Checkpoints(tmp_path / "c", keep=1)
    save(checkpoints, 1, 2, 30)
    checkpoints.close()
    assert [p.name for p in (tmp_path / "c").iterdir()] == ["step_000000030"]


def flip(folder):
    largest = max(
        (f for f in (folder / "params").rglob("*") if f.is_file()), key=lambda f: f.stat().st_size
    )
    data = bytearray(largest.read_bytes())
    data[len(data) // 2] ^= 1
    largest.write_bytes(data)


def truncate(folder):
    largest = max(
        (f for f in (folder / "rest").rglob("*") if f.is_file()), key=lambda f: f.stat().st_size
    )
    largest.write_bytes(largest.read_bytes()[:-1])


HARM = {
    "a flipped bit": (flip, "was changed"),
    "a truncated file": (truncate, "was changed"),
    "no parameters": (lambda folder: shutil.rmtree(folder / "params"), "params is missing"),
    "no optimiser": (lambda folder: shutil.rmtree(folder / "rest"), "rest is missing"),
    "no position": (lambda folder: (folder / "meta" / "metadata").unlink(), "meta/metadata is missing"),
    "broken digests": (lambda folder: (folder / digest.FILE).write_text("{"), "is broken"),
}  # fmt: skip


@pytest.mark.parametrize("harm", HARM)
def test_broken_checkpoints_are_passed_over(copied, caplog, harm):
    break_it, told = HARM[harm]
    break_it(copied / "step_000000006")
    reader = Checkpoints(copied, create=False)
    with caplog.at_level(logging.WARNING, "vlp"):
        assert reader.newest() == 4 == select(reader, "run", None)
    assert "step_000000006: " in caplog.text and told in caplog.text
    assert "using step 4 instead" in caplog.text
    with pytest.raises(check.UserError, match=told):
        select(reader, "run", 6)
    assert select(reader, "run", 2) == 2

    before = runs.contents(copied / "step_000000006")
    writer = Checkpoints(copied, keep=3)
    writer.set_aside_after(4)
    assert writer.steps() == [2, 4]
    save(writer, 6, 8)
    writer.close()
    (aside,) = copied.glob("broken_*_step_000000006")
    assert len(runs.contents(aside)) == len(before)
    assert Checkpoints(copied, create=False).newest() == 8
    assert Checkpoints(copied, create=False).steps() == [4, 6, 8]


def test_if_all_checkpoints_are_broken_nothing_is_changed(copied):
    for folder in copied.iterdir():
        flip(folder)
    before = runs.contents(copied)
    with pytest.raises(check.UserError, match="expected a whole checkpoint; restore a copy"):
        Checkpoints(copied, create=False).newest()
    assert runs.contents(copied) == before


def test_a_change_of_any_file_makes_a_checkpoint_broken(copied):
    folder = copied / "step_000000006"
    manifest = json.loads((folder / digest.FILE).read_text())
    names = manifest["files"].keys() | manifest["late"].keys()
    files = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}
    assert names == files - {digest.FILE}
    items = ("params", "rest", "meta")
    assert len(names) > 10 and digest.problem(folder, items) == ""
    for name in names:
        data = (folder / name).read_bytes()
        (folder / name).write_bytes(data + b"x")
        assert digest.problem(folder, items) == f"{name} was changed"
        (folder / name).write_bytes(data)


def test_checkpoints_without_digests_are_taken_if_complete(copied):
    """Without a file of digests (lost, or from another program), a checkpoint needs all its items."""
    for folder in copied.iterdir():
        (folder / digest.FILE).unlink()
    shutil.rmtree(copied / "step_000000006" / "rest")
    assert Checkpoints(copied, create=False).newest() == 4


def test_unfinished_saves_do_not_count(copied):
    """A process that dies in a save leaves a temporary folder; saving that step again replaces it."""
    half = copied / "step_000000008.orbax-checkpoint-tmp"
    shutil.copytree(copied / "step_000000006" / "params", half / "params")
    assert Checkpoints(copied, create=False).newest() == 6
    checkpoints = Checkpoints(copied, keep=9)
    assert checkpoints.steps() == [2, 4, 6]
    save(checkpoints, 8)
    checkpoints.close()
    assert not half.exists()
    np.testing.assert_array_equal(
        Checkpoints(copied, create=False).params(8)["w"], trees(8)[0]["w"]
    )


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize("how", ["save", "wait", "close"])
def test_a_failed_save_is_not_lost(tmp_path, monkeypatch, how):
    """Saves run in the background: the next call to the checkpoints raises a save's error."""
    checkpoints = Checkpoints(tmp_path / "c")
    save(checkpoints, 2)

    def full(folder):
        raise OSError("no space left on device")

    monkeypatch.setattr(digest, "write", full)
    params, rest = trees(4)
    checkpoints.save(4, params, rest, {})
    with pytest.raises(
        check.Failed, match=r"no space left.*in saving step 4.*steps \[2\] are kept"
    ):
        if how == "save":
            checkpoints.save(6, params, rest, {})
        else:
            getattr(checkpoints, how)()
    assert Checkpoints(tmp_path / "c", create=False).newest() == 2


def test_an_empty_directory_has_no_checkpoint(tmp_path):
    with pytest.raises(check.UserError, match="got no checkpoints, expected a workdir"):
        Checkpoints(tmp_path / "run" / "checkpoints", create=False)
    assert not list(tmp_path.iterdir())
    checkpoints = Checkpoints(tmp_path / "new")
    assert checkpoints.newest() is None
    with pytest.raises(check.UserError, match="got no checkpoint, expected a saved step"):
        select(checkpoints, "run", None)
    save(checkpoints, 3)
    with pytest.raises(check.UserError, match=r"got no step 5, expected one of steps \[3\]"):
        select(checkpoints, "run", 5)
