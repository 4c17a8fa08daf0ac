"""Sinks: copies of metrics.jsonl for other tools. A sink has no state.

Each start gives every sink all rows that are kept. So a step that a killed run lost and did again appears once, and a
sink that is added at a restart has the whole run.
"""

from __future__ import annotations

import importlib.util
import math
import os
import pathlib
import re
import uuid
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

from vlp.core import check, paths
from vlp.runtime.mirror import Mirror


@runtime_checkable
class Sink(Protocol):
    def begin(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Starts with these rows: all of metrics.jsonl."""

    def write(self, row: Mapping[str, Any]) -> None: ...

    def flush(self) -> None: ...

    def close(self) -> None: ...


class TensorBoard:
    """Event files in workdir/tensorboard, by tensorboardX (no TensorFlow). Each start rewrites them."""

    def __init__(self, workdir: paths.Path, config: Mapping[str, Any]):
        self._folder = workdir / "tensorboard"

    def begin(self, rows: Sequence[Mapping[str, Any]]) -> None:
        from tensorboardX import SummaryWriter

        _remove_events(self._folder)
        self._mirror = Mirror(self._folder)
        self._writer = SummaryWriter(str(self._mirror.local))
        for row in rows:
            self.write(row)
        self.flush()

    def write(self, row: Mapping[str, Any]) -> None:
        for tag, value in scalars(row).items():
            self._writer.add_scalar(tag, value, row["step"])

    def flush(self) -> None:
        self._writer.flush()
        self._mirror.push()

    def close(self) -> None:
        self._writer.close()
        self._mirror.close()


class Clu:
    """clu.metric_writers' default writer in workdir/clu: event files, by TensorFlow. Each start rewrites them."""

    def __init__(self, workdir: paths.Path, config: Mapping[str, Any]):
        self._folder = workdir / "clu"

    def begin(self, rows: Sequence[Mapping[str, Any]]) -> None:
        from clu import metric_writers

        _remove_events(self._folder)
        self._mirror = Mirror(self._folder)
        self._writer = metric_writers.create_default_writer(str(self._mirror.local))
        for row in rows:
            self.write(row)
        self.flush()

    def write(self, row: Mapping[str, Any]) -> None:
        self._writer.write_scalars(row["step"], scalars(row))

    def flush(self) -> None:
        self._writer.flush()
        self._mirror.push()

    def close(self) -> None:
        self._writer.close()
        self._mirror.close()


class WandB:
    """A Weights & Biases run. Its id is in workdir/wandb/id; project and mode are wandb's own settings.

    Online, a start sends the rows after the last step that the server has; earlier rows would be the same, since
    restarts do not change the numbers. With WANDB_MODE=offline each start rewrites the whole run for `wandb sync`.
    """

    def __init__(self, workdir: paths.Path, config: Mapping[str, Any]):
        self._workdir, self._config = workdir, config

    def begin(self, rows: Sequence[Mapping[str, Any]]) -> None:
        import wandb

        folder = self._workdir / "wandb"
        if not paths.exists(folder / "id"):
            paths.write(folder / "id", uuid.uuid4().hex[:12].encode())
        name = paths.read(folder / "id").decode()
        self._mirror = Mirror(folder)  # wandb writes into a folder "wandb" of the one it is given
        settings = wandb.Settings(console="off")
        try:
            self._run = wandb.init(
                project=os.environ.get("WANDB_PROJECT", "vlp"), name=self._config["name"],
                id=name, resume="allow", dir=str(self._mirror.local.parent), config=dict(self._config),
                settings=settings,
            )  # fmt: skip
        except wandb.Error as error:
            got, do = str(error).splitlines()[0], "`wandb login`, or set WANDB_MODE=offline"
            raise check.error(
                "config.sinks", f"wandb: {got}", "a server that answers", do
            ) from None
        if self._run.offline:
            now = pathlib.Path(self._run.dir).parent.name
            for old in paths.listing(folder):
                if re.fullmatch(rf"offline-run-.*-{name}", old.name) and old.name != now:
                    paths.remove_tree(old)
        self._first = self._run.step
        for row in rows:
            self.write(row)

    def write(self, row: Mapping[str, Any]) -> None:
        if row["step"] >= self._first:
            self._run.log(scalars(row), step=row["step"])

    def flush(self) -> None:
        """Wandb's own process writes continuously."""
        self._mirror.push()

    def close(self) -> None:
        self._run.finish()
        self._mirror.close()


SINKS = {  # name → class, the packages it needs, the extra that installs them
    "tensorboard": (TensorBoard, ("tensorboardX",), "vlp[tensorboard]"),
    "clu": (Clu, ("tensorflow", "tensorboard"), "vlp[tf]"),
    "wandb": (WandB, ("wandb",), "vlp[wandb]"),
}


def _remove_events(folder: paths.Path) -> None:
    for old in paths.listing(folder):
        if old.name.startswith("events.out.tfevents."):
            paths.remove(old)


def scalars(row: Mapping[str, Any]) -> dict[str, float]:
    """Returns a row's numbers (NaN and infinities, too) by tag: train/loss, retrieval/i2t/R_1 (TensorBoard's)."""
    group = row["eval"] if row["kind"] == "eval" else row["kind"]
    out = {}
    for key, value in row.items():
        if key in ("step", "kind", "stage", "eval", "split", "fingerprint"):
            continue
        if isinstance(value, str):
            value = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}.get(value)
        if isinstance(value, bool | int | float):
            out[re.sub(r"[^-/\w.]", "_", f"{group}/{key}")] = float(value)
    return out


def check_sinks(names: Sequence[str]) -> None:
    """Raises UserError for an unknown sink, and for one whose package is missing."""
    for name in names:
        if name not in SINKS:
            raise check.unknown("config.sinks", name, SINKS)
        _, packages, extra = SINKS[name]
        for package in packages:
            if importlib.util.find_spec(package) is None:
                do = f"pip install '{extra}', or drop it"
                raise check.error("config.sinks", f"{name!r} without {package}", "the package", do)


def make(names: Sequence[str], workdir: paths.Path, config: Mapping[str, Any]) -> list[Sink]:
    return [SINKS[name][0](workdir, config) for name in names]
