"""Damage to every file of a checkpoint: all of it is detected, the step before is used, and nothing is deleted."""

import json
import pathlib
import shutil
import socket

import numpy as np
import pytest

from helpers import runs
from helpers.checkpoints import save, trees
from vlp.ckpt import digest, orbax_io, steps
from vlp.ckpt.manager import Checkpoints
from vlp.core import check

STEP = "step_000000006"


def flip(path, place):
    """Flips one bit at a place, 0 … 1, of the file; returns whether its bytes count.

    Orbax writes the time of commit after the manifest, and nothing reads it.
    """
    data = bytearray(path.read_bytes())
    at = min(int(place * len(data)), len(data) - 1)
    if path.name == digest.STEP:
        before = data[:at].rfind(b'"commit_timestamp_nsecs"')
        if before >= 0 and data.find(b",", before) >= at:
            return False
    data[at] ^= 1 << (at % 8)
    path.write_bytes(data)
    return True


def truncate(path, place):
    data = path.read_bytes()
    path.write_bytes(data[: int(place * len(data))])
    return True


def remove(path, place):
    path.unlink()
    return True


def files(folder):
    return sorted(p for p in folder.rglob("*") if p.is_file())


@pytest.mark.parametrize("harm", [flip, truncate, remove])
def test_damage_to_any_file_is_detected(copied, harm):
    """Every file, at several places; manifest, commit markers and Orbax's metadata among them."""
    folder, done = copied / STEP, 0
    for path in files(folder):
        if path.name == digest.MARKER and path.parent != folder and harm is remove:
            assert (
                path.relative_to(folder).as_posix()
                in json.loads((folder / digest.FILE).read_text())["files"]
            )
        before = path.read_bytes()
        for place in (0, 0.13, 0.5, 0.77, 0.999) if harm is flip else (0, 0.5, 0.999):
            if not harm(path, place):
                continue
            assert digest.problem(folder, steps.ITEMS), (path.relative_to(folder), place)
            path.write_bytes(before)
            done += 1
    assert done > 50 and digest.problem(folder, steps.ITEMS) == ""


def test_an_empty_folder_that_is_missing_is_detected(three, tmp_path):
    folder = tmp_path / "c" / STEP
    shutil.copytree(three / STEP, folder)
    (folder / "params" / "empty").mkdir()
    (folder / digest.FILE).unlink()
    digest.write(folder)
    assert digest.problem(folder, steps.ITEMS) == ""
    (folder / "params" / "empty").rmdir()
    assert digest.problem(folder, steps.ITEMS) == "params/empty is missing"


def emptied(folder):
    shutil.rmtree(folder)
    folder.mkdir()


def without(name):
    return lambda folder: (folder / name).unlink()


def unnamed(folder):
    """A copy that stopped: neither the manifest nor the commit marker has come yet."""
    (folder / digest.FILE).unlink()
    (folder / digest.MARKER).unlink()


FOLDERS = {
    "an empty folder": emptied,
    "empty items": lambda folder: [emptied(folder / item) for item in steps.ITEMS],
    "a copy without the commit marker": without(digest.MARKER),
    "a copy without manifest and marker": unnamed,
    "a file in the place of a folder": lambda f: (shutil.rmtree(f / "rest"), (f / "rest").touch()),
}


@pytest.mark.parametrize("harm", FOLDERS)
def test_the_step_before_is_used_and_nothing_is_deleted(copied, harm):
    FOLDERS[harm](copied / STEP)
    (copied / "step_000000008.orbax-checkpoint-tmp" / "params").mkdir(parents=True)
    before = runs.contents(copied)
    reader = Checkpoints(copied, create=False)
    assert reader.newest() == 4 and 8 not in reader.steps()
    np.testing.assert_array_equal(reader.params(4)["w"], trees(4)[0]["w"])
    assert runs.contents(copied) == before


def test_sha256_manifests_of_older_checkpoints_are_read(copied):
    import hashlib

    folder = copied / STEP
    names = [p.relative_to(folder).as_posix() for p in files(folder)]
    names = [n for n in names if "/" in n and not n.endswith(digest.MARKER)]
    sums = {n: hashlib.sha256((folder / n).read_bytes()).hexdigest() for n in names}
    (folder / digest.FILE).write_text(json.dumps(sums, indent=1) + "\n")
    (folder / digest.MARKER).unlink()  # Orbax before 0.12.3 wrote none
    assert digest.problem(folder, steps.ITEMS) == ""
    flip(folder / names[0], 0.5)
    assert digest.problem(folder, steps.ITEMS) == f"{names[0]} was changed"


# ---- the second line: a checksum in every chunk


def test_chunks_have_checksums():
    """If this fails with a new Orbax, look for its own option for checksums (vlp/ckpt/orbax_io.py)."""
    assert orbax_io.checksums()


def test_the_codec_is_in_the_metadata_of_every_array(three):
    import tensorstore as ts

    for item, names in {"params": ["w"], "rest": ["step", "teachers.ema.w", "opt.1"]}.items():
        base = f"file://{three / STEP / item}/"
        store = ts.KvStore.open({"driver": "ocdbt", "base": base}).result()
        keys = [k.decode() for k in store.list().result() if k.endswith(b"zarr.json")]
        assert {k.removesuffix("/zarr.json") for k in keys} == set(names)
        for key in keys:
            (codec,) = json.loads(store.read(key).result().value)["codecs"]
            assert {"name": "crc32c"} in codec["configuration"]["codecs"], key


def test_flipped_bits_of_data_raise_without_the_manifest(tmp_path):
    """In the largest file of each save, at 20 places: never another number."""
    rng = np.random.default_rng(0)
    params = {"w": rng.normal(size=(256, 64)).astype(np.float32)}
    checkpoints = Checkpoints(tmp_path / "c")
    checkpoints.save(1, params, {"step": np.int32(1)}, {})
    checkpoints.close()
    folder = tmp_path / "c" / "step_000000001"
    data = max(files(folder / "params"), key=lambda p: p.stat().st_size)
    before, raised = data.read_bytes(), 0
    for place in rng.random(20):
        flip(data, place)
        try:
            found = Checkpoints(tmp_path / "c", create=False).params(1)["w"]
            np.testing.assert_array_equal(found, params["w"])
        except AssertionError:
            raise
        except Exception:
            raised += 1
        data.write_bytes(before)
    assert raised > 15


# ---- after a save


def test_a_save_that_cannot_be_opened_stops_the_run(tmp_path, monkeypatch):
    """As when Orbax's merge finds none of the files that the processes wrote, of which it only warns."""
    from etils import epath

    checkpoints = Checkpoints(tmp_path / "c")
    save(checkpoints, 2)
    monkeypatch.setattr(epath.gpath.PosixGPath, "glob", lambda path, pattern: iter(()))
    params, rest = trees(4)
    checkpoints.save(4, params, rest, {})
    with pytest.raises(check.Failed, match=r"in saving step 4.*steps \[2\] are kept"):
        checkpoints.wait()
    monkeypatch.undo()
    assert Checkpoints(tmp_path / "c", create=False).newest() == 2


def test_a_lost_manifest_stops_the_run(tmp_path, monkeypatch):
    def lose(folder):
        (folder / digest.FILE).write_text("{")

    monkeypatch.setattr(digest, "write", lose)
    checkpoints = Checkpoints(tmp_path / "c")
    params, rest = trees(4)
    checkpoints.save(4, params, rest, {})
    with pytest.raises(check.Failed, match="in saving step 4"):
        checkpoints.wait()


def test_the_shares_of_processes_cover_every_file_once():
    manifest = {f"f{i}": [i * 100, "x"] for i in range(30)}
    for num in (1, 3, 40):
        parts = digest.shares(manifest, num)
        assert sorted(n for part in parts for n in part) == sorted(manifest)
        loads = [sum(manifest[n][0] for n in part) for part in parts]
        assert max(loads) - min(loads) <= 2900


def test_each_process_hashes_what_it_wrote(tmp_path):
    folder = pathlib.Path(tmp_path)
    for name in ("params/ocdbt.process_0/d/a", "params/ocdbt.process_1/d/b", "meta/metadata",
                 "params/array_metadatas/process_1", "params/manifest.ocdbt"):  # fmt: skip
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
    digest.write_part(folder, 1)
    part = json.loads((folder / "digests.process_1.json").read_text())
    assert set(part) == {"params/ocdbt.process_1/d/b", "params/array_metadatas/process_1"}
    digest.check_parts(folder, 2)
    digest.write(folder)
    manifest = json.loads((folder / digest.FILE).read_text())
    assert len(manifest["files"]) == 5 and not (folder / "digests.process_1.json").exists()
    digest.write_part(folder, 1)
    (folder / "params/ocdbt.process_1/d/b").unlink()
    with pytest.raises(OSError, match="is not to be seen here"):
        digest.write(folder)
    with pytest.raises(OSError, match="no digests of process 2"):
        digest.check_parts(folder, 3)


PROCESS = """
import pathlib, sys
import jax, numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec
jax.distributed.initialize(f"127.0.0.1:{sys.argv[1]}", 2, int(sys.argv[2]))
from vlp.ckpt import digest
from vlp.ckpt.manager import Checkpoints
me, entries, check = jax.process_index(), digest._entries, digest._check_file
hashed, checked = [], []
digest._entries = lambda folder, names: entries(folder, [n for n in names if hashed.append(n) is None])
digest._check_file = lambda path, name, entry: checked.append(name) or check(path, name, entry)
mesh = jax.make_mesh((2,), ("x",))
rows = NamedSharding(mesh, PartitionSpec("x"))
w = jax.make_array_from_process_local_data(rows, np.arange(64.0, dtype=np.float32)[32 * me : 32 * me + 32])
checkpoints = Checkpoints(sys.argv[3])
checkpoints.save(1, {"w": w}, {"step": np.int32(1)}, {})
checkpoints.wait()
assert checkpoints.newest() == 1 and checkpoints.steps() == [1]
print("HASHED", *hashed)
print("CHECKED", *checked)
multihost_utils.sync_global_devices("whole")
if not me:
    folder = pathlib.Path(sys.argv[3]) / "step_000000001"
    path = max((folder / "params" / "ocdbt.process_1").rglob("*"), key=lambda p: p.stat().st_size * p.is_file())
    path.write_bytes(path.read_bytes()[:-1] + b"?")
multihost_utils.sync_global_devices("flipped")
print("PROBLEM", checkpoints.problem(1))
checkpoints.close()
"""


def test_two_processes_hash_their_own_files_and_check_in_shares(tmp_path):
    """What either of them finds, both know."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    folder = tmp_path / "c"
    start = lambda i: runs.command(port, i, folder, program=("-c", PROCESS))
    told = []
    for process in [start(0), start(1)]:
        out, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors[-2000:]
        told.append({x.split()[0]: x.split()[1:] for x in out.splitlines() if x[:1].isupper()})
    assert any("ocdbt.process_1" in n for n in told[1]["HASHED"])
    assert not any("process_1/" in n for n in told[0]["HASHED"])
    manifest = json.loads((folder / "step_000000001" / digest.FILE).read_text())
    both = [n.replace(".orbax-checkpoint-tmp/", "/") for t in told for n in t["HASHED"]]
    both.sort()
    assert both == sorted(manifest["files"])
    shares = [set(t["CHECKED"]) for t in told]
    assert all(shares) and not shares[0] & shares[1]
    assert shares[0] | shares[1] == manifest["files"].keys() | manifest["late"].keys()
    assert told[0]["PROBLEM"] == told[1]["PROBLEM"]
    assert "ocdbt.process_1" in told[0]["PROBLEM"][0] and told[0]["PROBLEM"][-1] == "changed"
