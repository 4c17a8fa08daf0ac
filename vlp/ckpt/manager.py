"""Checkpoints of a run: Orbax, asynchronous, atomic; parameters apart from everything else.

A checkpoint holds two trees, `params` and `rest` (optimiser, counts, teachers, the objective's arrays), and `meta`:
position (step, stage, samples seen), the config, tokenizer and versions. Data needs no state: it is a function of the
samples seen.
"""

from __future__ import annotations

import pathlib
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from vlp.core import check

PyTree = Any


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
        )
        self._manager = ocp.CheckpointManager(
            self._path, options=options, item_names=("params", "rest", "meta")
        )

    def steps(self) -> list[int]:
        return sorted(self._manager.all_steps())

    def latest(self) -> int | None:
        return self._manager.latest_step()

    def save(self, step: int, params: PyTree, rest: PyTree, meta: dict[str, Any]) -> None:
        """Starts a save and returns once the arrays are copied; raises here if the save before it failed."""
        args = ocp.args.Composite(
            params=ocp.args.StandardSave(params),
            rest=ocp.args.StandardSave(rest),
            meta=ocp.args.JsonSave(meta),
        )
        self._manager.save(step, args=args)

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

    def params(self, step: int) -> PyTree:
        """The parameters alone, as numpy arrays: needs no mesh, no optimiser, no model."""
        path = self._path / f"step_{step:09d}" / "params"
        with ocp.PyTreeCheckpointer() as reader:
            tree = reader.metadata(path).item_metadata.tree
            args = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
            return reader.restore(path, restore_args=args)

    def wait(self) -> None:
        """Returns when the last save is on disk; raises if it failed."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        self._manager.wait_until_finished()
        self._manager.close()


def select(checkpoints: Checkpoints, workdir: str | pathlib.Path, step: int | None) -> int:
    """The wanted step, or the newest; raises UserError if there is none."""
    steps = checkpoints.steps()
    if not steps or (step is not None and step not in steps):
        got = "no checkpoint" if not steps else f"no step {step}"
        raise check.error(
            str(workdir), got, f"one of steps {steps}" if steps else "a saved step", "train first"
        )
    return steps[-1] if step is None else step
