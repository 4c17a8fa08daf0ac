"""Exact ranks among all pairs of two sets of embeddings, one tile at a time: no matrix of all scores is held.

A score is the inner product of two float32 rows, as float64 gives it. The devices compute each tile in float32; the few
scores whose comparison float32 cannot decide are computed again in float64. So ranks equal those of a full float64
matrix, whatever the tile, the mesh and the chip.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float, Int

from vlp.core import interrupt, local
from vlp.core import mesh as meshes
from vlp.core.types import Result

TIE = 1e-12  # × the norms of both rows: scores that are closer are equal
CHUNK_BYTES = 2**26  # of rows in float64 at a time


def ranks(
    images_NE: Float[np.ndarray, "N E"],
    texts_ME: Float[np.ndarray, "M E"],
    owner_M: Int[np.ndarray, "M"],
    mesh: Mesh,
    tile: int = 4096,
) -> tuple[Int[np.ndarray, "N"], Int[np.ndarray, "M"]]:
    """Ranks (1 is best) of each image's best text among all texts, and of each text's image among all images.

    A rank is one plus the number of wrong answers that score as high as the best right one, or higher: ties count
    against the model, and so does a score that is not a number. Recall@k is the share of ranks up to k.

    Args:
        images_NE: one row an image, float32.
        texts_ME: one row a text, float32; an image may have several.
        owner_M: the image of each text.
        mesh: each tile's images are shared among its devices.
        tile: rows and columns of a tile; the peak memory is about 12 · tile² bytes on all devices together, and
            O(N + M) on the host.
    """
    images_NE, texts_ME = (np.ascontiguousarray(x, np.float32) for x in (images_NE, texts_ME))
    sides = _Side.of(images_NE, texts_ME), _Side.of(texts_ME, images_NE)
    step = _step(images_NE)
    for first in range(0, len(texts_ME), step):  # scores of the matches
        here = slice(first, first + step)
        score = _dots(images_NE, texts_ME, owner_M[here], np.arange(len(texts_ME))[here])
        score = np.where(np.isnan(score), -np.inf, score)
        sides[1].best[here] = score
        np.maximum.at(sides[0].best, owner_M[here], score)
    ways = meshes.batch_ways(mesh)
    rows = -(-min(tile, len(images_NE)) // ways) * ways
    columns = min(tile, len(texts_ME))
    for top in range(0, len(images_NE), rows):
        image = _placed(sides[0], np.arange(len(images_NE)), top, rows, mesh, shared=True)
        for left in range(0, len(texts_ME), columns):
            interrupt.poll()
            text = _placed(sides[1], owner_M, left, columns, mesh, shared=False)
            _count(sides, (top, left), _tile(image, text))
    return sides[0].count + 1, sides[1].count + 1


def results(both: tuple[np.ndarray, np.ndarray], where: dict[str, Any]) -> Iterator[Result]:
    """Yields R@1, R@5, R@10 and the median rank, of images and of texts.

    Args:
        both: as `ranks` returns them.
        where: the provenance.
    """
    for name, found in zip(("i2t", "t2i"), both):
        for k in (1, 5, 10):
            yield Result(f"{name}/R@{k}", float((found <= k).mean()), where)
        yield Result(f"{name}/median_rank", float(np.median(found)), where)


def rule(tile: int) -> tuple[bool, str]:
    """Returns whether a tile's side is allowed, and what is (`check.bounds`)."""
    return 1 <= tile <= 2**15, "in 1 … 32,768 (12 · tile² bytes)"


class _Side:
    """The images or the texts: the best match's score (f64), its bounds in float32, and the count of better ones."""

    def __init__(self, rows: np.ndarray, scale: np.ndarray, most: float):
        self.rows, self.scale, self._most = rows, scale, most
        self.best = np.full(len(rows), -np.inf)
        self.count = np.zeros(len(rows), np.int64)

    @classmethod
    def of(cls, rows: np.ndarray, others: np.ndarray) -> _Side:
        """most: the largest norm of the others; scale: the norm of each row times that."""
        norms = np.sqrt(np.einsum("ne,ne->n", rows, rows, dtype=np.float64))
        most = np.sqrt(np.einsum("ne,ne->n", others, others, dtype=np.float64)).max()
        return cls(rows, norms * most, float(most))

    def bounds(self, here: slice) -> tuple[np.ndarray, np.ndarray]:
        """Scores of a tile below the first are worse than the best match, those from the second on are not.

        An inner product of E terms in float32 is off by at most E · 2⁻²⁴ times the norms (Higham 2002, §3.1).
        """
        width = self.rows.shape[1]
        margin = (width + 16) * 2.0**-24 * self.scale[here] + 1e-37
        best = self.best[here]
        low, high = ((best + sign * margin).astype(np.float32) for sign in (-1, 1))
        return np.nextafter(low, np.float32(-np.inf)), np.nextafter(high, np.float32(np.inf))


def _placed(
    side: _Side, group: np.ndarray, first: int, num: int, mesh: Mesh, *, shared: bool
) -> dict[str, jax.Array]:
    """A tile's rows with their groups (-1: a filler) and bounds; `shared` among the devices, else whole on each."""
    here = slice(first, first + num)
    low, high = side.bounds(here)
    values = {"z": side.rows[here], "group": group[here].astype(np.int32), "low": low, "high": high}
    filled = {}
    for name, value in values.items():
        full = np.full((num, *value.shape[1:]), -1 if name == "group" else 0, value.dtype)
        full[: len(value)] = value
        filled[name] = full
    if not shared:
        return jax.device_put(filled, meshes.replicated(mesh))
    mine = local.indices(num, mesh)
    return meshes.to_global({k: v[mine] for k, v in filled.items()}, mesh)


@functools.partial(jax.jit)
def _tile(image: dict[str, jax.Array], text: dict[str, jax.Array]) -> tuple[tuple, tuple]:
    """For rows, then columns: how many wrong answers surely count, and which scores are to be computed again."""
    highest = jax.lax.Precision.HIGHEST
    score_TU = jnp.dot(image["z"], text["z"].T, precision=highest)
    own_T1, own_1U = image["group"][:, None], text["group"][None, :]
    wrong_TU = (own_T1 != own_1U) & (own_T1 >= 0) & (own_1U >= 0)

    def one(low: jax.Array, high: jax.Array, axis: int) -> tuple[jax.Array, jax.Array]:
        sure_TU = wrong_TU & ~(score_TU < high)
        return sure_TU.sum(axis), wrong_TU & ~(score_TU < low) & (score_TU < high)

    rows = one(image["low"][:, None], image["high"][:, None], 1)
    return rows, one(text["low"][None, :], text["high"][None, :], 0)


def _count(sides: tuple[_Side, _Side], corner: tuple[int, int], found: tuple[tuple, tuple]) -> None:
    """Adds a tile's counts, after deciding in float64 what float32 could not."""
    for axis, (side, (sure, again)) in enumerate(zip(sides, found)):
        sure = meshes.to_host(sure)[: len(side.count) - corner[axis]]
        side.count[corner[axis] : corner[axis] + len(sure)] += sure
        again_TU = meshes.to_host(again)
        flat = np.flatnonzero(again_TU)
        dense = len(flat) > again_TU.size // 16
        if dense:
            here = [slice(c, c + n) for c, n in zip(corner, again_TU.shape)]
            scores = sides[0].rows[here[0]].astype(np.float64) @ sides[1].rows[here[1]].T
        step = _step(sides[0].rows)
        for start in range(0, len(flat), step):
            row, column = np.divmod(flat[start : start + step], again_TU.shape[1])
            i, j = row + corner[0], column + corner[1]
            score = scores[row, column] if dense else _dots(sides[0].rows, sides[1].rows, i, j)
            query = (i, j)[axis]
            worse = score < side.best[query] - TIE * side.scale[query]
            np.add.at(side.count, query[~worse], 1)


def _step(rows: np.ndarray) -> int:
    """Returns how many pairs of rows have `CHUNK_BYTES` bytes in float64."""
    return max(1, CHUNK_BYTES // (16 * rows.shape[1]))


def _dots(a: np.ndarray, b: np.ndarray, i: np.ndarray, j: np.ndarray) -> np.ndarray:
    """Inner products of the rows a[i] and b[j], in float64."""
    return np.einsum("pe,pe->p", a[i].astype(np.float64), b[j].astype(np.float64))


def top(
    query_E: Float[np.ndarray, "E"], rows_NE: Float[np.ndarray, "N E"], num: int
) -> tuple[list[int], list[float]]:
    """The best `num` rows for a query, best first (of equal ones the first), and their scores in float64."""
    step = _step(rows_NE)
    score = np.concatenate([
        rows_NE[k : k + step].astype(np.float64) @ query_E.astype(np.float64)
        for k in range(0, len(rows_NE), step)
    ])  # fmt: skip
    found = np.argsort(-score, kind="stable")[:num]
    return found.tolist(), score[found].tolist()
