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

    def __post_init__(self) -> None:
        rules = {
            "every_steps": (self.every_steps >= 0, "at least 0"),
            "best": (self.best >= 0, "at least 0"),
            "metric": (
                bool(self.metric) == bool(self.best),
                "EVALUATION/METRIC with best=1 or more, else empty",
            ),
            "mode": (self.mode in ("max", "min"), "'max' or 'min'"),
        }
        check.bounds("config.keep", self, rules)
