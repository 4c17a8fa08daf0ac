"""Copies of the metrics record for other tools. A sink follows metrics.jsonl and holds nothing of its own.

A start hands every sink the rows that are kept, so a step that a killed run had reached and lost shows up once: when
it is done again. A sink that is asked for later in a run has the whole run.
"""

from __future__ import annotations

import importlib.util
import math
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

from vlp.core import check


@runtime_checkable
class Sink(Protocol):
    def begin(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Takes over at these rows: all that the record holds now."""

    def write(self, row: Mapping[str, Any]) -> None: ...

    def flush(self) -> None: ...

    def close(self) -> None: ...


class TensorBoard:
    """Event files in workdir/tensorboard, by tensorboardX (no TensorFlow). Each start writes them anew."""

    def __init__(self, workdir: pathlib.Path, name: str):
        self._folder = workdir / "tensorboard"

    def begin(self, rows: Sequence[Mapping[str, Any]]) -> None:
        from tensorboardX import SummaryWriter

        for old in self._folder.glob("events.out.tfevents.*"):
            old.unlink()
        self._writer = SummaryWriter(str(self._folder))
        for row in rows:
            self.write(row)
        self.flush()

    def write(self, row: Mapping[str, Any]) -> None:
        for tag, value in scalars(row).items():
            self._writer.add_scalar(tag, value, row["step"])

    def flush(self) -> None:
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


SINKS = {"tensorboard": (TensorBoard, "tensorboardX", "vlp[tensorboard]")}


def scalars(row: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a row by tag: train/loss, retrieval/i2t/R_1 (TensorBoard's letters). NaN and infinities stay."""
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
    """Raises UserError for a sink that does not exist, or whose package is missing."""
    for name in names:
        if name not in SINKS:
            raise check.unknown("config.sinks", name, SINKS)
        _, package, extra = SINKS[name]
        if importlib.util.find_spec(package) is None:
            do = f"pip install '{extra}', or drop it"
            raise check.error("config.sinks", f"{name!r} without {package}", "the package", do)


def make(names: Sequence[str], workdir: pathlib.Path, run_name: str) -> list[Sink]:
    return [SINKS[name][0](workdir, run_name) for name in names]
