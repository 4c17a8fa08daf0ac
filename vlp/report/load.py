"""Reads a workdir into a `Run`: rows of numbers, artefacts, config, versions.

Nothing here draws. A file that is missing or broken (a half-written last line, truncated JSON) is left out, and the
report says so; only metrics.jsonl must be there. The size of a file is checked before it is read, and a link that
leaves the workdir is not followed.
"""

import dataclasses
import io
import json
import math
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeGuard

from vlp.core import appended, check, paths
from vlp.report import numbers

# Far more than runs write. What exceeds a limit is left out, and one line of the report says so.
MAX_METRICS_BYTES = 128 << 20
MAX_LINE_BYTES = 1 << 20
MAX_NUMBERS = 10_000_000
MAX_KEYS = 400
MAX_EVALS = 60
MAX_JSON_BYTES = 8 << 20
MAX_ARTEFACT_BYTES = 96 << 20  # of all files of evals/ together
MAX_ARTEFACTS = 100
MAX_DEPTH = 40
_HUGE = 1e100

# Metrics that JSON cannot hold, as they are written: in lower case, without sign.
_NOT_FINITE = {"nan": math.nan, "inf": math.inf, "infinity": math.inf}


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of metrics.jsonl: its place in the run and its numbers (NaN for null)."""

    step: int
    samples: int
    stage: str
    values: dict[str, float]
    eval: str = ""
    split: str = ""
    data: str = ""  # fingerprint of the data that was evaluated on


@dataclasses.dataclass(frozen=True)
class Run:
    """The content of one workdir; `train` and `evals` are in order of step."""

    name: str
    path: paths.Path
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


def load(workdir: paths.Path) -> Run:
    """Reads one workdir.

    Raises:
        UserError: the folder or a readable row of metrics is missing.
    """
    if not paths.is_dir(workdir):
        do = "give the folder that `vlp train --workdir` wrote"
        raise check.error("report.workdir", f"{str(workdir)!r}", "an existing folder", do)
    notes: list[str] = []
    rows = _rows(workdir, notes)
    config = _json(workdir, "config.json", MAX_JSON_BYTES, notes)
    versions = _json(workdir, "versions.json", MAX_JSON_BYTES, notes)
    return Run(
        name=str(config.get("name") or folder_name(workdir)),
        path=workdir,
        train=tuple(row for row in rows if not row.eval),
        evals=tuple(row for row in rows if row.eval),
        artefacts=_artefacts(workdir, notes),
        config=config,
        versions=versions,
        attribution=tuple(dict.fromkeys(_attribution([config, versions]))),
        notes=tuple(notes),
    )


def folder_name(workdir: paths.Path) -> str:
    """Returns the name of a workdir's folder, also for "." and for a link."""
    return (workdir if paths.is_remote(workdir) else Path(workdir).resolve()).name


def _unreadable(workdir: paths.Path, name: str, most: int) -> str:
    """Returns why a file of the workdir must not be read, "" if it may be.

    A workdir may come from another person: a link in it must not bring a private file of the reader onto the page.

    Args:
        workdir: the folder.
        name: of the file in it.
        most: bytes that it may have.

    Raises:
        FileNotFoundError: there is no such file.
    """
    if paths.is_remote(workdir):  # a store has no links
        size = paths.size(workdir / name)
        return "" if size <= most else f"a file of {numbers.si(float(size))} bytes"
    path = Path(workdir) / name
    try:
        if not path.resolve().is_relative_to(Path(workdir).resolve()):
            return "a link to outside the workdir"
        info = path.stat()
    except RuntimeError:  # Python 3.11 on links in a circle
        return "a link to itself"
    if not stat.S_ISREG(info.st_mode):
        return "not a regular file"
    if info.st_size > most:
        return f"a file of {numbers.si(float(info.st_size))} bytes"
    return ""


# --- metrics


@dataclasses.dataclass(frozen=True)
class _Line:
    """A row as read: keys whose value is text, whether a value is broken, and whether keys were left out."""

    row: Row
    texts: frozenset[str]
    broken: bool
    cut: bool


def _rows(workdir: paths.Path, notes: list[str]) -> list[Row]:
    """Reads metrics.jsonl. Of several rows about one step the last wins: a resumed run repeats some.

    A damaged row never replaces a good one; its readable values are used only if there is no other row.
    """
    where, do = "report.workdir", "train first, or give another folder"
    path = workdir / "metrics.jsonl"
    try:
        for part in appended.parts(path):
            problem = _unreadable(workdir, part.name, MAX_METRICS_BYTES)
            if not problem:
                continue
            got = f"{str(path)!r}, {problem}"
            expected = (
                f"a file in the workdir of up to {numbers.si(float(MAX_METRICS_BYTES))} bytes"
            )
            raise check.error(where, got, expected, "copy the files to show into a new folder")
        total, lines, cut = _lines(path)
    except FileNotFoundError:
        raise check.error(where, f"no metrics.jsonl in {str(workdir)!r}", "one", do) from None
    except OSError as e:
        raise check.error(where, f"{str(path)!r} ({e})", "a readable file", do) from e
    numeric: dict[str, set[str]] = {}
    for line in lines:
        numeric.setdefault(line.row.eval, set()).update(line.row.values)
    damaged = [line.broken or bool(line.texts & numeric[line.row.eval]) for line in lines]
    whole, partly = (
        {(x.row.eval, x.row.split, x.row.step): x.row for x, d in zip(lines, damaged) if d == part}
        for part in (False, True)
    )
    partly = {key: row for key, row in partly.items() if key not in whole}
    rows = partly | whole
    lost = total - damaged.count(False) - len(partly)
    if not rows:
        got = f"{total} lines and no readable row"
        raise check.error(str(path), got, "at least one row", do)
    if lost:
        notes.append(f"metrics.jsonl: {lost} of {total} lines could not be read and were skipped")
    if partly:
        notes.append(f"metrics.jsonl: {partly} of {total} lines could be read in part only")
    if cut:
        notes.append(f"metrics.jsonl: only the first {MAX_KEYS} names of metrics are shown")
    kinds = list(dict.fromkeys((e, split) for e, split, _ in rows if e))
    if len(kinds) > MAX_EVALS:
        notes.append(f"metrics.jsonl: only the first {MAX_EVALS} of {len(kinds)} evaluations shown")
    hidden = set(kinds[MAX_EVALS:])
    shown = [row for row in rows.values() if (row.eval, row.split) not in hidden]
    return sorted(shown, key=lambda row: row.step)


def _lines(path: paths.Path) -> tuple[int, list[_Line], bool]:
    """Returns the number of lines that are not empty, the rows, and whether metrics were left out."""
    total, size, found = 0, 0, []
    names: dict[str, str] = {}
    cut = False
    for data in _texts_of_lines(path):
        if not data.strip():
            continue
        total += 1
        line = _line(data, names)
        if line is None:
            total -= _is_note(data)
            continue
        cut = cut or line.cut
        found.append(line)
        size += 10 + len(line.row.values)
        if size > MAX_NUMBERS:
            got = f"more than {numbers.si(float(MAX_NUMBERS))} numbers"
            do = "copy the workdir and keep, for instance, every tenth line"
            raise check.error(str(path), got, "fewer", do)
    return total, found, cut


def _texts_of_lines(path: paths.Path) -> Iterator[bytes]:
    """Yields the lines of all parts of the file; b"[]" for one that is too long to be a row."""
    for part in appended.parts(path):
        with io.BytesIO(paths.read(part)) if paths.is_remote(part) else open(part, "rb") as file:
            while data := file.readline(MAX_LINE_BYTES):
                whole = data.endswith(b"\n") or len(data) < MAX_LINE_BYTES
                while not whole:
                    rest = file.readline(MAX_LINE_BYTES)
                    whole = rest.endswith(b"\n") or len(rest) < MAX_LINE_BYTES
                    data = b"[]"
                yield data


_TEXTS = ("stage", "eval", "split", "fingerprint")
_NAMES = {"step", "samples", "kind", *_TEXTS}


def _line(data: bytes, names: dict[str, str]) -> _Line | None:
    """Reads one line; None if it is not a row: not JSON, without a whole step, or without a number.

    names: of the metrics so far, up to MAX_KEYS; new ones are added. All rows share these strings.
    """
    try:
        raw = json.loads(data.decode("utf-8", "replace"))
    except (ValueError, RecursionError):
        return None
    if not isinstance(raw, dict) or raw.get("kind", "train") not in ("train", "eval"):
        return None
    step = raw.get("step")
    samples = raw.get("samples", step)
    if not _is_count(step) or not _is_count(samples):
        return None
    texts = {key: raw.get(key) for key in _TEXTS}
    if not all(isinstance(value, str | None) for value in texts.values()):
        return None
    is_eval = raw.get("kind") == "eval" or "eval" in raw
    values, lost, cut = {}, [], False
    for key in raw:
        if key in _NAMES:
            continue
        value = number(raw[key])
        if value is None:
            lost.append(key)
        elif key in names or len(names) < MAX_KEYS:
            values[names.setdefault(key, key)] = value
        else:
            cut = True
    if not values:
        return None
    words = frozenset(key for key in lost if isinstance(raw[key], str))
    row = Row(
        step=step,
        samples=samples,
        stage=texts["stage"] or "",
        values=values,
        eval=(texts["eval"] or "eval") if is_eval else "",
        split=(texts["split"] or "") if is_eval else "",
        data=(texts["fingerprint"] or "") if is_eval else "",
    )
    # A row of an evaluation may have text that describes it; a row of training has numbers only.
    return _Line(row, words, bool(lost) and not (is_eval and len(words) == len(lost)), cut)


def _is_note(data: bytes) -> bool:
    """Returns whether a line that is no row of training or evaluation is one of another kind that a run writes."""
    try:
        return json.loads(data)["kind"] in ("nonfinite", "rollback")
    except (ValueError, RecursionError, TypeError, KeyError):
        return False


def _is_count(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63


def number(value: object) -> float | None:
    """Returns a metric as a float: null and "NaN" are NaN, "-Infinity" is −inf, other text is None.

    Values over 1e100 become infinite and values under 1e-100 become zero, so that an axis can be computed.
    """
    if value is None:
        return math.nan
    if isinstance(value, bool | int | float):
        if abs(value) > _HUGE:
            return math.inf if value > 0 else -math.inf
        return float(value) if not abs(value) < 1 / _HUGE else 0.0
    if isinstance(value, str):
        size = _NOT_FINITE.get(value.strip().lower().lstrip("+-"))
        return -size if size is not None and value.strip().startswith("-") else size
    return None


# --- the other files


def _artefacts(workdir: paths.Path, notes: list[str]) -> dict[str, dict[str, Any]]:
    """Reads evals/<name>_<split>.json, keyed by the file's stem."""
    entries = paths.listing(workdir / "evals")
    names = [p.name for p in entries if p.suffix == ".json" and not p.name.startswith(".")]
    if len(names) > MAX_ARTEFACTS:
        notes.append(f"evals: only the first {MAX_ARTEFACTS} of {len(names)} files are shown")
    found, left = {}, MAX_ARTEFACT_BYTES
    for name in names[:MAX_ARTEFACTS]:
        if artefact := _json(workdir, f"evals/{name}", left, notes):
            found[name.removesuffix(".json")] = artefact
            left -= paths.size(workdir / "evals" / name)
    return found


def _json(workdir: paths.Path, name: str, most: int, notes: list[str]) -> dict[str, Any]:
    try:
        problem = _unreadable(workdir, name, most)
        value = {} if problem else json.loads(paths.read(workdir / name).decode("utf-8", "replace"))
    except FileNotFoundError:
        return {}
    except (ValueError, OSError, RecursionError) as e:
        problem, value = f"could not be read ({e})", {}
    if not problem and not isinstance(value, dict):
        problem = f"holds a {type(value).__name__}, not a table"
    if not problem and _is_deep(value):
        problem = f"is nested over {MAX_DEPTH} deep"
    if problem:
        notes.append(f"{name}: {problem}; left out")
        return {}
    return value


def _is_deep(value: object) -> bool:
    """Returns whether tables and lists are nested more than MAX_DEPTH deep."""
    level = [value]
    for _ in range(MAX_DEPTH):
        level = [
            item
            for box in level
            if isinstance(box, dict | list)
            for item in (box.values() if isinstance(box, dict) else box)
        ]
    return bool(level)


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
