"""Classification from frozen image features: few-shot ridge, linear probe, k nearest neighbours.

`train_split` gives the labelled examples, `split` is classified. Features are the image tower's pooled output, before
the projection to the joint space (big_vision's pre_logits), or the embedding (features="embed").
"""

from __future__ import annotations

import collections
import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

import jax
import numpy as np
from jax.sharding import Mesh

from vlp.core import check
from vlp.core.types import Apply, Result
from vlp.data.dataset import Dataset
from vlp.evals import embed, solvers
from vlp.evals import io as ios

FEATURES = ("pooled", "embed")


@dataclasses.dataclass(frozen=True)
class Probe:
    """What the three have in common; not an evaluator itself.

    label: the records' field that holds the class; classes are its values in `train_split`, and images of `split` with
    another class are left out. max_per_class: training examples that are used of each class (0: all), drawn with
    seed 0.
    """

    reads_captions: ClassVar = False
    label: str
    split: str = "test"
    train_split: str = "train"
    batch: int = 64
    every_steps: int = 0
    features: str = "pooled"
    max_per_class: int = 0
    data: ios.Source = ios.Source()

    def __post_init__(self) -> None:
        where = f"config.evals: {type(self).__name__.lower()}"
        if self.features not in FEATURES:
            raise check.unknown(f"{where}.features", self.features, FEATURES)
        rules = {"max_per_class": (self.max_per_class >= 0, "at least 0")}
        rules["train_split"] = (self.train_split != self.split, "another split than `split`")
        check.bounds(where, self, rules | self.rules())

    def rules(self) -> dict[str, tuple[bool, str]]:
        """Returns further rules of the fields."""
        return {}

    def check(self, io: ios.IO, where: str) -> None:
        """Raises UserError unless both splits have labels, of two classes or more, and share some."""
        classes = Labels.of(io.open(self.train_split), self.label, where).classes
        if len(classes) < 2:
            do = "name another field"
            raise check.error(f"{where}.label", f"values {classes}", "two classes or more", do)
        asked = Labels.of(io.open(self.split), self.label, where).classes
        if not set(asked) & set(classes):
            got, do = f"values {asked[:8]} of {self.label!r}", f"those of {self.train_split!r}"
            raise check.error(f"{where}.split", got, f"some of {classes[:8]}", f"use {do}")

    def asks(self, apply: Apply, image: jax.Array, text: jax.Array) -> Any:
        """What is asked of the model for one batch."""
        return embed.image(apply, image, output=self.features)

    def __call__(self, apply: Apply, mesh: Mesh, io: ios.IO) -> Iterator[Result]:
        train, test = io.open(self.train_split), io.open(self.split)
        known, asked = (Labels.of(d, self.label, "config.evals") for d in (train, test))
        place = {c: k for k, c in enumerate(known.classes)}
        mine = [n for n, value in enumerate(asked.values) if value in place]
        y_M = np.array([place[asked.values[n]] for n in mine], int)
        records = [asked.records[n] for n in mine]
        test_MD, good_M = self.embed(apply, mesh, test, records)
        where = io.provenance(test) | {"num": int(good_M.sum()), "num_classes": len(known.classes)}
        where |= {"num_other_classes": len(asked.values) - len(mine), "features": self.features}
        where |= {"train_fingerprint": train.fingerprint}
        y_N = np.array([place[v] for v in known.values], int)
        for name, predicted_M, more in self.predictions(
            lambda chosen: self.embed(apply, mesh, train, [known.records[n] for n in chosen]),
            y_N,
            test_MD,
            len(known.classes),
        ):
            accuracy = float((predicted_M[good_M] == y_M[good_M]).mean())
            yield Result(name, accuracy, where | more)

    def embed(
        self, apply: Apply, mesh: Mesh, dataset: Dataset, records: Sequence[int]
    ) -> tuple[np.ndarray, np.ndarray]:
        """Returns the features of some records, and whether each is its own (no substitute's)."""
        some = ios.subset(dataset, records)
        return embed.images(apply, some, self.batch, mesh, self.features)

    def predictions(
        self, features_of: Any, y_N: np.ndarray, test_MD: np.ndarray, num_classes: int
    ) -> Iterator[tuple[str, np.ndarray, dict[str, Any]]]:
        """Yields names of metrics with the classes predicted and further provenance.

        Args:
            features_of: gives features for places in y_N, and which of them are good.
            y_N: the class of each training record.
            test_MD: features to classify.
            num_classes: how many there are.
        """
        raise NotImplementedError

    def all_of(self, features_of: Any, y_N: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns the features and classes of the training examples, at most `max_per_class` of each class."""
        chosen = np.arange(len(y_N))
        if self.max_per_class:
            chosen = np.sort(few(y_N, self.max_per_class, 0))
        x_ND, good_N = features_of(chosen.tolist())
        return x_ND[good_N], y_N[chosen][good_N]


@dataclasses.dataclass(frozen=True)
class FewShot(Probe):
    """shots_K: accuracy of ridge regression on K examples a class, mean of `seeds` draws (`solvers.ridge`).

    big_vision's protocol (evaluators/fewshot_lsr.py) and its defaults.
    """

    shots: tuple[int, ...] = (1, 5, 10, 25)
    seeds: int = 3
    l2: float = 1024.0

    def rules(self) -> dict[str, tuple[bool, str]]:
        """Returns further rules of the fields."""
        return {
            "shots": (bool(self.shots) and min(self.shots) >= 1, "numbers from 1 on"),
            "seeds": (1 <= self.seeds <= 1000, "in 1 … 1,000"),
            "l2": (0 < self.l2 < math.inf, "above 0"),
        }

    def predictions(
        self, features_of: Any, y_N: np.ndarray, test_MD: np.ndarray, num_classes: int
    ) -> Iterator[tuple[str, np.ndarray, dict[str, Any]]]:
        """Yields as many as shots × seeds; see `__call__`, which takes the means."""
        drawn = {s: few(y_N, max(self.shots), s) for s in range(self.seeds)}
        needed = np.unique(np.concatenate(list(drawn.values())))
        x_ND, good_N = features_of(needed.tolist())
        for shots in self.shots:
            for seed in range(self.seeds):
                chosen = np.searchsorted(needed, few(y_N, shots, seed))
                chosen = chosen[good_N[chosen]]
                args = x_ND[chosen], y_N[needed[chosen]], test_MD, num_classes, self.l2
                yield f"shots_{shots}", solvers.ridge(*args), {"seeds": self.seeds, "l2": self.l2}

    def __call__(self, apply: Apply, mesh: Mesh, io: ios.IO) -> Iterator[Result]:
        found: dict[str, list[Result]] = collections.defaultdict(list)
        for r in super().__call__(apply, mesh, io):
            found[r.metric].append(r)
        for name, results in found.items():
            yield Result(name, float(np.mean([r.value for r in results])), results[0].provenance)


@dataclasses.dataclass(frozen=True)
class LinearProbe(Probe):
    """accuracy: of logistic regression (`solvers.probe`), whose l2 is chosen among `l2` on a fifth of the examples."""

    l2: tuple[float, ...] = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)

    def rules(self) -> dict[str, tuple[bool, str]]:
        """Returns further rules of the fields."""
        return {
            "l2": (
                bool(self.l2) and 0 <= min(self.l2) <= max(self.l2) < math.inf,
                "numbers from 0 on",
            )
        }

    def predictions(
        self, features_of: Any, y_N: np.ndarray, test_MD: np.ndarray, num_classes: int
    ) -> Iterator[tuple[str, np.ndarray, dict[str, Any]]]:
        """Yields one; see `Probe.predictions`."""
        x_ND, y_N = self.all_of(features_of, y_N)
        predicted_M, l2 = solvers.probe(x_ND, y_N, test_MD, num_classes, self.l2)
        yield "accuracy", predicted_M, {"l2": l2, "num_train": len(y_N)}


@dataclasses.dataclass(frozen=True)
class Knn(Probe):
    """accuracy: of a weighted vote of the k nearest examples (`solvers.neighbours`)."""

    k: int = 20
    temperature: float = 0.07

    def rules(self) -> dict[str, tuple[bool, str]]:
        """Returns further rules of the fields."""
        return {
            "k": (self.k >= 1, "1 or more"),
            "temperature": (1e-3 <= self.temperature < math.inf, "at least 0.001"),
        }

    def predictions(
        self, features_of: Any, y_N: np.ndarray, test_MD: np.ndarray, num_classes: int
    ) -> Iterator[tuple[str, np.ndarray, dict[str, Any]]]:
        """Yields one; see `Probe.predictions`."""
        x_ND, y_N = self.all_of(features_of, y_N)
        x_ND, test_MD = embed.unit(x_ND), embed.unit(test_MD)
        args = x_ND, y_N, test_MD, num_classes, self.k, self.temperature
        yield "accuracy", solvers.neighbours(*args), {"k": self.k, "num_train": len(y_N)}


@dataclasses.dataclass(frozen=True)
class Labels:
    """The labelled records of a split: their numbers and values."""

    records: list[int]
    values: list[str]

    @property
    def classes(self) -> list[str]:
        """The values, sorted: numbers by size."""
        number = lambda v: (0, int(v), "") if v.isdecimal() else (1, 0, v)
        return sorted(set(self.values), key=number)

    @classmethod
    def of(cls, dataset: Dataset, label: str, where: str) -> Labels:
        """Reads them. Raises UserError if no record has such a field, or, with bad_records "error", for a bad one."""
        records, values, fields = [], [], set()
        for i in range(dataset.num_records):
            try:
                record = dataset.source[i]
            except Exception as e:  # by source
                if dataset.data.bad_records == "error":
                    got = f"record {i}, which cannot be read ({type(e).__name__}: {e!s:.80})"
                    do = "repair the data, or set config.data.bad_records='replace'"
                    raise check.error(f"{where}.split", got, "good records", do) from e
                continue
            fields |= {k for k, v in record.items() if isinstance(v, str | int) and k != "key"}
            value = record.get(label)
            if value is not None and value != "" and value == value:
                records.append(i)
                values.append(str(value))
        if not records:
            raise check.unknown(f"{where}.label", label, fields)
        return cls(records, values)


def few(y_N: np.ndarray, num: int, seed: int) -> np.ndarray:
    """Returns places of `num` examples of each class (all, if a class has fewer), as big_vision draws them."""
    rng = np.random.default_rng(seed)
    found = [rng.permutation(np.flatnonzero(y_N == c))[:num] for c in range(y_N.max() + 1)]
    return np.concatenate(found)
