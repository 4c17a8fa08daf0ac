"""Exact sums over all pairs of a sharded batch. Neither the B×C matrix nor a gathered copy of a side is ever held.

Columns are gathered slice by slice; the next slice travels while the present one is worked on. Each device scores its
own rows against a slice, tile by tile. A score is computed once per pass and enters two running log-sum-exps, one of
its row and one of its column, which are merged across devices. The backward pass recomputes the tiles from the
log-sum-exps. The results are numbers per row and per column, differentiable with any cotangent, so weights,
leave-one-out, clipping and soft targets stay outside.

Recomputing tiles of logits is Inf-CL's idea (Cheng et al. 2024, arXiv:2410.17243), which scores each pair once per
direction. Axis letters: B rows and C columns of the global batch, R rows and S columns of a tile.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import typing
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from vlp.core import check
from vlp.core import mesh as meshes

PyTree = Any
Stats = dict[str, jax.Array]
CHUNK = 1024  # columns gathered at a time
TILE = 1024  # rows of a device scored at a time
STAGE = 16  # devices that exchange slices at once


def dot(
    params: PyTree, x_RE: jax.Array, y_SE: jax.Array, precision: jax.lax.Precision
) -> jax.Array:
    """scale · x·y, and + bias if params has one."""
    scores_RS = params["scale"] * jnp.einsum("re,se->rs", x_RE, y_SE, precision=precision)
    return scores_RS + params["bias"] if "bias" in params else scores_RS


@dataclasses.dataclass(frozen=True)
class TokenSets:
    """Score of two sets of unit vectors: scale · the mean, over one set, of the best match in the other.

    x: (tokens [R N E], which of them exist [R N]) of rows; y: (tokens [S L E], [S L]) of columns. An empty set has
    score 0. The [R S N L] products are formed for a few columns at a time, and again in the backward pass.

    mean_over: "columns", mean over a column's tokens of the best of the row's (words of patches; FILIP's text→image
    score, Yao et al. 2021, arXiv:2111.07783, eq. 4-5); "rows", the reverse (its image→text score); "both", the mean of
    all products. numbers: how many products a device holds at a time (64 MiB in float32).
    """

    mean_over: str = "columns"
    numbers: int = 1 << 24

    def __post_init__(self) -> None:
        known = ("columns", "rows", "both")
        if self.mean_over not in known:
            raise check.unknown("losses.pairs: mean_over", self.mean_over, known)

    def tile(self, x: PyTree, y: PyTree) -> int:
        """How many rows are scored at a time."""
        num = x[0].shape[1] * y[0].shape[1]
        return TILE if self.mean_over == "both" else min(TILE, max(1, self.numbers // num))

    def __call__(
        self, params: PyTree, x: PyTree, y: PyTree, precision: jax.lax.Precision
    ) -> jax.Array:
        """Returns the scores [R S] of R rows and S columns."""
        (x_RNE, x_RN), (y_SLE, y_SL) = ((t, jax.lax.stop_gradient(has)) for t, has in (x, y))
        if self.mean_over == "both":  # the mean of products is the product of means
            mean = lambda t, has: (t * has[..., None]).sum(1) / _at_least_one(has)[:, None]
            return dot(params, mean(x_RNE, x_RN), mean(y_SLE, y_SL), precision)

        @jax.checkpoint
        def column(y: tuple[jax.Array, jax.Array]) -> jax.Array:
            y_LE, y_L = y
            dots_RNL = jnp.einsum("rne,le->rnl", x_RNE, y_LE, precision=precision)
            exists_RNL = (x_RN[:, :, None] > 0) & (y_L[None, None, :] > 0)
            axis = 1 if self.mean_over == "columns" else 2
            best = _finite(jnp.where(exists_RNL, dots_RNL, -jnp.inf).max(axis))
            return best.sum(1) / (_at_least_one(y_L) if axis == 1 else _at_least_one(x_RN))

        at_once = max(1, self.numbers // (x_RN.size * y_SL.shape[1]))
        scores_SR = jax.lax.map(column, (y_SLE, y_SL), batch_size=min(at_once, len(y_SL)))
        return params["scale"] * scores_SR.T + params.get("bias", 0)


def _at_least_one(exists: jax.Array) -> jax.Array:
    return jnp.maximum(exists.sum(-1), 1)


@dataclasses.dataclass(frozen=True)
class Pairs:
    """What is summed over the pairs: functions that are evaluated tile by tile.

    They must hash: define them at module level, or as frozen dataclasses.

    score: score(params, x, y, precision) → [R S]; leaves of rows x and columns y arrive in float32 or wider. It may
    have a method tile(x, y) → rows scored at a time, as `TokenSets` has.
    where: where(i_R1, j_1S, a, b) → bool [R S], of global indices and of the leaves `a` of rows and `b` of columns.
    Pairs where it is False are in neither log-sum-exp (equal captions, for example).
    targets: targets(i_R1, j_1S, a, b) → [R S], how much i and j belong together. None: 1 where i = j.
    each: each(score, target) → [R S] is summed over the pairs instead of the log-sum-exps.
    columns: whether the columns' sums are wanted too.
    first_row, first_column: the global index of the first row and of the first column.
    """

    score: Callable[..., jax.Array] = dot
    where: Callable[..., jax.Array] | None = None
    targets: Callable[..., jax.Array] | None = None
    each: Callable[[jax.Array, jax.Array], jax.Array] | None = None
    columns: bool = True
    first_row: int = 0
    first_column: int = 0


def reduce(
    pairs: Pairs,
    params: PyTree,
    x: PyTree,
    y: PyTree,
    a: PyTree = (),
    b: PyTree = (),
    *,
    chunk: int = 0,
    tile: int = 0,
) -> tuple[Stats, Stats]:
    """Sums over all pairs, for every row and for every column.

    Args:
        pairs: Defines the sums.
        params: Parameters of the score. Differentiated.
        x, y: Pytrees of the rows, with leading axis B, and of the columns, with leading axis C. Differentiated (except
            boolean leaves).
        a, b: Further pytrees of rows and of columns, for `where` and `targets`. Not differentiated.
        chunk: Columns gathered at a time, over all devices (0: 1,024). Changes memory, not values.
        tile: Rows of a device scored at a time (0: what the score asks, else 1,024). Changes memory, not values.

    Returns:
        Two dicts, of rows [B] and of columns [C] (empty if pairs.columns is False). `lse`: log-sum-exp of the scores
        (−inf where there are none), or `each`, if that is given. `target`: the sum of target · score. Without
        gradient: `mass`, the sum of targets; `max`, the best score; `ties`, how many pairs have it; `hit`, 1 if
        (k, k) has the best score, 1/n if n pairs share it.

    Raises:
        UserError: for a negative chunk or tile.
    """
    if min(chunk, tile) < 0:
        got = f"chunk {chunk}, tile {tile}"
        raise check.error("losses.pairs", got, "0 or more", "set them to 0 (automatic)")
    precision = _precision((x, y))
    number = lambda v: v.astype(jnp.bfloat16) if v.dtype == bool else v
    x, y = jax.tree.map(number, (x, y))
    num_rows, num_cols = jax.tree.leaves(x)[0].shape[0], jax.tree.leaves(y)[0].shape[0]
    axes, ways = _row_axes(num_rows)
    rows, cols = num_rows // ways, -(-num_cols // ways)
    if short := cols * ways - num_cols:
        fill = lambda v: jnp.pad(v, ((0, short), *[(0, 0)] * (v.ndim - 1)))
        y, b = jax.tree.map(fill, (y, b))
    sweep = Sweep(
        pairs,
        axes,
        ways,
        rows=rows,
        cols=cols,
        num_cols=num_cols,
        tile=min(tile or getattr(pairs.score, "tile", lambda *_: TILE)(x, y), rows),
        part=min(max(-(-(chunk or CHUNK) // ways), 1), cols),
        precision=precision,
    )
    of_rows, of_cols = typing.cast(tuple[Stats, Stats], _reduce(sweep, params, x, y, a, b))
    return of_rows, {n: v[:num_cols] for n, v in of_cols.items()}


def join(first: Stats, second: Stats) -> Stats:
    """The sums of the same rows over two sets of columns → over their union; a row's own pair is in the first."""
    best = jnp.maximum(first["max"], second["max"])
    ties = sum(jnp.where(s["max"] >= best, s["ties"], 0) for s in (first, second))
    own_is_best = (first["hit"] > 0) & (first["max"] >= best)
    out = {n: first[n] + second[n] for n in ("target", "mass", "each") if n in first}
    if "lse" in first:
        none = jnp.isneginf(first["lse"]) & jnp.isneginf(second["lse"])
        lse = jnp.logaddexp(*(jnp.where(none, 0, s["lse"]) for s in (first, second)))
        out["lse"] = jnp.where(none, -jnp.inf, lse)
    hit = jnp.where(own_is_best, 1 / jnp.maximum(ties, 1), 0)
    return out | {"max": best, "ties": ties, "hit": hit}


def _row_axes(num_rows: int) -> tuple[tuple[str, ...], int]:
    """The mesh axes over which rows are divided, batch axes first, and their product."""
    mesh = jax.sharding.get_abstract_mesh()
    axes: tuple[str, ...] = ()
    ways = 1
    if not mesh.empty:
        known = [axis for axis in meshes.RULES["batch"] if axis in mesh.axis_names]
        for axis in dict.fromkeys((*known, *mesh.axis_names)):
            if num_rows % (ways * mesh.shape[axis]) == 0:
                axes, ways = (*axes, axis), ways * mesh.shape[axis]
    return axes, ways


def _precision(tree: PyTree) -> jax.lax.Precision:
    """One pass of the matrix unit holds half-precision values exactly; float32 needs all of them."""
    half = all(leaf.dtype.itemsize <= 2 for leaf in jax.tree.leaves(tree))
    return jax.lax.Precision.DEFAULT if half else jax.lax.Precision.HIGHEST


@dataclasses.dataclass(frozen=True)
class Sweep:
    """How one device goes over its rows × all columns: `part` columns of each of `ways` devices are one slice."""

    pairs: Pairs
    axes: tuple[str, ...]
    ways: int
    rows: int  # of a device
    cols: int  # of a device; the last ones may be missing
    num_cols: int
    tile: int
    part: int
    precision: jax.lax.Precision

    @property
    def tiles(self) -> int:
        return -(-self.rows // self.tile)

    @property
    def slices(self) -> int:
        return -(-self.cols // self.part)

    def over_mesh(self, f: Callable[..., Any], ins: tuple[bool, ...], outs: Any) -> Any:
        """f on every device's part; True marks what leads with rows or columns, False what all devices hold."""
        if not self.axes:
            return f
        spec = lambda sharded: PartitionSpec(self.axes) if sharded else PartitionSpec()
        specs = jax.tree.map(spec, (ins, outs))
        return jax.shard_map(f, in_specs=specs[0], out_specs=specs[1], check_vma=False)

    def index(self) -> jax.Array | int:
        return jax.lax.axis_index(self.axes) if self.axes else 0

    def stages(self) -> list[list[list[int]] | None]:
        """Groups of devices that exchange slices, one stage after the other: neighbours, then equals of each group.

        The bytes are those of one stage over all (None). Over more devices than STAGE the TPU compiler would make an
        all-reduce of a small exchange, which sends twice as much.
        """
        if not self.axes:
            return []
        near = next(n for n in range(math.isqrt(self.ways), 0, -1) if self.ways % n == 0)
        if self.ways <= STAGE or near == 1:
            return [None]
        every = range(self.ways)
        return [
            [list(every[g : g + near]) for g in every[::near]],
            [list(every[g::near]) for g in every[:near]],
        ]

    def split(self, tree: PyTree, size: int) -> PyTree:
        """Rows [N …] → [N / size, size …], the last tile filled up with zeros."""

        def one(leaf: Any) -> Any:
            short = -leaf.shape[0] % size
            if short:
                leaf = jnp.pad(leaf, ((0, short), *[(0, 0)] * (leaf.ndim - 1)))
            return leaf.reshape(-1, size, *leaf.shape[1:])

        return jax.tree.map(one, tree)

    def gather(self, parts: PyTree, k: jax.Array | int) -> PyTree:
        """Slice k of the columns: part k of every device, in the devices' order."""
        part = jax.tree.map(lambda p: jax.lax.dynamic_index_in_dim(p, k, keepdims=False), parts)
        for groups in self.stages():
            part = jax.lax.all_gather(part, self.axes, axis_index_groups=groups, tiled=True)
        return part

    def scatter(self, slices: jax.Array, like: jax.Array) -> jax.Array:
        """Sums a slice over devices; each gets its own part. It travels in the type of `like`, as gradients of half
        precision do."""
        slices = slices.astype(like.dtype)
        for groups in reversed(self.stages()):
            slices = jax.lax.psum_scatter(slices, self.axes, axis_index_groups=groups, tiled=True)
        return slices

    def columns(self, k: jax.Array | int) -> tuple[jax.Array, jax.Array | None]:
        """Global indices of slice k's columns, and which of them exist (None: all)."""
        s = jnp.arange(self.ways * self.part)
        local = k * self.part + s % self.part
        j = (s // self.part) * self.cols + local
        if self.cols % self.part == 0 and self.cols * self.ways == self.num_cols:
            return j, None
        return j, (local < self.cols) & (j < self.num_cols)

    def row_indices(self) -> tuple[jax.Array, jax.Array | None]:
        """Global indices of this device's rows [tiles, tile], and which of them exist (None: all)."""
        local = jnp.arange(self.tiles * self.tile).reshape(self.tiles, self.tile)
        real = None if self.rows % self.tile == 0 else local < self.rows
        return self.index() * self.rows + local, real

    def scores(
        self, params: PyTree, x_R: PyTree, y_S: PyTree, row: PyTree, col: PyTree
    ) -> tuple[jax.Array, jax.Array | None, jax.Array, jax.Array]:
        """Of one tile, [R S]: scores, which pairs count (None: all), targets, which pairs are (k, k)."""
        (i_R, real_R, a_R), (j_S, real_S, b_S) = row, col
        i_R1, j_1S = i_R[:, None] + self.pairs.first_row, j_S[None, :] + self.pairs.first_column
        s_RS = self.pairs.score(params, x_R, y_S, self.precision)
        same_RS = i_R1 == j_1S
        real_RS = None
        for mask in (
            None if real_R is None else real_R[:, None],
            None if real_S is None else real_S[None, :],
        ):
            if mask is not None:
                real_RS = mask if real_RS is None else real_RS & mask
        if self.pairs.targets is None:
            t_RS = same_RS.astype(s_RS.dtype)
        else:
            t_RS = self.pairs.targets(i_R1, j_1S, a_R, b_S).astype(s_RS.dtype)
        if real_RS is not None:
            t_RS = jnp.where(real_RS, t_RS, 0)
            same_RS &= real_RS
        where_RS = real_RS
        if self.pairs.where is not None:
            where_RS = self.pairs.where(i_R1, j_1S, a_R, b_S)
            where_RS = where_RS if real_RS is None else where_RS & real_RS
        return s_RS, where_RS, t_RS, same_RS

    def over_slices(
        self, parts: PyTree, carry: PyTree, work: Callable[[PyTree, PyTree, Any], tuple[Any, Any]]
    ) -> tuple[PyTree, PyTree]:
        """Folds work(carry, slice, k) → (carry, out) over the slices; the next slice travels meanwhile.

        Outs are stacked: [slices …]. The last slice is outside of the loop: nothing travels that is not used.
        """

        def body(state: PyTree, k: jax.Array) -> tuple[PyTree, PyTree]:
            carry, here = state
            after = self.gather(parts, k + 1)
            carry, out = work(carry, here, k)
            return (carry, after), out

        here, last = self.gather(parts, 0), self.slices - 1
        if not last:
            carry, out = work(carry, here, 0)
            return carry, jax.tree.map(lambda o: o[None], out)
        (carry, here), outs = jax.lax.scan(body, (carry, here), jnp.arange(last))
        carry, out = work(carry, here, last)
        join = lambda many, one: jnp.concatenate([many, one[None]])
        return carry, jax.tree.map(join, outs, out)


def _wide(tree: PyTree) -> PyTree:
    """Half-precision leaves in float32."""
    return jax.tree.map(lambda v: v.astype(jnp.promote_types(v.dtype, jnp.float32)), tree)


def _empty(shape: tuple[int, ...], dtype: Any) -> Stats:
    """Running sums of nothing."""
    zero = {n: jnp.zeros(shape, dtype) for n in ("sum", "ties", "target", "mass")}
    return zero | {n: jnp.full(shape, -jnp.inf, dtype) for n in ("max", "own")}


def _finite(x: jax.Array) -> jax.Array:
    return jnp.where(jnp.isfinite(x), x, 0)


def _sums(
    pairs: Pairs,
    s_RS: jax.Array,
    where_RS: jax.Array | None,
    t_RS: jax.Array,
    same_RS: jax.Array,
    axis: int,
) -> Stats:
    """One tile's sums along `axis`."""
    drop = lambda x, value: x if where_RS is None else jnp.where(where_RS, x, value)
    kept_RS = drop(s_RS, -jnp.inf)
    top = kept_RS.max(axis)
    if pairs.each is None:
        total = jnp.exp(kept_RS - jnp.expand_dims(_finite(top), axis)).sum(axis)
    else:
        total = drop(pairs.each(s_RS, t_RS), 0).sum(axis)
    return {
        "max": top,
        "sum": total,
        "ties": (kept_RS == jnp.expand_dims(top, axis)).sum(axis).astype(s_RS.dtype),
        "target": (t_RS * s_RS).sum(axis),
        "mass": t_RS.sum(axis),
        "own": jnp.where(same_RS, s_RS, -jnp.inf).max(axis),
    }


def _merge(pairs: Pairs, first: Stats, second: Stats) -> Stats:
    """Sums over two sets of pairs → over their union."""
    both = jax.tree.map(lambda f, s: jnp.stack([f, s]), first, second)
    return _merge_all(pairs, both)


def _merge_all(pairs: Pairs, many: Stats) -> Stats:
    """The same over the leading axis."""
    top = many["max"].max(0)
    fall = jnp.exp(many["max"] - _finite(top)[None]) if pairs.each is None else 1
    return {
        "max": top,
        "sum": (many["sum"] * fall).sum(0),
        "ties": jnp.where(many["max"] == top[None], many["ties"], 0).sum(0),
        "own": many["own"].max(0),
        **{n: many[n].sum(0) for n in ("target", "mass")},
    }


def _finish(pairs: Pairs, sums: Stats) -> Stats:
    best = (sums["own"] >= sums["max"]) & (sums["ties"] > 0)
    total = sums["sum"]
    return {
        "lse" if pairs.each is None else "each": total
        if pairs.each is not None
        else _finite(sums["max"]) + jnp.log(total),
        "target": sums["target"],
        "mass": sums["mass"],
        "max": sums["max"],
        "ties": sums["ties"],
        "hit": jnp.where(best, 1 / jnp.maximum(sums["ties"], 1), 0),
    }


def _forward(
    sweep: Sweep, params: PyTree, x: PyTree, y: PyTree, a: PyTree, b: PyTree
) -> tuple[Stats, Stats]:
    """On one device: sums of its rows over all columns, and of its columns over all rows."""
    pairs = sweep.pairs
    x_tiles, a_tiles = sweep.split((_wide(x), a), sweep.tile)
    i, real = sweep.row_indices()
    # Stops XLA from hoisting values that depend only on indices, for all pairs, out of an outer loop.
    i, real, x_tiles = jax.lax.optimization_barrier((i, real, x_tiles))
    dtype = jax.eval_shape(
        lambda p, x, y: pairs.score(p, x, y, sweep.precision),
        params, *(jax.tree.map(lambda v: v[:1], _wide(v)) for v in (x, y)),
    ).dtype  # fmt: skip
    size = sweep.ways * sweep.part

    def slice_(rows: Stats, here: PyTree, k: Any) -> tuple[Stats, Stats]:
        y_S, b_S = here
        y_S, col = _wide(y_S), (*sweep.columns(k), b_S)

        def tile(cols: Stats, xs: PyTree) -> tuple[Stats, Stats]:
            x_R, row, sums = xs
            scored = sweep.scores(params, x_R, y_S, row, col)
            if pairs.columns:
                cols = _merge(pairs, cols, _sums(pairs, *scored, axis=0))
            return cols, _merge(pairs, sums, _sums(pairs, *scored, axis=1))

        none = _empty((size,), dtype) if pairs.columns else {}
        cols, rows = jax.lax.scan(tile, none, (x_tiles, (i, real, a_tiles), rows))
        if sweep.axes:
            spread = lambda v: v.reshape(sweep.ways, sweep.part)
            cols = {n: jax.lax.all_to_all(spread(v), sweep.axes, 0, 0) for n, v in cols.items()}
            cols = _merge_all(pairs, cols) if pairs.columns else {}
        return rows, cols

    rows = _empty((sweep.tiles, sweep.tile), dtype)
    rows, cols = sweep.over_slices(sweep.split((y, b), sweep.part), rows, slice_)
    flat = lambda tree, num: jax.tree.map(lambda v: v.reshape(-1)[:num], tree)
    of_rows, of_cols = flat(rows, sweep.rows), flat(cols, sweep.cols)
    return _finish(pairs, of_rows), _finish(pairs, of_cols) if pairs.columns else {}


def _backward(
    sweep: Sweep, params: PyTree, x: PyTree, y: PyTree, a: PyTree, b: PyTree,
    lse: tuple[jax.Array | None, ...] | None, cotangents: tuple[Stats, Stats],
) -> tuple[PyTree, PyTree, PyTree]:  # fmt: skip
    """On one device: gradients of params (of its rows' pairs), of its rows x and of its columns y."""
    each = sweep.pairs.each
    name = "lse" if each is None else "each"
    wide_x, wide_y = _wide(x), _wide(y)
    of_rows, of_cols = ({n: c[n] for n in (name, "target")} if c else {} for c in cotangents)
    if lse is not None:
        of_rows, of_cols = (
            of if v is None else {**of, "at": _finite(v)} for of, v in zip((of_rows, of_cols), lse)
        )
    x_tiles, a_tiles, of_tiles = sweep.split((wide_x, a, of_rows), sweep.tile)
    i, real = sweep.row_indices()

    def slope(s_RS: Any, where_RS: Any, t_RS: Any, of_R: Stats, of_S: Stats) -> jax.Array:
        """d(loss)/d(score) of one tile."""
        drop = lambda g: g if where_RS is None else jnp.where(where_RS, g, 0)
        ends = [{n: v[:, None] for n, v in of_R.items()}]
        if of_S:
            ends.append({n: v[None, :] for n, v in of_S.items()})
        g_RS = t_RS * sum(of["target"] for of in ends)
        if each is not None:
            curve, one = each, jnp.ones_like(s_RS)
            _, d_RS = jax.jvp(lambda s: curve(s, t_RS), (s_RS,), (one,))
            return g_RS + drop(sum(of["each"] for of in ends) * d_RS)
        kept_RS = s_RS if where_RS is None else jnp.where(where_RS, s_RS, -jnp.inf)
        return g_RS + sum(of["lse"] * jnp.exp(kept_RS - of["at"]) for of in ends)

    def slice_(carry: PyTree, here: PyTree, k: Any) -> tuple[PyTree, PyTree]:
        d_params, d_x, waiting = carry
        y_S, b_S, of_S = here
        y_S, col = _wide(y_S), (*sweep.columns(k), b_S)
        # reduces the previous slice's gradients over devices while this slice is computed
        ready = () if waiting is None else jax.tree.map(sweep.scatter, waiting, y)

        def tile(sums: PyTree, xs: PyTree) -> tuple[PyTree, PyTree]:
            x_R, row, of_R, d_x_R = xs

            def score(params: PyTree, x_R: PyTree, y_S: PyTree) -> Any:
                s_RS, *rest = sweep.scores(params, x_R, y_S, row, col)
                return s_RS, rest

            s_RS, pull, (where_RS, t_RS, _) = jax.vjp(score, params, x_R, y_S, has_aux=True)
            d_p, d_x, d_y = pull(slope(s_RS, where_RS, t_RS, of_R, of_S))
            add = functools.partial(jax.tree.map, jnp.add)
            return add(sums, (d_p, d_y)), add(d_x_R, d_x)

        zeros = jax.tree.map(jnp.zeros_like, (params, y_S))
        xs = (x_tiles, (i, real, a_tiles), of_tiles, d_x)
        (d_p, d_y), d_x = jax.lax.scan(tile, zeros, xs)
        return (jax.tree.map(jnp.add, d_params, d_p), d_x, d_y), ready

    whole = lambda v: jnp.zeros((sweep.ways * sweep.part, *v.shape[1:]), v.dtype)
    waiting = jax.tree.map(whole, wide_y) if sweep.slices > 1 else None
    carry = (*jax.tree.map(jnp.zeros_like, (params, x_tiles)), waiting)
    parts = sweep.split((y, b, of_cols), sweep.part)
    (d_params, d_x, last), d_y = sweep.over_slices(parts, carry, slice_)
    last = jax.tree.map(lambda v, w: sweep.scatter(v, w)[None], last, y)
    if sweep.slices > 1:  # the first that came out was of no slice
        last = jax.tree.map(lambda many, one: jnp.concatenate([many[1:], one]), d_y, last)
    if sweep.axes:
        d_params = jax.lax.psum(d_params, sweep.axes)
    fit = lambda g, v: g.reshape(-1, *v.shape[1:])[: v.shape[0]].astype(v.dtype)
    return d_params, jax.tree.map(fit, d_x, x), jax.tree.map(fit, last, y)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _reduce(
    sweep: Sweep, params: PyTree, x: PyTree, y: PyTree, a: PyTree, b: PyTree
) -> tuple[Stats, Stats]:
    run = sweep.over_mesh(
        functools.partial(_forward, sweep), (False, True, True, True, True), (True, True)
    )
    return run(params, x, y, a, b)


def _reduce_fwd(sweep: Sweep, *args: PyTree) -> tuple[Any, Any]:
    out = typing.cast(tuple[Stats, Stats], _reduce(sweep, *args))
    lse = None if sweep.pairs.each else tuple(o["lse"] if o else None for o in out)
    return out, (args, lse)


def _reduce_bwd(sweep: Sweep, saved: Any, cotangents: Any) -> tuple[Any, ...]:
    args, lse = saved
    run = sweep.over_mesh(
        functools.partial(_backward, sweep),
        (False, True, True, True, True, True, True),
        (False, True, True),
    )
    return (*run(*args, lse, cotangents), None, None)


_reduce.defvjp(_reduce_fwd, _reduce_bwd)
