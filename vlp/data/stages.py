"""The order of a stream over the stages of a run: each goes on where the one before it stopped."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from vlp.core import check
from vlp.data import order
from vlp.data.config import Data


@dataclasses.dataclass(frozen=True)
class Begin:
    """Where a dataset's order begins: a position of the stream, the samples that each of its parts
    (itself, if it is no mixture) had given by then, and what is added to the seed for each."""

    position: int = 0
    given: tuple[int, ...] = ()  # () = none
    orders: tuple[int, ...] = ()  # () = 0, 1, …
    before: tuple[int, ...] = ()  # beside `given`, samples in another order, for the counts alone


def in_stages(stages: Sequence[tuple[Any, int, int]]) -> list[Any]:
    """The datasets of a stream, one for each stage, such that each goes on where it was left.

    stages: dataset, position of its first sample in the stream, number of samples. Data that stays
    as it is continues as if the stages were one. Where the data or the weights change, what was
    read before goes on with its next record, wherever it stands in a mixture, and what is new
    begins with its first epoch.
    """
    out: list[Any] = []
    given: dict[tuple, int] = {}  # by law
    read: dict[tuple, int] = {}  # by data
    orders: dict[tuple, int] = {}
    for dataset, position, num in stages:
        laws = dataset.laws()
        if out and _same(out[-1], dataset, position):
            begin = out[-1].begin
        else:
            own = tuple(orders.setdefault(law, k) for k, law in enumerate(laws))
            had = tuple(given.get(law, 0) for law in laws)
            before = tuple(read.get(law[:2], 0) - n for law, n in zip(laws, had))
            begin = Begin(position, had, own, before)
        out.append(dataset.beginning(begin))
        given |= dict(zip(laws, out[-1].given(position + num)))
        read |= {law[:2]: given[law] + n for law, n in zip(laws, begin.before)}
    return out


def _same(a: Any, b: Any, position: int) -> bool:
    """Whether the order of b at a position of the stream is that of a."""

    def law(d: Any) -> tuple:
        changes = (r for r in d.data.reweight if r.samples <= position)
        return d.laws(), tuple(p.weight for p in d.data.mixture), tuple(changes)

    return law(a) == law(b)


def mixture_of(data: Data, sizes: tuple[int, ...], begin: Begin) -> order.Mixture:
    starts, weights = [begin.position], [[p.weight for p in data.mixture]]
    for k, change in enumerate(data.reweight):
        where = f"config.data.reweight.{k}"
        if change.samples <= starts[-1]:
            raise check.error(f"{where}.samples", change.samples, f"over {starts[-1]}", "raise it")
        if len(change.weights) != len(data.mixture):
            do = "give one for each part"
            raise check.error(f"{where}.weights", change.weights, f"{len(data.mixture)}", do)
        starts.append(change.samples)
        weights.append(list(change.weights))
    shares = tuple(order.whole_shares(w, "config.data.mixture") for w in weights)
    return order.Mixture(sizes, shares, tuple(starts), begin.given, begin.orders)
