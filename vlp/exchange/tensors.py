"""Tables of tensors: which leaves of ours hold the numbers of which tensors of another library, in both directions.

A `Form` says how the numbers are laid out and is exact both ways, so that import and export are each other's inverse.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from vlp.core import check

Arrays = tuple[np.ndarray, ...]
LAYER = "{i}"  # in a tensor's name: the number of the layer


@dataclasses.dataclass(frozen=True)
class Form:
    """read: their tensors of one rule → our leaves; write: the inverse."""

    read: Callable[..., Arrays] = lambda *x: x
    write: Callable[..., Arrays] = lambda *x: x


@dataclasses.dataclass(frozen=True)
class Rule:
    """ours ↔ theirs. With `layers`, our leaves have a leading axis of layers and their names the number of one.

    start: the number of the first layer.
    """

    ours: tuple[str, ...]
    theirs: tuple[str, ...]
    form: Form = Form()
    layers: int = 0
    start: int = 0

    @property
    def numbers(self) -> list[str]:
        return [str(self.start + i) for i in range(self.layers)]

    def names(self) -> list[str]:
        """Their names, of all layers."""
        if not self.layers:
            return list(self.theirs)
        return [n.replace(LAYER, i) for i in self.numbers for n in self.theirs]


def rule(ours: str | Sequence[str], theirs: str | Sequence[str], form: Form = Form()) -> Rule:
    """A rule; a single name stands for a tuple of one."""
    one = lambda x: (x,) if isinstance(x, str) else tuple(x)
    return Rule(one(ours), one(theirs), form)


def stacked(
    rules: Iterable[Rule], ours: str, theirs: str, layers: int, start: int = 0
) -> list[Rule]:
    """The rules of one layer as those of a stack, with prefixes before both sides' names."""
    return [
        Rule(
            tuple(ours + n for n in r.ours),
            tuple(theirs + n for n in r.theirs),
            r.form,
            layers,
            start,
        )
        for r in rules
    ]


# Forms of PyTorch's layouts. W[out, in] → kernel[in, out]; heads × head size may be two axes of it.
SAME = Form()
TRANSPOSED = Form(lambda w: (w.T,), lambda k: (k.T,))
FIRST_ROW = Form(lambda t: (t[0], t[1:]), lambda row, rest: (np.concatenate([row[None], rest]),))
LAST_ROW = Form(lambda t: (t[:-1], t[-1]), lambda rest, row: (np.concatenate([rest, row[None]]),))
SCALAR = Form(lambda t: (t.reshape(()),), lambda t: (t,))
ONE = Form(lambda t: (t.reshape(()),), lambda t: (t.reshape(1),))
CONV = Form(lambda w: (w.transpose(2, 3, 1, 0),), lambda k: (k.transpose(3, 2, 0, 1),))
CONV_1 = Form(lambda w: (w[:, :, 0, 0].T,), lambda k: (k.T[:, :, None, None],))
# A count of batches that nothing reads, and our share of a pass, which is 1 (`ops.statistics`).
COUNT = Form(lambda _: (np.ones((), np.float32),), lambda _: (np.zeros((), np.int64),))
LEADING = Form(lambda t: (t[0],), lambda t: (t[None],))


def patches(side: int) -> Form:
    """Kernel of a convolution [W, 3, p, p] ↔ of the linear map over a patch's pixels [p · p · 3, W]."""
    return Form(
        lambda w: (w.transpose(2, 3, 1, 0).reshape(-1, w.shape[0]),),
        lambda k: (k.reshape(side, side, 3, -1).transpose(3, 2, 0, 1),),
    )


def heads_in(heads: int, parts: int, tensors: int = 1) -> Form:
    """W[parts · H · K, D] ↔ kernel[D, parts, H, K] (for 1 part [D, H, K]); W in as many tensors as `tensors`."""

    def read(*ws: np.ndarray) -> Arrays:
        w = np.concatenate(ws)
        shape = (*([parts] if parts > 1 else []), heads, w.shape[0] // parts // heads)
        return (np.moveaxis(w, 0, -1).reshape(*w.shape[1:], *shape),)

    def write(k: np.ndarray) -> Arrays:
        num = k.ndim - (2 + (parts > 1))
        w = np.moveaxis(k.reshape(*k.shape[:num], -1), -1, 0)
        return tuple(np.split(w, tensors))

    return Form(read, write)


def q_and_kv(heads: int) -> Form:
    """W[3 · H · K, D] ↔ q[D, H, K] and kv[D, 2, H, K]; also a bias, without D."""
    q, kv = heads_in(heads, 1), heads_in(heads, 2)

    def read(w: np.ndarray) -> Arrays:
        num = w.shape[0] // 3
        return (*q.read(w[:num]), *kv.read(w[num:]))

    return Form(read, lambda a, b: (np.concatenate([*q.write(a), *kv.write(b)]),))


def heads_out(heads: int) -> Form:
    """W[D, H · K] ↔ kernel[H, K, D]."""
    return Form(
        lambda w: (w.T.reshape(heads, -1, w.shape[0]),),
        lambda k: (k.reshape(-1, k.shape[-1]).T,),
    )


def linear(ours: str, theirs: str) -> list[Rule]:
    """A PyTorch Linear with bias."""
    return [
        rule(f"{ours}/kernel", f"{theirs}.weight", TRANSPOSED),
        rule(f"{ours}/bias", f"{theirs}.bias"),
    ]


def norm(ours: str, theirs: str) -> list[Rule]:
    """A PyTorch LayerNorm."""
    return [rule(f"{ours}/scale", f"{theirs}.weight"), rule(f"{ours}/bias", f"{theirs}.bias")]


def batch_norm(ours: str, theirs: str) -> list[Rule]:
    """A PyTorch BatchNorm with its running statistics."""
    slots = dict(running_mean="stat_mean", running_var="stat_var")
    return [
        *norm(ours, theirs),
        *(rule(f"{ours}/{mine}", f"{theirs}.{name}") for name, mine in slots.items()),
        rule(f"{ours}/stat_share", f"{theirs}.num_batches_tracked", COUNT),
    ]


def head_out(ours: str, theirs: str, heads: int) -> list[Rule]:
    """The output map of an attention."""
    return [
        rule(f"{ours}/kernel", f"{theirs}.weight", heads_out(heads)),
        rule(f"{ours}/bias", f"{theirs}.bias"),
    ]


def read(rules: Sequence[Rule], theirs: Mapping[str, np.ndarray], where: str) -> dict[str, Any]:
    """Returns our leaves by name.

    Args:
        rules: the table.
        theirs: their tensors by name.
        where: the file, for errors.

    Raises:
        UserError: a tensor that the table does not have, or that the file lacks.
    """
    wanted = [name for r in rules for name in r.names()]
    _same_names(where, set(wanted), set(theirs), "tensors of this architecture")
    ours: dict[str, Any] = {}
    for r in rules:
        try:
            ours |= zip(r.ours, _read(r, theirs))
        except (ValueError, IndexError):
            shapes = {n: theirs[n].shape for n in r.names()[: len(r.theirs)]}
            do = "give the config that belongs to these weights"
            raise check.error(where, f"{shapes}", f"the shape of {r.ours[0]}", do) from None
    return {name: np.asarray(x, order="C") for name, x in ours.items()}


def _read(r: Rule, theirs: Mapping[str, np.ndarray]) -> Arrays:
    if not r.layers:
        return r.form.read(*(theirs[n] for n in r.theirs))
    layers = [r.form.read(*(theirs[n.replace(LAYER, i)] for n in r.theirs)) for i in r.numbers]
    return tuple(np.stack(leaves) for leaves in zip(*layers))


def write(rules: Sequence[Rule], ours: Mapping[str, np.ndarray], where: str) -> dict[str, Any]:
    """Returns their tensors by name; the inverse of `read`.

    Raises:
        UserError: a leaf that the table does not have, or that the model lacks.
    """
    _same_names(where, {n for r in rules for n in r.ours}, set(ours), "leaves of this architecture")
    theirs: dict[str, Any] = {}
    for r in rules:
        leaves = [np.asarray(ours[n]) for n in r.ours]
        if not r.layers:
            theirs |= zip(r.theirs, r.form.write(*leaves))
            continue
        for i, number in enumerate(r.numbers):
            names = (n.replace(LAYER, number) for n in r.theirs)
            theirs |= zip(names, r.form.write(*(x[i] for x in leaves)))
    return {name: np.asarray(x, order="C") for name, x in theirs.items()}


def _same_names(where: str, wanted: set[str], found: set[str], what: str) -> None:
    def some(names: set[str]) -> str:
        shown = ", ".join(sorted(names)[:8])
        return shown + (f" and {len(names) - 8} more" if len(names) > 8 else "")

    parts = []
    if extra := found - wanted:
        parts.append(f"{len(extra)} without a place ({some(extra)})")
    if lost := wanted - found:
        parts.append(f"{len(lost)} missing ({some(lost)})")
    if parts:
        do = "check that weights and config belong together"
        raise check.error(where, " and ".join(parts), f"all {len(wanted)} {what}", do)
