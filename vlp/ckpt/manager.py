"""Checkpoints of a run: written by Orbax, asynchronously and atomically, parameters apart from everything else.

A checkpoint holds two trees, `params` and `rest` (optimiser, counts, teachers, the objective's arrays), and `meta`:
position (step, stage, samples seen), config, tokenizer and versions. Data has no state: it is a function of the
samples seen. A checkpoint whose files have changed since they were written (digest.py) is skipped. Folders may be in a
bucket: nothing here renames or locks.
"""

from __future__ import annotations

import logging
import os
import re
import threading
import time
from collections.abc import Callable
from typing import Any

import jax
import orbax.checkpoint as ocp

from vlp.ckpt import buckets, digest, orbax_io, steps, together
from vlp.ckpt.keep import Keep
from vlp.ckpt.params import read_params
from vlp.ckpt.steps import ITEMS
from vlp.core import check, paths

log = logging.getLogger(__name__)
PyTree = Any


class Checkpoints:
    """The checkpoints of one workdir, by global step."""

    def __init__(
        self,
        directory: str | os.PathLike,
        keep: int = 2,
        create: bool = True,
        on_saved: Callable[[int], None] = lambda step: None,
        more: Keep = Keep(),
    ):
        """Opens the checkpoints.

        Args:
            directory: that holds them, here or in a bucket.
            keep: number of checkpoints to keep, the newest ones.
            create: make the directory; False: only read.
            on_saved: called with each saved step, once its checkpoint is known to be whole.
            more: which others to keep.

        Raises:
            UserError: the directory cannot be made or used, or, without `create`, does not exist.
        """
        self._path = paths.parse(str(directory), directory)
        check_path(str(directory), self._path)
        if not create and not paths.is_dir(self._path):
            raise check.error(
                str(directory),
                "no checkpoints",
                "a workdir of `vlp train`",
                _what_to_do(self._path),
            )
        options = ocp.CheckpointManagerOptions(
            create=create,
            read_only=not create,
            step_prefix="step",
            step_format_fixed_length=9,
            atomicity_options=buckets.ATOMICITY if paths.is_remote(self._path) else None,
            async_options=ocp.AsyncOptions(
                barrier_sync_fn=self._meet if jax.process_count() > 1 else None,
                post_finalization_callback=self._seal,
                # Otherwise threads wait five minutes for a folder that cannot be made.
                create_directories_asynchronously=False,
            ),
        )
        handlers: Any = {
            "params": orbax_io.handler(),
            "rest": orbax_io.handler(),
            "meta": ocp.JsonCheckpointHandler(),
        }
        try:
            self._manager = ocp.CheckpointManager(
                orbax_io.path(self._path), options=options, item_names=ITEMS, item_handlers=handlers
            )
        except OSError as e:
            do = "give another --workdir, or make this one writable"
            raise check.error(str(self._path), e.strerror, "a directory to write to", do) from e
        self._keep, self._more = keep, more
        self._saving: int | None = None
        self._began = 0.0
        self.save_secs: float | None = None  # of the last save, from its start to its last file
        self._shapes: dict[str, list[Any]] = {}
        self._failed = False
        self._saved: int | None = None  # the last step whose checkpoint is known to be whole
        self._on_saved = on_saved
        self._pruning: threading.Thread | None = None

    @property
    def path(self) -> paths.Path:
        return self._path

    def steps(self) -> list[int]:
        """Returns the steps that have a folder, as process 0 sees them; in a bucket, those that are whole."""
        return together.of_first(steps.listed(self._path))

    def newest(self) -> int | None:
        """Returns the newest step whose checkpoint is whole, None if there are none; logs the steps that it skips.

        If none has a manifest, the newest one with a commit marker and all items is taken.

        Raises:
            UserError: there are checkpoints, but none is whole.
        """
        known = self.steps()
        step, problems = steps.first_whole(reversed(known), self.problem)
        if step is not None:
            steps.say(problems, step, self._folder)
            return step
        if problems:
            told = "; ".join(f"{self._folder(s)}: {problem}" for s, problem in problems.items())
            do = "restore a copy, or move the directory away to start again"
            raise check.error(str(self._path), told, "a whole checkpoint", do)
        return None

    def problem(self, step: int) -> str:
        """Returns what is wrong with the files of a step, or "". All processes call it, and check a share each."""
        return together.problem(self._folder(step), ITEMS)

    def set_aside_after(self, step: int, why: str = "broken") -> None:
        """Renames later steps, so that they can be saved again: the broken ones that `newest` skipped, or those that
        a run went back over. why: first part of the new name."""
        later = [s for s in self.steps() if s > step]
        if later and jax.process_index() == 0:
            for folder in map(self._folder, later):
                aside = self._path / f"{why}_{int(time.time())}_{folder.name}"
                paths.rename_tree(folder, aside, last=digest.MARKER)
        if later:
            together.meet("set_aside_after")
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
            params=ocp.args.PyTreeSave(params),
            rest=ocp.args.PyTreeSave(rest),
            meta=ocp.args.JsonSave(meta),
        )
        self.wait()
        self._saving, self._began = step, time.monotonic()
        self._shapes = {"params": orbax_io.shapes(params), "rest": orbax_io.shapes(rest)}
        try:
            saved = self._manager.save(step, args=args)
        except Exception as e:
            raise self._failure(e) from e
        assert saved, f"step {step} is not after the checkpoints {steps.listed(self._path)}"

    def _meet(self, *, key: str, timeout_ms: int) -> None:
        """Orbax's barrier of all processes in a save. Before the first, each hashes the files that it has written."""
        process = jax.process_index()
        if "async_write_complete" in key and process:
            try:
                digest.write_part(self._unsealed(), process)
            except Exception as e:  # process 0 misses the part, and fails the save
                log.warning("process %d: digests of step %s: %s", process, self._saving, e)
        ocp.multihost.get_barrier_sync_fn()(key=key, timeout_ms=timeout_ms)

    def _seal(self) -> None:
        """Checks that what was written can be opened (structure, one array of each tree), and writes the digests.

        Orbax calls it on process 0 when everything is written, before the checkpoint counts.
        """
        assert self._saving is not None
        folder = self._unsealed()
        for item, shapes in self._shapes.items():
            metadata = orbax_io.metadata(folder / item)
            if (found := orbax_io.shapes(metadata)) != shapes:
                got = f"{len(found)} arrays of {item} that can be read back"
                raise check.error(str(folder), got, f"the {len(shapes)} that were saved", "")
            orbax_io.read_smallest(folder / item, metadata)
        digest.check_parts(folder, jax.process_count())
        digest.write(folder)
        if found := digest.unreadable(folder):
            raise check.error(str(folder / digest.FILE), found, "what was written", "")
        self.save_secs = time.monotonic() - self._began

    def _unsealed(self) -> paths.Path:
        """Returns the folder of the save in progress; its name may have a temporary suffix."""
        assert self._saving is not None
        name = self._folder(self._saving).name
        found = [p for p in paths.listing(self._path) if p.name.startswith(name)]
        return max(found, key=lambda p: len(p.name))

    def _failure(self, e: Exception) -> check.Failed:
        """Returns the error of a save: what could not be written, and which checkpoints are kept."""
        self._failed = True
        kept = [s for s in steps.listed(self._path) if s != self._saving]
        text = (
            f"the checkpoints of steps {kept} are kept" if kept else "there is no other checkpoint"
        )
        return check.Failed(
            f"{self._path}: got {_reason(e)} in saving step {self._saving}, expected a whole checkpoint; "
            f"{text}; remove the cause and repeat the command"
        )

    def meta(self, step: int) -> dict[str, Any]:
        return steps.meta(self._path, step)

    def restore(self, step: int, params: PyTree, rest: PyTree) -> tuple[PyTree, PyTree]:
        """Restores a step into the shapes and shardings of abstract trees, on any mesh.

        Args:
            step: the global step.
            params, rest: trees of jax.ShapeDtypeStruct with shardings.

        Returns:
            The two trees with their arrays.
        """
        out = self._manager.restore(
            step,
            args=ocp.args.Composite(
                params=ocp.args.PyTreeRestore(params, orbax_io.restore_args(params)),
                rest=ocp.args.PyTreeRestore(rest, orbax_io.restore_args(rest)),
            ),
        )
        return out["params"], out["rest"]

    def params(self, step: int, teacher: str = "") -> PyTree:
        """Returns the parameters of the model, or of a teacher, as numpy arrays; needs no mesh, optimiser or model."""
        return read_params(self._folder(step), teacher)

    def _folder(self, step: int) -> paths.Path:
        return steps.folder(self._path, step)

    def wait(self) -> None:
        """Waits until the last save is on disk; raises `Failed` if it failed."""
        try:
            self._manager.wait_until_finished()
        except Exception as e:
            raise self._failure(e) from e
        if self._saving is not None and self._saved != self._saving:
            self._saved = self._saving
            self._on_saved(self._saving)
            self._prune()

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
        if self._pruning:
            self._pruning.join()

    def _prune(self) -> None:
        """Starts to delete, on process 0, the checkpoints that no rule keeps."""
        if jax.process_index() == 0:
            if self._pruning:
                self._pruning.join()
            self._pruning = threading.Thread(target=self._delete, name="vlp-prune")
            self._pruning.start()

    def _delete(self) -> None:
        folder = self._path
        try:
            for step in steps.not_kept(self._path, self._keep, self._more):
                folder = self._folder(step)
                steps.remove(folder)
        except (OSError, check.Failed) as e:  # the next save tries again
            log.warning(
                "%s: not deleted (%s)", folder, getattr(e, "strerror", None) or check.line(e)
            )


def check_path(where: str, path: paths.Path) -> None:
    """Raises UserError for a local directory whose name Orbax or TensorStore would misread."""
    if paths.is_remote(path):  # `core.paths.parse` has checked it
        return
    text = str(path)
    try:
        text.encode()
    except UnicodeEncodeError:
        raise check.error(where, ascii(text), "a path in UTF-8", "rename the directory") from None
    if "\\" in text:
        raise check.error(where, repr(text), "a path without backslashes", "rename the directory")
    url = re.search(r"(^|/)(gs|s3|az|hf|file|https?|hdfs):/", text)
    if url or text.startswith(("/gs/", "/s3/", "/az/", "/hf/")):
        do = "rename the directory, or give the address of a bucket as gs://… or s3://…"
        raise check.error(where, repr(text), "a directory whose name is not an address", do)


def _reason(e: Exception) -> str:
    """Returns why a save failed, in a few words."""
    if isinstance(e, OSError) and e.strerror:
        return e.strerror
    if found := re.search(r"os_error_code='(\d+)'", str(e)):  # TensorStore's
        return os.strerror(int(found.group(1)))
    return f"{type(e).__name__} ({str(e).splitlines()[0][:160] if str(e) else ''})"


def _what_to_do(directory: paths.Path) -> str:
    """Returns advice about missing checkpoints; `saved.json` tells whether the run had saved any."""
    gone = paths.exists(directory.parent / "saved.json")
    return "restore its checkpoints" if gone else "train first, or correct the path"


def select(checkpoints: Checkpoints, workdir: str | os.PathLike, step: int | None) -> int:
    """Returns the wanted step, or the newest whole one.

    Args:
        checkpoints: to choose from.
        workdir: of the run, for errors.
        step: the wanted one; None: the newest.

    Raises:
        UserError: there is no such checkpoint, or it is not whole.
    """
    known = checkpoints.steps()
    if not known or step not in (None, *known):
        got = "no checkpoint" if not known else f"no step {step}"
        expected = f"one of steps {known}" if known else "a saved step"
        do = f"give --step {known[-1]}" if known else _what_to_do(checkpoints.path)
        raise check.error(str(workdir), got, expected, do)
    if step is None:
        step = checkpoints.newest()
        assert step is not None
    elif (problem := checkpoints.problem(step)) == digest.UNLISTED:
        log.warning("%s, step %d: %s; its files cannot be checked", workdir, step, problem)
    elif problem:
        do = f"use another of steps {known}"
        raise check.error(f"{workdir}, step {step}", problem, "a whole checkpoint", do)
    return step
