"""Checkpoints of a run: written by Orbax, asynchronously and atomically, parameters apart from everything else.

A checkpoint holds two trees, `params` and `rest` (optimiser, counts, teachers, the objective's arrays), and `meta`:
position (step, stage, samples seen), config, tokenizer and versions. Data has no state: it is a function of the
samples seen. A checkpoint whose files have changed since they were written (digest.py) is skipped.
"""

from __future__ import annotations

import logging
import os
import pathlib
import re
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from vlp.ckpt import digest
from vlp.core import check

log = logging.getLogger(__name__)
PyTree = Any
ITEMS = ("params", "rest", "meta")


class Checkpoints:
    """The checkpoints of one workdir, by global step."""

    def __init__(
        self,
        directory: str | pathlib.Path,
        keep: int = 2,
        create: bool = True,
        on_saved: Callable[[int], None] = lambda step: None,
    ):
        """Opens the checkpoints.

        Args:
            directory: that holds them.
            keep: number of checkpoints to keep, the newest ones.
            create: make the directory; False: only read.
            on_saved: called with each saved step, once its checkpoint is known to be whole.

        Raises:
            UserError: the directory cannot be made or used, or, without `create`, does not exist.
        """
        self._path = pathlib.Path(directory).absolute()
        check_path(str(directory), self._path)
        if not create and not self._path.is_dir():
            raise check.error(
                str(directory),
                "no checkpoints",
                "a workdir of `vlp train`",
                _what_to_do(self._path),
            )
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep,
            create=create,
            read_only=not create,
            step_prefix="step",
            step_format_fixed_length=9,
            async_options=ocp.AsyncOptions(
                post_finalization_callback=self._seal,
                # Otherwise threads wait five minutes for a folder that cannot be made.
                create_directories_asynchronously=False,
            ),
        )
        try:
            self._manager = ocp.CheckpointManager(self._path, options=options, item_names=ITEMS)
        except OSError as e:
            do = "give another --workdir, or make this one writable"
            raise check.error(str(self._path), e.strerror, "a directory to write to", do) from e
        self._saving: int | None = None
        self._shapes: dict[str, list[Any]] = {}
        self._failed = False
        self._saved: int | None = None  # the last step whose checkpoint is known to be whole
        self._on_saved = on_saved

    @property
    def path(self) -> pathlib.Path:
        return self._path

    def steps(self) -> list[int]:
        return sorted(self._manager.all_steps())

    def newest(self) -> int | None:
        """Returns the newest step whose checkpoint is whole, None if there are none; logs the steps that it skips.

        Raises:
            UserError: there are checkpoints, but none is whole.
        """
        problems = []
        for step in reversed(self.steps()):
            if not (problem := self.problem(step)):
                for broken in problems:
                    log.warning("%s; using step %d instead", broken, step)
                return step
            problems.append(f"{self._folder(step)}: {problem}")
        if problems:
            do = "restore a copy, or move the directory away to start again"
            raise check.error(str(self._path), "; ".join(problems), "a whole checkpoint", do)
        return None

    def problem(self, step: int) -> str:
        """Returns what is wrong with the files of a step, or "". Process 0 checks them."""
        found = ""
        if jax.process_index() == 0:
            found = digest.problem(self._folder(step), ITEMS)
        if jax.process_count() > 1:
            from jax.experimental import multihost_utils

            if multihost_utils.broadcast_one_to_all(np.int32(bool(found))):
                return found or "broken files (see the log of process 0)"
        return found

    def set_aside_after(self, step: int, why: str = "broken") -> None:
        """Renames later steps, so that they can be saved again: the broken ones that `newest` skipped, or those that
        a run went back over. why: first part of the new name."""
        later = [s for s in self.steps() if s > step]
        if later and jax.process_index() == 0:
            for folder in map(self._folder, later):
                folder.rename(self._path / f"{why}_{int(time.time())}_{folder.name}")
        if later:
            if jax.process_count() > 1:
                from jax.experimental import multihost_utils

                multihost_utils.sync_global_devices("set_aside_after")
            self._manager.reload()

    def save(self, step: int, params: PyTree, rest: PyTree, meta: dict[str, Any]) -> None:
        """Starts a save and returns when the arrays are copied.

        Args:
            step: the global step.
            params: the parameters.
            rest: the other arrays.
            meta: JSON-able facts.

        Raises:
            Failed: this save could not start, or the one before it failed.
        """
        args = ocp.args.Composite(
            params=ocp.args.StandardSave(params),
            rest=ocp.args.StandardSave(rest),
            meta=ocp.args.JsonSave(meta),
        )
        self.wait()
        self._saving = step
        self._shapes = {"params": _shapes(params), "rest": _shapes(rest)}
        try:
            saved = self._manager.save(step, args=args)
        except Exception as e:
            raise self._failure(e) from e
        assert saved, f"step {step} is not after the checkpoints {self.steps()}"

    def _seal(self) -> None:
        """Checks that the arrays can be read back, and writes the digests.

        Orbax calls it when everything is written, before the checkpoint gets its final name.
        """
        if jax.process_index() == 0:
            assert self._saving is not None
            name = self._folder(self._saving).name  # may have a temporary suffix
            folder = next(p for p in self._path.iterdir() if p.name.startswith(name))
            for item, shapes in self._shapes.items():
                handler = ocp.PyTreeCheckpointHandler()
                found = _shapes(handler.metadata(epath.Path(folder / item)).tree)
                if found != shapes:
                    got = f"{len(found)} arrays of {item} that can be read back"
                    raise check.error(str(folder), got, f"the {len(shapes)} that were saved", "")
            digest.write(folder)

    def _failure(self, e: Exception) -> check.Failed:
        """Returns the error of a save: what could not be written, and which checkpoints are kept."""
        self._failed = True
        kept = [s for s in self.steps() if s != self._saving and self._folder(s).is_dir()]
        text = (
            f"the checkpoints of steps {kept} are kept" if kept else "there is no other checkpoint"
        )
        return check.Failed(
            f"{self._path}: got {_reason(e)} in saving step {self._saving}, expected a whole checkpoint; "
            f"{text}; remove the cause and repeat the command"
        )

    def meta(self, step: int) -> dict[str, Any]:
        return self._manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore()))[
            "meta"
        ]

    def restore(self, step: int, params: PyTree, rest: PyTree) -> tuple[PyTree, PyTree]:
        """Restores a step into the shapes and shardings of abstract trees, on any mesh.

        Args:
            step: the global step.
            params, rest: trees of jax.ShapeDtypeStruct with shardings.

        Returns:
            The two trees with their arrays.
        """
        args = ocp.args.Composite(
            params=ocp.args.StandardRestore(params), rest=ocp.args.StandardRestore(rest)
        )
        out = self._manager.restore(step, args=args)
        return out["params"], out["rest"]

    def params(self, step: int, teacher: str = "") -> PyTree:
        """Returns the parameters of the model, or of a teacher, as numpy arrays; needs no mesh, optimiser or model."""
        path = self._folder(step) / ("rest" if teacher else "params")
        with ocp.PyTreeCheckpointer() as reader:
            tree = reader.metadata(path).item_metadata.tree
            if teacher:
                tree = {"teachers": {teacher: tree["teachers"][teacher]}}
            args = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
            out = reader.restore(
                path, args=ocp.args.PyTreeRestore(tree, args, partial_restore=True)
            )
        return out["teachers"][teacher] if teacher else out

    def _folder(self, step: int) -> pathlib.Path:
        return self._path / f"step_{step:09d}"

    def wait(self) -> None:
        """Waits until the last save is on disk; raises `Failed` if it failed."""
        try:
            self._manager.wait_until_finished()
        except Exception as e:
            raise self._failure(e) from e
        if self._saving is not None and self._saved != self._saving:
            self._saved = self._saving
            self._on_saved(self._saving)

    def look(self) -> None:
        """Raises `Failed` if a save has failed already; does not wait."""
        if (
            jax.process_count() == 1 and self._saving != self._saved
        ):  # several processes agree in `wait`
            if not self._manager.is_saving_in_progress():
                self.wait()

    def close(self) -> None:
        """Waits for the last save; raises `Failed` if it failed, unless that was raised before."""
        if not self._failed:
            self.wait()
            self._manager.close()


def check_path(where: str, path: pathlib.Path) -> None:
    """Raises UserError for a directory whose name Orbax or TensorStore would misread."""
    text = str(path)
    try:
        text.encode()
    except UnicodeEncodeError:
        raise check.error(where, ascii(text), "a path in UTF-8", "rename the directory") from None
    if "\\" in text:
        raise check.error(where, repr(text), "a path without backslashes", "rename the directory")
    url = re.search(r"(^|/)(gs|s3|az|hf|file|https?|hdfs):/", text)
    if url or text.startswith(("/gs/", "/s3/", "/az/", "/hf/")):
        do = "mount the bucket in a local directory and give that path"
        raise check.error(where, repr(text), "a directory of this machine", do)


def _glob(path: Any, pattern: str) -> Iterator[Any]:
    """`epath.Path.glob`, but without reading the directory's own name, such as `lr[1e-3]`, as a pattern."""
    if path._uri_scheme:  # not on this machine
        return _GLOB(path, pattern)
    return (epath.Path(str(p)) for p in pathlib.Path(os.fspath(path)).glob(pattern))


_GLOB, epath.gpath.PosixGPath.glob = epath.gpath.PosixGPath.glob, _glob  # type: ignore[method-assign]


def _shapes(tree: PyTree) -> list[tuple[Any, str]]:
    """Returns shape and type of every array, sorted, so that the order of containers does not matter."""
    arrays = [x for x in jax.tree.leaves(tree) if hasattr(x, "dtype")]
    return sorted((tuple(getattr(x, "shape", ())), np.dtype(x.dtype).name) for x in arrays)


def _reason(e: Exception) -> str:
    """Returns why a save failed, in a few words."""
    if isinstance(e, OSError) and e.strerror:
        return e.strerror
    if found := re.search(r"os_error_code='(\d+)'", str(e)):  # TensorStore's
        return os.strerror(int(found.group(1)))
    return f"{type(e).__name__} ({str(e).splitlines()[0][:160] if str(e) else ''})"


def _what_to_do(directory: pathlib.Path) -> str:
    """Returns advice about missing checkpoints; `saved.json` tells whether the run had saved any."""
    gone = (directory.parent / "saved.json").exists()
    return "restore its checkpoints" if gone else "train first, or correct the path"


def select(checkpoints: Checkpoints, workdir: str | pathlib.Path, step: int | None) -> int:
    """Returns the wanted step, or the newest whole one.

    Args:
        checkpoints: to choose from.
        workdir: of the run, for errors.
        step: the wanted one; None: the newest.

    Raises:
        UserError: there is no such checkpoint, or it is not whole.
    """
    steps = checkpoints.steps()
    if not steps or step not in (None, *steps):
        got = "no checkpoint" if not steps else f"no step {step}"
        expected = f"one of steps {steps}" if steps else "a saved step"
        do = f"give --step {steps[-1]}" if steps else _what_to_do(checkpoints.path)
        raise check.error(str(workdir), got, expected, do)
    if step is None:
        step = checkpoints.newest()
        assert step is not None
    elif problem := checkpoints.problem(step):
        do = f"use another of steps {steps}"
        raise check.error(f"{workdir}, step {step}", problem, "a whole checkpoint", do)
    return step
