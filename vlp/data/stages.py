"""The order of a stream over the stages of a run: each stage continues where the one before it stopped."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from vlp.core import check
from vlp.data import order
from vlp.data.config import Data


@dataclasses.dataclass(frozen=True)
class Begin:
    """Where a dataset's order begins. The tuples have one entry for each part of a mixture (one for other data)."""

    position: int = 0  # in the stream
    given: tuple[int, ...] = ()  # samples read before that position, in this order; () = 0 each
    orders: tuple[int, ...] = ()  # added to the seed; () = 0, 1, …
    before: tuple[int, ...] = ()  # further samples read, in another order: they are only counted


def in_stages(stages: Sequence[tuple[Any, int, int]]) -> list[Any]:
    """Returns the datasets of a stream, one for each stage, each with the order's beginning set.

    Data that does not change between stages continues as if they were one stage. Where the data or a mixture's weights
    change, a part that was read before continues with its next record, and a new part begins with its first epoch.

    Args:
      stages: for each stage its `Dataset`, the position of its first sample in the stream, and its number of samples.
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
    """Returns whether b continues, at a position of the stream, in the same order as a."""

    def law(d: Any) -> tuple:
        changes = (r for r in d.data.reweight if r.samples <= position)
        return d.laws(), tuple(p.weight for p in d.data.mixture), tuple(changes)

    return law(a) == law(b)


def mixture_of(data: Data, sizes: tuple[int, ...], begin: Begin) -> order.Mixture:
    """Returns the interleave of a mixture whose parts have `sizes` records.

    Raises: `UserError` for changes of the weights that are out of order or have the wrong number of weights.
    """
    starts, weights = [begin.position], [[p.weight for p in data.mixture]]
    for k, change in enumerate(data.reweight):
        where = f"config.data.reweight.{k}"
        if change.samples <= starts[-1]:
            raise check.error(
                f"{where}.samples",
                change.samples,
                f"over {starts[-1]}",
                "list the changes in order",
            )
        if len(change.weights) != len(data.mixture):
            do = "give one for each part"
            raise check.error(f"{where}.weights", change.weights, f"{len(data.mixture)}", do)
        starts.append(change.samples)
        weights.append(list(change.weights))
    shares = tuple(order.whole_shares(w, "config.data.mixture") for w in weights)
    return order.Mixture(sizes, shares, tuple(starts), begin.given, begin.orders)
