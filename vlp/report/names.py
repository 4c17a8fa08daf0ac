"""Metrics in words: the name of each, how its numbers are written, and which direction is better.

A metric that is not listed has its own name with spaces, and no better direction.
"""

import dataclasses
import functools
import re

from vlp.core import pages
from vlp.report import numbers


@dataclasses.dataclass(frozen=True)
class Metric:
    """better: +1 if more is better, −1 if less is, 0 if neither. percent: a fraction, shown in percent."""

    label: str
    better: int = 0
    percent: bool = False


# By the last part of the key (fullmatch); the first that matches wins.
METRICS = (
    (r"R@(\d+)", Metric(r"R@\1", 1, True)),
    (r"retrieval@(\d+)", Metric(r"R@\1 in the batch", 1, True)),
    (r"median_rank", Metric("median rank", -1)),
    (r"mean_rank", Metric("mean rank", -1)),
    (r"accuracy|top1|acc|acc@?1", Metric("accuracy", 1, True)),
    (r"(?:top|acc)@?(\d+)", Metric(r"top \1", 1, True)),
    (r"token_accuracy", Metric("accuracy of tokens", 1, True)),
    (r"mean_per_class", Metric("mean of classes", 1, True)),
    (r"exact_match", Metric("exact captions", 1, True)),
    (r"distinct", Metric("different captions", 0, True)),
    (r"caption_loss", Metric("caption loss", -1)),
    (r"caption_loss_shuffled", Metric("with another image")),
    (r"caption_gap_se", Metric("error of the difference")),
    (r"loss", Metric("loss", -1)),
    (r"minus_log_batch", Metric("loss − ln(batch)", -1)),
    (r"grad_norm", Metric("gradient norm")),
    (r"lr", Metric("learning rate")),
    (r"num", Metric("records")),
    (r"num_classes", Metric("classes")),
    (r"examples_per_s", Metric("examples / s", 1)),
    (r"elapsed_s", Metric("time", -1)),
    (r"data_wait_frac", Metric("waiting for data", -1, True)),
    (r"mfu", Metric("model FLOPs utilization", 1, True)),
    (r"input_share_(.*)", Metric(r"\1", 0, True)),
    (r"input_truncated_frac", Metric("texts cut", 0, True)),
    (r"(?:.*_)?frac", Metric("", 0, True)),
)
HEADS = {"i2t": "image → text", "t2i": "text → image", "time": ""}


@functools.lru_cache(maxsize=4096)
def metric(key: str) -> Metric:
    """Returns the entry of METRICS for a key: "i2t/R@5"."""
    tail = key.rpartition("/")[2]
    for pattern, known in METRICS:
        if match := re.fullmatch(pattern, tail, re.ASCII):
            return dataclasses.replace(known, label=pages.words(match.expand(known.label) or tail))
    return Metric(pages.words(tail) or "–")


def head(key: str) -> str:
    """Returns the part of a key before the metric, in words: "image → text" for "i2t/R@5", "" for "loss"."""
    parts = key.split("/")[:-1]
    return " ".join(filter(None, (HEADS.get(part, pages.words(part)) for part in parts)))


def label(key: str) -> str:
    """Returns a key in words: "i2t/R@5" as "image → text R@5"."""
    return f"{head(key)} {metric(key).label}".strip()


def show(key: str, value: float) -> str:
    """Returns a value of a metric as text, a fraction in percent."""
    return numbers.percent(value) if metric(key).percent else numbers.short(value)


def evaluation(name: str, split: str) -> str:
    """Returns the title of an evaluation: "Retrieval · test"."""
    parts = [pages.title(pages.words(name)), pages.words(split)]
    return " · ".join(part for part in parts if part)
