"""What the scores of a classifier are worth: ranks, calibration, and accuracy against the frequency of classes."""

from __future__ import annotations

import dataclasses

import numpy as np
from jaxtyping import Float, Int

from vlp.core import check
from vlp.evals import io as ios

BINS = 15  # Guo et al. 2017, arXiv:1706.04599, §2
_ROWS = 2**12  # images whose scores are held at a time


@dataclasses.dataclass(frozen=True)
class Answers:
    """rank_N: of the true class (1 is best). guess_N: the first of the best classes. confidence_N: its probability."""

    rank_N: np.ndarray
    guess_N: np.ndarray
    confidence_N: np.ndarray


def answers(
    images_NE: Float[np.ndarray, "N E"],
    class_CE: Float[np.ndarray, "C E"],
    truth_N: Int[np.ndarray, "N"],
    scale: float,
) -> Answers:
    """Compares images with classes, some rows at a time.

    Args:
        images_NE: unit vectors.
        class_CE: unit vectors.
        truth_N: the class of each image.
        scale: of the cosines, in the softmax whose largest value is the confidence.
    """
    found: list[tuple[np.ndarray, ...]] = []
    for k in range(0, len(images_NE), _ROWS):
        score_NC = images_NE[k : k + _ROWS].astype(np.float64) @ class_CE.T
        top_N1 = score_NC.max(axis=1, keepdims=True)
        confidence_N = 1 / np.exp(scale * (score_NC - top_N1)).sum(axis=1)
        rank_N = rank_of_class(score_NC, truth_N[k : k + _ROWS])
        found.append((rank_N, score_NC.argmax(axis=1), confidence_N))
    return Answers(*(np.concatenate(part) for part in zip(*found)))


def rank_of_class(
    scores_NC: Float[np.ndarray, "N C"], truth_N: Int[np.ndarray, "N"]
) -> Int[np.ndarray, "N"]:
    """Rank (1 is best) of the true class; a tie counts against it, and so does NaN."""
    right_N1 = np.take_along_axis(scores_NC, truth_N[:, None], axis=1)
    return (~(scores_NC < right_N1)).sum(axis=1)


def ece(confidence_N: Float[np.ndarray, "N"], right_N: np.ndarray) -> float:
    """Expected calibration error over 15 bins of equal width: Σ n_b / n · |accuracy_b − confidence_b|."""
    confidence_N = np.nan_to_num(confidence_N, nan=1.0)
    bin_N = np.clip(np.ceil(confidence_N * BINS).astype(int) - 1, 0, BINS - 1)
    gap = np.bincount(bin_N, right_N, BINS) - np.bincount(bin_N, confidence_N, BINS)
    return float(np.abs(gap).sum() / len(bin_N))


def frequencies(path: str, classes: tuple[str, ...], where: str) -> np.ndarray:
    """Reads "value<TAB>number" lines: how often each class occurs in the pretraining captions, say. i64[C]

    Raises UserError for a class that the file does not list, or a line without a number.
    """
    found: dict[str, int] = {}
    for line in ios.lines_of(path, where):
        value, tab, number = line.rpartition("\t")
        if not tab or not number.strip().isdecimal():
            raise check.error(where, f"{line!r:.60} in {path}", "value<TAB>number", "correct it")
        found[value] = int(number)
    if missing := [c for c in classes if c not in found]:
        got = f"{len(missing)} classes missing in {path} ({missing[0]!r}, …)"
        raise check.error(where, got, "a line for each class", "add them (0 for never)")
    return np.array([found[c] for c in classes])


def against_frequency(
    accuracy_C: Float[np.ndarray, "C"], frequency_C: Int[np.ndarray, "C"]
) -> dict[str, float]:
    """Spearman's correlation of accuracy and frequency; mean accuracy of the rarest and the commonest third."""
    order = np.argsort(frequency_C, kind="stable")
    third = max(1, len(order) // 3)
    a, b = _average_ranks(accuracy_C), _average_ranks(frequency_C)
    spread = a.std() * b.std()
    both = ((a - a.mean()) * (b - b.mean())).mean()
    return {
        "frequency_spearman": float(both / spread) if spread else 0.0,
        "accuracy_rare": float(accuracy_C[order[:third]].mean()),
        "accuracy_common": float(accuracy_C[order[-third:]].mean()),
    }


def _average_ranks(x: np.ndarray) -> np.ndarray:
    """Ranks from 1; equal values share their mean."""
    _, inverse, counts = np.unique(x, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[inverse]
