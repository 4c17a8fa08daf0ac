"""Reads a workdir into a `Run`: rows of numbers, artefacts, config, versions.

Nothing here draws, and a file that is missing or broken (a half-written last line, a truncated
JSON) costs its own section and a note, never the report. Only metrics.jsonl must be there.
"""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

from vlp.core import check

# How metrics that JSON cannot hold are written, in lower case and without their sign.
_NOT_FINITE = {"nan": math.nan, "inf": math.inf, "infinity": math.inf}


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of metrics.jsonl: where in the run, and its numbers (NaN for null)."""

    step: int
    samples: int
    stage: str
    values: dict[str, float]
    eval: str = ""
    split: str = ""


@dataclasses.dataclass(frozen=True)
class Run:
    """All that a report knows of one workdir; `train` and `evals` are in order of step."""

    name: str
    path: Path
    train: tuple[Row, ...]
    evals: tuple[Row, ...]
    artefacts: dict[str, dict[str, Any]]
    config: dict[str, Any]
    versions: dict[str, Any]
    attribution: tuple[str, ...]
    notes: tuple[str, ...]

    def latest(self) -> dict[tuple[str, str], Row]:
        """Returns the last row of each (evaluation, split); the training split comes last."""
        last = {(row.eval, row.split): row for row in self.evals}
        return dict(sorted(last.items(), key=lambda item: item[0][1] == "train"))


def load(workdir: Path) -> Run:
    """Reads one workdir. Raises: UserError without the folder or a readable row of metrics."""
    workdir = Path(workdir)
    if not workdir.is_dir():
        do = "give the folder that `vlp train --workdir` wrote"
        raise check.error("report.workdir", f"{str(workdir)!r}", "an existing folder", do)
    notes: list[str] = []
    rows = _rows(workdir / "metrics.jsonl", notes)
    config = _json(workdir / "config.json", notes)
    versions = _json(workdir / "versions.json", notes)
    return Run(
        name=str(config.get("name") or workdir.resolve().name),
        path=workdir,
        train=tuple(row for row in rows if not row.eval),
        evals=tuple(row for row in rows if row.eval),
        artefacts=_artefacts(workdir / "evals", notes),
        config=config,
        versions=versions,
        attribution=tuple(dict.fromkeys(_attribution([config, versions]))),
        notes=tuple(notes),
    )


def _rows(path: Path, notes: list[str]) -> list[Row]:
    """Reads metrics.jsonl; of rows about one step the last wins (a resumed run repeats some)."""
    if not path.is_file():
        do = "train first, or give another folder"
        raise check.error("report.workdir", f"no metrics.jsonl in {str(path.parent)!r}", "one", do)
    lines = [line for line in path.read_text("utf-8", "replace").split("\n") if line.strip()]
    parsed = [_row(line) for line in lines]
    rows = {(row.eval, row.split, row.step): row for row in parsed if row is not None}
    if not rows:
        got = f"{len(lines)} lines and no readable row"
        raise check.error(str(path), got, "at least one row", "train first, or give another folder")
    if bad := parsed.count(None):
        notes.append(
            f"metrics.jsonl: {bad} of {len(lines)} lines could not be read and were skipped"
        )
    return sorted(rows.values(), key=lambda row: row.step)


def _row(line: str) -> Row | None:
    try:
        raw = json.loads(line)
        step = int(raw["step"])
        samples = int(raw.get("samples", step))
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError):
        return None
    is_eval = raw.get("kind") == "eval" or "eval" in raw
    values = {k: number(v) for k, v in raw.items() if k not in ("step", "samples")}
    return Row(
        step=step,
        samples=samples,
        stage=str(raw.get("stage") or ""),
        values={k: v for k, v in values.items() if v is not None},
        eval=str(raw.get("eval") or "eval") if is_eval else "",
        split=str(raw.get("split") or "") if is_eval else "",
    )


def number(value: object) -> float | None:
    """Returns a metric as a float: null and "NaN" are NaN, "-Infinity" −inf; other text is None."""
    if value is None:
        return math.nan
    if isinstance(value, bool | int | float):
        try:
            return float(value)
        except OverflowError:
            return math.inf if value > 0 else -math.inf
    if isinstance(value, str):
        size = _NOT_FINITE.get(value.strip().lower().lstrip("+-"))
        return -size if size is not None and value.strip().startswith("-") else size
    return None


def _artefacts(folder: Path, notes: list[str]) -> dict[str, dict[str, Any]]:
    """Reads evals/<name>_<split>.json, keyed by the file's stem."""
    found = {path.stem: _json(path, notes) for path in sorted(folder.glob("*.json"))}
    return {name: artefact for name, artefact in found.items() if artefact}


def _json(path: Path, notes: list[str]) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text("utf-8", "replace"))
    except FileNotFoundError:
        return {}
    except (ValueError, OSError, RecursionError) as e:
        notes.append(f"{path.name}: could not be read and was left out ({e})")
        return {}
    if not isinstance(value, dict):
        notes.append(f"{path.name}: holds a {type(value).__name__}, not a table; left out")
        return {}
    return value


def _attribution(value: object) -> list[str]:
    """Returns the text under every `attribution` key, however deep, in order."""
    if isinstance(value, list):
        return [text for item in value for text in _attribution(item)]
    if not isinstance(value, dict):
        return []
    found: list[str] = []
    for key, item in value.items():
        found += _texts(item) if key == "attribution" else _attribution(item)
    return found


def _texts(value: object) -> list[str]:
    if isinstance(value, dict):
        return [f"{key}: {text}" for key, item in value.items() for text in _texts(item)]
    if isinstance(value, list):
        return [text for item in value for text in _texts(item)]
    return [str(value)] if value else []
