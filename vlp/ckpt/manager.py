"""Checkpoints of a run: Orbax, asynchronous, atomic; parameters apart from everything else.

A checkpoint holds two trees, `params` and `rest` (optimiser, counts, teachers, the objective's arrays), and `meta`:
position (step, stage, samples seen), the config, tokenizer and versions. Data needs no state: it is a function of the
samples seen. A checkpoint whose files are not as they were written (digest.py) is passed over.
"""

from __future__ import annotations

import logging
import pathlib
import time
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from vlp.ckpt import digest
from vlp.core import check

log = logging.getLogger(__name__)
PyTree = Any
ITEMS = ("params", "rest", "meta")


class Checkpoints:
    """The checkpoints of one workdir, by global step."""

    def __init__(self, directory: str | pathlib.Path, keep: int = 2, create: bool = True):
        self._path = pathlib.Path(directory).absolute()
        if not create and not self._path.is_dir():
            raise check.error(
                str(directory),
                "no checkpoints",
                "a workdir of `vlp train`",
                "train first, or check it",
            )
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep,
            create=create,
            read_only=not create,
            step_prefix="step",
            step_format_fixed_length=9,
            async_options=ocp.AsyncOptions(post_finalization_callback=self._seal),
        )
        self._manager = ocp.CheckpointManager(self._path, options=options, item_names=ITEMS)
        self._saving = -1

    def steps(self) -> list[int]:
        return sorted(self._manager.all_steps())

    def newest(self) -> int | None:
        """The newest step that is whole; logs those passed over. None: there is no step at all."""
        problems = []
        for step in reversed(self.steps()):
            if not (problem := self.problem(step)):
                for broken in problems:
                    log.warning("%s; taking step %d instead", broken, step)
                return step
            problems.append(f"{self._folder(step)}: {problem}")
        if problems:
            do = "bring back a copy, or move the directory away to start again"
            raise check.error(str(self._path), "; ".join(problems), "a whole checkpoint", do)
        return None

    def problem(self, step: int) -> str:
        """What is wrong with a step's files, or ""; process 0 looks."""
        found = ""
        if jax.process_index() == 0:
            found = digest.problem(self._folder(step), ITEMS)
        if jax.process_count() > 1:
            from jax.experimental import multihost_utils

            if multihost_utils.broadcast_one_to_all(np.int32(bool(found))):
                return found or "broken files (process 0 says which)"
        return found

    def set_aside_after(self, step: int) -> None:
        """Renames later steps (the broken ones that `newest` passed over), so that they can be saved anew."""
        later = [s for s in self.steps() if s > step]
        if later and jax.process_index() == 0:
            for folder in map(self._folder, later):
                folder.rename(self._path / f"broken_{int(time.time())}_{folder.name}")
        if later:
            if jax.process_count() > 1:
                from jax.experimental import multihost_utils

                multihost_utils.sync_global_devices("set_aside_after")
            self._manager.reload()

    def save(self, step: int, params: PyTree, rest: PyTree, meta: dict[str, Any]) -> None:
        """Starts a save and returns once the arrays are copied; raises here if the save before it failed."""
        args = ocp.args.Composite(
            params=ocp.args.StandardSave(params),
            rest=ocp.args.StandardSave(rest),
            meta=ocp.args.JsonSave(meta),
        )
        self.wait()
        self._saving = step
        saved = self._manager.save(step, args=args)
        assert saved, f"step {step} is behind the checkpoints {self.steps()}"

    def _seal(self) -> None:
        """Called by Orbax once everything is written and before the checkpoint gets its name."""
        if jax.process_index() == 0:
            name = self._folder(self._saving).name
            digest.write(next(self._path.glob(f"{name}*")))  # here or under a temporary name

    def meta(self, step: int) -> dict[str, Any]:
        return self._manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore()))[
            "meta"
        ]

    def restore(self, step: int, params: PyTree, rest: PyTree) -> tuple[PyTree, PyTree]:
        """Restores into the shapes and shardings of abstract trees (any mesh)."""
        args = ocp.args.Composite(
            params=ocp.args.StandardRestore(params), rest=ocp.args.StandardRestore(rest)
        )
        out = self._manager.restore(step, args=args)
        return out["params"], out["rest"]

    def params(self, step: int, teacher: str = "") -> PyTree:
        """The parameters (or a teacher's) alone, as numpy arrays: needs no mesh, no optimiser, no model."""
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
        """Returns when the last save is on disk; raises if it failed."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        self._manager.wait_until_finished()
        self._manager.close()


def select(checkpoints: Checkpoints, workdir: str | pathlib.Path, step: int | None) -> int:
    """The wanted step, or the newest whole one; raises UserError if there is none."""
    steps = checkpoints.steps()
    if not steps or step not in (None, *steps):
        got = "no checkpoint" if not steps else f"no step {step}"
        expected = f"one of steps {steps}" if steps else "a saved step"
        do = "take one of them" if steps else "train first"
        raise check.error(str(workdir), got, expected, do)
    if step is None:
        step = checkpoints.newest()
        assert step is not None
    elif problem := checkpoints.problem(step):
        do = f"take another of steps {steps}"
        raise check.error(f"{workdir}, step {step}", problem, "a whole checkpoint", do)
    return step
