"""The run in one paragraph and a row of figures: its last evaluation, its size, its speed.

The paragraph draws a conclusion only from enough steps and records, and from a difference beyond its standard error;
otherwise it gives the numbers alone.
"""

import math
import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from vlp.core import pages
from vlp.report import curves, load, names, numbers, svg

MIN_STEPS = 100  # of training, before a conclusion is drawn
MIN_RECORDS = 100  # of an evaluation
SURE = 2.0  # standard errors
READS = 0.02  # share of the caption loss that another image must add to it, to conclude that the model reads the image
_WORDS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


def sentences(run: load.Run) -> dict[str, Any]:
    """Returns the texts of templates/summary.html.j2; None for a sentence that the run has no numbers for."""
    last = (run.train or run.evals)[-1]
    retrieval, captions = _first(run, "i2t/R@1", "t2i/R@1"), _first(run, "caption_loss")
    return {
        "name": pages.visible(run.name, 200),
        "samples": numbers.si(float(last.samples)),
        "course": _course(run, last),
        "retrieval": retrieval and _retrieval(retrieval),
        "captions": captions and _captions(captions),
        "evaluated": bool(run.evals),
        "speed": _speed(run),
    }


def figures(run: load.Run) -> list[tuple[str, str, str, str]]:
    """Returns the figures in large type, as far as the run has numbers for them: label, value, note, curve."""
    last = (run.train or run.evals)[-1]
    found = [("samples seen", numbers.si(float(last.samples)), f"{numbers.count(last.step)} steps", "")]  # fmt: skip
    _, loss = curves.column(run.train, "loss")
    if len(loss):
        found.append(("training loss", numbers.short(float(loss[-1])), "last row", svg.spark(loss)))
    for key in ("i2t/R@1", "t2i/R@1", "accuracy", "caption_loss", "exact_match"):
        if row := _first(run, key):
            found.append(_figure(run, row, key))
    rate, wait = (median(run.train, f"time/{k}") for k in ("examples_per_s", "data_wait_frac"))
    if rate is not None:
        note = f"{numbers.percent(wait)} waiting for data" if wait is not None else "median"
        course = svg.spark(curves.column(run.train, "time/examples_per_s")[1])
        found.append(("examples / s", numbers.si(rate), note, course))
    if secs := seconds(run):
        found.append(("time", numbers.duration(secs), hardware(run.versions), ""))
    return found[:8]


def chance(row: load.Row, key: str) -> float | None:
    """Returns the chance level: k / candidates for R@k, k / classes for top-k accuracy; None if it is not known."""
    tail = key.rpartition("/")[2]
    if match := re.fullmatch(r"R@(\d{1,6})", tail, re.ASCII):
        k, num = int(match[1]), row.values.get("num", math.nan)
    elif tail in ("accuracy", "top1", "mean_per_class", "top5"):
        k, num = 5 if tail == "top5" else 1, row.values.get("num_classes", math.nan)
    else:
        return None
    return min(1.0, k / num) if num > 0 and math.isfinite(num) else None


def error(share: float, num: float) -> float:
    """Returns the standard error of a share of `num` independent records; NaN if it is not known."""
    if not (0 < share < 1 and num > 0 and math.isfinite(num)):
        return math.nan
    return math.sqrt(share * (1 - share) / num)


def hardware(versions: dict[str, object]) -> str:
    """Returns the devices of a run: "4 × TPU v5 lite", "CPU"; "" if versions.json names none."""
    device, num = versions.get("device"), versions.get("devices")
    if isinstance(num, list):
        return ", ".join(_times(n, name) for name, n in Counter(map(str, num)).items())
    if not isinstance(device, str):
        device = versions.get("platform")
    if not isinstance(device, str) or not device:
        return ""
    named = device.upper() if device.lower() in ("cpu", "gpu", "tpu") else device
    out = _times(num if isinstance(num, int) else 1, named)
    processes = versions.get("processes")
    if isinstance(processes, int) and processes > 1:
        out += f" in {numbers.count(processes)} processes"
    return out


def median(rows: Sequence[load.Row], key: str) -> float | None:
    """Returns the median of a metric over rows, None without a finite value."""
    _, y = curves.column(rows, key)
    y = y[np.isfinite(y)]
    return float(np.median(y)) if len(y) else None


def seconds(run: load.Run, step: int | None = None) -> float:
    """Returns the seconds of training up to a step, over restarts: each sets its clock back."""
    rows = [row for row in run.train if step is None or row.step <= step]
    _, secs = curves.column(rows, "time/elapsed_s")
    secs = secs[np.isfinite(secs)]
    if not len(secs):
        return 0.0
    return float(secs[-1] + secs[:-1][np.diff(secs) < 0].sum())


# --- sentences


def _course(run: load.Run, last: load.Row) -> str:
    stages = list(dict.fromkeys(row.stage for row in run.train if row.stage))
    out = f"{numbers.count(last.step)} step{'s' * (last.step != 1)}"
    if 1 < len(stages) < len(_WORDS):
        names = ", then ".join(pages.visible(stage, 80) for stage in stages)
        out += f", in {_WORDS[len(stages)]} stages ({names})"
    elif len(stages) > 1:
        out += f", in {len(stages)} stages"
    secs = seconds(run)
    return out + (f", in {numbers.duration(secs)}" if secs else "")


def _retrieval(row: load.Row) -> dict[str, Any]:
    ways = (("i2t/R@1", "caption of an image"), ("t2i/R@1", "image of a caption"))
    first = [(what, numbers.percent(row.values[k])) for k, what in ways if k in row.values]
    one = chance(row, "R@1")
    by_chance = numbers.percent(one, 2) if one else ""
    return {"where": _where(row), "first": first, "chance": by_chance}


def _captions(row: load.Row) -> dict[str, str]:
    true, other = row.values["caption_loss"], row.values.get("caption_loss_shuffled", math.nan)
    more = ""
    if math.isfinite(other):
        more = f" with the true image and {numbers.si(other)} with another one{_conclusion(row)}"
    return {"where": _where(row), "loss": numbers.si(true), "more": more}


def _conclusion(row: load.Row) -> str:
    """Returns whether the captions depend on the image, in words; "" if the numbers are not sufficient."""
    true, other = row.values["caption_loss"], row.values["caption_loss_shuffled"]
    margin = SURE * row.values.get("caption_gap_se", math.nan)
    enough = row.step >= MIN_STEPS and row.values.get("num", 0) >= MIN_RECORDS
    if not (enough and math.isfinite(margin) and math.isfinite(true)):
        return ""
    gap, least = other - true, READS * abs(true)
    if gap - margin > 0 and gap > least:
        return ", so it reads the image"
    return ", so it hardly reads the image" if gap + margin < least else ""


def _speed(run: load.Run) -> str:
    rate, wait = (median(run.train, f"time/{k}") for k in ("examples_per_s", "data_wait_frac"))
    on = hardware(run.versions)
    if on and not on[0].isdigit():
        on = ("an " if on[0] in "AEIONaeiou" else "a ") + on
    on = f" on {on}" if on else ""
    if rate is None:
        return f"It ran{on}." if on else ""
    out = f"Training went at {numbers.si(rate)} examples/s{on}"
    return out + (f" and waited for data {numbers.percent(wait)} of the time." if wait else ".")


def _where(row: load.Row) -> str:
    split = f"the {pages.visible(pages.words(row.split), 80)} split" if row.split else "its data"
    num = row.values.get("num", math.nan)
    size = f" ({numbers.short(num)} records)" if num > 0 and math.isfinite(num) else ""
    return f"{split}{size}"


# --- figures


def _figure(run: load.Run, row: load.Row, key: str) -> tuple[str, str, str, str]:
    value, num = row.values[key], row.values.get("num", math.nan)
    notes = []
    if names.metric(key).percent and math.isfinite(around := error(value, num)):
        notes.append(f"± {100 * around:.1f}")
    if (guess := chance(row, key)) is not None:
        notes.append(f"chance {numbers.percent(guess, 2)}")
    other = row.values.get("caption_loss_shuffled", math.nan)
    if key == "caption_loss" and math.isfinite(other):
        notes.append(f"{numbers.si(other)} with another image")
    if row.split:
        notes.append(pages.visible(pages.words(row.split), 80))
    same = [r for r in run.evals if (r.eval, r.split) == (row.eval, row.split)]
    label = names.label(key)
    if key == "accuracy":  # of what
        label = f"{pages.visible(pages.words(row.eval), 80)} {label}".strip()
    return label, names.show(key, value), " · ".join(notes), svg.spark(curves.column(same, key)[1])


def _first(run: load.Run, *keys: str) -> load.Row | None:
    """Returns the last row of the first evaluation that has any of the metrics, of the test split if there is one.

    The training split comes last.
    """
    rows = sorted(run.latest().values(), key=lambda row: row.split != "test")
    return next((row for row in rows if any(key in row.values for key in keys)), None)


def _times(num: int, name: str) -> str:
    return name if num == 1 else f"{numbers.count(num)} × {name}"
