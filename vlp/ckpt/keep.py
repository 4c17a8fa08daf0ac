"""The setting that says which checkpoints a run keeps. How: steps.py."""

from __future__ import annotations

import dataclasses

from vlp.core import check


@dataclasses.dataclass(frozen=True)
class Keep:
    """Which checkpoints a run keeps besides the newest ones; the others are deleted after a save.

    A checkpoint with a tag (`vlp ckpt tag`), and a folder that holds a file that the run did not write, stay.

    Attributes:
        every_steps: those at multiples of this step; 0: none.
        best: number of those with the best value of `metric`, among those whose step was evaluated.
        metric: EVALUATION/METRIC, for instance "retrieval/i2t/R@1".
        mode: "max" or "min".
    """

    every_steps: int = 0
    best: int = 0
    metric: str = ""
    mode: str = "max"


def check_keep(where: str, keep: Keep) -> None:
    """Raises UserError for a rule that cannot be."""
    named = "EVALUATION/METRIC together with best=1 or more, else ''"
    rules = {
        "every_steps": (keep.every_steps >= 0, "at least 0"),
        "best": (keep.best >= 0, "at least 0"),
        "metric": (bool(keep.metric) == bool(keep.best), named),
        "mode": (keep.mode in ("max", "min"), "'max' or 'min'"),
    }
    check.bounds(where, keep, rules)
