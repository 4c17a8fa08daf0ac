"""The run in one paragraph and a row of tiles: its last evaluation, its size, its speed.

Retrieval's R@k are fractions of queries; chance is k / num where the evaluation says how many
candidates it had.
"""

import dataclasses
import math
import re
from collections import Counter
from html import escape

import numpy as np

from vlp.report import curves, load, numbers, svg

_WORDS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


@dataclasses.dataclass(frozen=True)
class Tile:
    """One figure of the summary: a label, the value, what to compare it to, its course."""

    label: str
    value: str
    note: str = ""
    course: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(0))


def paragraph(run: load.Run) -> str:
    """Returns the summary as one <p>."""
    words = [_size(run)]
    words += [_retrieval(row) for row in run.latest().values() if _is_retrieval(row)]
    words += [_captions(row) for row in run.latest().values() if "caption_loss" in row.values]
    if not run.evals:
        words.append("It was not evaluated.")
    words.append(_speed(run))
    return f'<p class="lead">{" ".join(word for word in words if word)}</p>'


def tiles(run: load.Run) -> str:
    """Returns the tiles as one <ul>; only those that the run has numbers for."""
    latest = list(run.latest().values())
    retrieval = next((row for row in latest if _is_retrieval(row)), None)
    captions = next((row for row in latest if "caption_loss" in row.values), None)
    found = _size_tiles(run)
    if retrieval:
        found += _recall_tile(run, retrieval, "i2t") + _recall_tile(run, retrieval, "t2i")
    found += _caption_tiles(run, captions) if captions else []
    found += _speed_tiles(run)
    items = [
        f'<li><span class="what">{escape(t.label)}</span><b>{escape(t.value)}</b>'
        f'<span class="than">{escape(t.note)}</span>{svg.spark(t.course)}</li>'
        for t in found
    ]
    return f'<ul class="tiles">{"".join(items)}</ul>'


def chance(row: load.Row, k: int) -> float | None:
    """Returns the R@k of a random ranking, None where the number of candidates is not known."""
    num = row.values.get("num", math.nan)
    return min(1.0, k / num) if num > 0 and math.isfinite(num) else None


def devices(value: object) -> str:
    """Returns ["H100", "H100"] as "2 × H100"; anything else as it is."""
    if isinstance(value, list):
        return ", ".join(f"{n} × {name}" for name, n in Counter(map(str, value)).items())
    return "" if value is None else str(value)


# --- sentences


def _size(run: load.Run) -> str:
    last = (run.train or run.evals)[-1]
    names = list(dict.fromkeys(row.stage for row in run.train if row.stage))
    out = (
        f"<b>{escape(run.name)}</b> has seen <b>{numbers.si(float(last.samples))} samples</b> in "
        f"{numbers.count(last.step)} step{'s' * (last.step != 1)}"
    )
    if len(names) > 1:
        num = _WORDS[len(names)] if len(names) < len(_WORDS) else str(len(names))
        out += f", in {num} stages ({', then '.join(map(escape, names))})"
    if secs := _elapsed(run):
        out += f", in {numbers.duration(secs)}"
    return out + "."


def _retrieval(row: load.Row) -> str:
    i2t, t2i = _recalls(row, "i2t"), _recalls(row, "t2i")
    finds = []
    if i2t:
        finds.append(f"the right caption of an image first in <b>{_first(i2t)}</b> of cases")
        finds[-1] += _others(i2t)
    if t2i:
        finds.append(f"the right image of a caption first in <b>{_first(t2i)}</b>{_others(t2i)}")
    one = chance(row, 1)
    by_chance = f"; chance is {numbers.percent(one, 2)}" if one else ""
    return f"On {_where(row)} it ranks {', and '.join(finds)}{by_chance}."


def _captions(row: load.Row) -> str:
    true, other = row.values["caption_loss"], row.values.get("caption_loss_shuffled", math.nan)
    out = f"On {_where(row)} its caption loss is <b>{numbers.si(true)}</b>"
    if math.isfinite(other):
        gap = other - true
        reads = "it reads the image" if gap > 0.02 * abs(true) else "it hardly looks at the image"
        out += f" with the true image and {numbers.si(other)} with another one, so {reads}"
    if math.isfinite(exact := row.values.get("exact_match", math.nan)):
        out += f"; {numbers.percent(exact)} of generated captions are exact"
    return out + "."


def _speed(run: load.Run) -> str:
    rate, wait = _median(run, "time/examples_per_s"), _median(run, "time/data_wait_frac")
    on = devices(run.versions.get("devices"))
    if rate is None:
        return f"It ran on {escape(on)}." if on else ""
    out = f"Training went at {numbers.si(rate)} examples/s{' on ' + escape(on) if on else ''}"
    return out + (f" and waited for data {numbers.percent(wait)} of the time." if wait else ".")


def _where(row: load.Row) -> str:
    split = f"the {escape(row.split)} split" if row.split else "its data"
    num = row.values.get("num", math.nan)
    size = f", {numbers.count(int(num))} pairs" if num > 0 and math.isfinite(num) else ""
    return f"{split} ({escape(row.eval)}{size})"


def _first(recalls: dict[int, float]) -> str:
    return numbers.percent(next(iter(recalls.values())))


def _others(recalls: dict[int, float]) -> str:
    texts = [f"R@{k} {numbers.percent(v)}" for k, v in list(recalls.items())[1:]]
    return f" ({', '.join(texts)})" if texts else ""


# --- tiles


def _size_tiles(run: load.Run) -> list[Tile]:
    last = (run.train or run.evals)[-1]
    found = [
        Tile("samples seen", numbers.si(float(last.samples)), f"{numbers.count(last.step)} steps")
    ]
    _, loss = curves.column(run.train, "loss")
    if len(loss):
        found.append(Tile("training loss", numbers.si(float(loss[-1])), "last row", loss))
    return found


def _recall_tile(run: load.Run, row: load.Row, direction: str) -> list[Tile]:
    recalls = _recalls(row, direction)
    if not recalls:
        return []
    k = next(iter(recalls))
    one = chance(row, k)
    note = f"chance {numbers.percent(one, 2)}" if one else row.split
    name = f"{curves.LABELS[direction]} R@{k}"
    return [Tile(name, numbers.percent(recalls[k]), note, _course(run, row, f"{direction}/R@{k}"))]


def _caption_tiles(run: load.Run, row: load.Row) -> list[Tile]:
    true, other = row.values["caption_loss"], row.values.get("caption_loss_shuffled", math.nan)
    note = f"{numbers.si(other)} with another image" if math.isfinite(other) else row.split
    course = _course(run, row, "caption_loss")
    found = [Tile("caption loss", numbers.si(true), note, course)]
    if math.isfinite(exact := row.values.get("exact_match", math.nan)):
        course = _course(run, row, "exact_match")
        found.append(Tile("exact captions", numbers.percent(exact), row.split, course))
    return found


def _speed_tiles(run: load.Run) -> list[Tile]:
    found = []
    rate, wait = _median(run, "time/examples_per_s"), _median(run, "time/data_wait_frac")
    if rate is not None:
        note = f"{numbers.percent(wait)} waiting for data" if wait is not None else "median"
        course = curves.column(run.train, "time/examples_per_s")[1]
        found.append(Tile("examples / s", numbers.si(rate), note, course))
    if secs := _elapsed(run):
        found.append(Tile("time", numbers.duration(secs), devices(run.versions.get("devices"))))
    return found


# --- numbers


def _is_retrieval(row: load.Row) -> bool:
    return bool(_recalls(row, "i2t") or _recalls(row, "t2i"))


def _recalls(row: load.Row, direction: str) -> dict[int, float]:
    """Returns {1: …, 5: …, 10: …} of one direction."""
    pattern = re.compile(rf"{direction}/R@(\d+)")
    found = [(pattern.fullmatch(key), value) for key, value in row.values.items()]
    return dict(sorted((int(match[1]), value) for match, value in found if match))


def _course(run: load.Run, row: load.Row, key: str) -> np.ndarray:
    same = [r for r in run.evals if (r.eval, r.split) == (row.eval, row.split)]
    return curves.column(same, key)[1]


def _median(run: load.Run, key: str) -> float | None:
    _, y = curves.column(run.train, key)
    y = y[np.isfinite(y)]
    return float(np.median(y)) if len(y) else None


def _elapsed(run: load.Run) -> float:
    """Returns the seconds of training; a clock that a restart set back counts on."""
    _, secs = curves.column(run.train, "time/elapsed_s")
    secs = secs[np.isfinite(secs)]
    if not len(secs):
        return 0.0
    lost = secs[:-1][np.diff(secs) < 0].sum()
    return float(secs[-1] + lost)
