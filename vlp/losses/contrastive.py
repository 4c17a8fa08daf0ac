"""Contrastive losses per example, exact over the global batch, in float32 or wider.

Further keys can be added to the batch's own: a queue, hard negatives, more captions (`Columns`). Texts may be [B K E],
with K captions per image. `losses.reference` has the plain B × B form of every loss.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from vlp.core import check
from vlp.core import mesh as meshes
from vlp.core.types import Term
from vlp.losses import pairs

PyTree = Any
Stats = pairs.Stats
Function = Callable[..., jax.Array]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Columns:
    """Further columns of the logits: Q embeddings without a positive pair in the batch.

    Attributes:
        z: embeddings [Q E], or the pytree that the score takes. Differentiated.
        leaves: arrays that `where` and `targets` read, with the structure of the batch's leaves.
        where: bool[Q], which of them exist (None: all).
    """

    z: PyTree
    leaves: PyTree = ()
    where: Any = None


def softmax(
    zi: PyTree,
    zt: PyTree,
    scale: Float[Array, ""],
    *,
    where: Function | None = None,
    targets: Function | Float[Array, "B B"] | None = None,
    a: PyTree = (),
    b: PyTree = (),
    where_BK: Bool[Array, "B ..."] | None = None,
    more_texts: Columns | Float[Array, "Q E"] | None = None,
    more_images: Columns | Float[Array, "M E"] | None = None,
    score: Function = pairs.dot,
    params: PyTree = None,
    chunk: int = 0,
) -> Stats:
    """Cross-entropy of each image over all texts (`i2t`) and of each text over all images (`t2i`).

    Args:
        zi: Unit vectors [B E] of the images. With another `score`, any pytree with leading axis B.
        zt: Unit vectors [B E] of the texts; row k belongs to image k. Or [B K E], K captions of each image: caption k
            is contrasted with the captions k of the other images, and the result is the mean over captions.
        scale: Multiplies the scores.
        where: where(i, j, a, b) → bool, which pairs are in the denominators (`losses.pairs.Pairs`). j ≥ B is a
            further text, i ≥ B a further image.
        targets: targets(i, j, a, b) ≥ 0, the target weight of image i and text j (default: 1 where i = j, else 0).
            Normalised per image for i2t and per text for t2i; a row whose targets are all 0 has loss 0. Or a matrix
            [B B], which needs B² memory.
        a: Pytree of the images, with leading axis B, that `where` and `targets` read. Not differentiated.
        b: The same of the texts, with leading axes [B K] if zt has them.
        where_BK: bool of zt's leading shape, which texts exist. A missing text is in no denominator and its row has
            loss 0. The mean over captions is over those that exist.
        more_texts: Further columns of i2t, Q embeddings (a queue, negatives).
        more_images: Further columns of t2i, M embeddings.
        score: Score of a pair: `losses.pairs.dot`, `losses.pairs.TokenSets()`, or another function.
        params: Further parameters of the score, a dict. Differentiated.
        chunk: Number of texts gathered at a time (0: 1,024). Changes memory, not values.

    Returns:
        Arrays [B]. `i2t`, `t2i`: the losses. `lse_i2t`, `lse_t2i`: log-sum-exp of an image's and of a text's scores.
        `positive`: score of the positive pair (with `targets`: an image's mean score, weighted by them). `hit_i2t`,
        `hit_t2i`: 1 if the positive pair has the highest score (retrieval@1), 1/n if n pairs share it.

    Raises:
        UserError: the numbers of images and texts differ, or a matrix of targets has another shape or is combined
            with further columns.

    Source: CLIP (Radford et al. 2021, arXiv:2103.00020, fig. 3), whose loss is (i2t + t2i) / 2.
    """
    if _has_captions(zi, zt):
        one = lambda text, where_B: softmax(
            zi, text[0], scale, where=where, targets=targets, a=a, b=text[1], where_BK=where_B,
            more_texts=more_texts, more_images=more_images, score=score, params=params, chunk=chunk,
        )  # fmt: skip
        return over_captions(one, (zt, b), where_BK)
    num = _num_pairs(zi, zt)
    more_texts, more_images = _columns(more_texts), _columns(more_images)
    if targets is not None and not callable(targets):
        targets = jnp.asarray(targets)
        if targets.shape != (num, num) or more_texts or more_images:
            got, do = f"targets {targets.shape}", "give a number for each pair, or a function"
            if targets.shape == (num, num):
                got = "a matrix of targets and further columns"
            raise check.error("losses.contrastive", got, f"{(num, num)}", do)
        a, where, targets = (a, targets), where and _IgnoreMatrix(where), _row_of_matrix
    what = pairs.Pairs(score=score, where=where, targets=targets)
    weights = {"scale": scale, **(params or {})}
    image, text = _both_ways(what, weights, zi, zt, a, b, where_BK, more_texts, more_images, chunk)
    return {
        "i2t": _cross_entropy(image, targets, where_BK),
        "t2i": _cross_entropy(text, targets, where_BK),
        "lse_i2t": image["lse"],
        "lse_t2i": text["lse"],
        "positive": _mean_score(image, targets),
        "hit_i2t": image["hit"],
        "hit_t2i": text["hit"],
    }


def one_way(
    z: PyTree,
    keys: PyTree,
    scale: Float[Array, ""],
    *,
    where: Function | None = None,
    targets: Function | None = None,
    a: PyTree = (),
    b: PyTree = (),
    more: Columns | Float[Array, "Q E"] | None = None,
    score: Function = pairs.dot,
    params: PyTree = None,
    chunk: int = 0,
) -> Stats:
    """Cross-entropy of each row over all keys, in one direction, for keys of a teacher or a queue.

    Args:
        z: Unit vectors [B E].
        keys: Unit vectors [C E], C ≥ B; key k belongs to row k.
        scale, where, targets, score, params, chunk: As in `softmax`.
        a, b: Pytrees of the rows and of the keys, for `where` and `targets`.
        more: Further keys (a queue), with indices from C.

    Returns:
        Arrays [B]: `nll`, `lse`, `positive` and `hit`, as `i2t`, `lse_i2t`, `positive` and `hit_i2t` of `softmax`.

    Source: MoCo (He et al. 2020, arXiv:1911.05722, eq. 1).
    """
    what = pairs.Pairs(score=score, where=where, targets=targets, columns=False)
    weights = {"scale": scale, **(params or {})}
    row, _ = _both_ways(what, weights, z, keys, a, b, None, _columns(more), None, chunk)
    nll = _cross_entropy(row, targets, None)
    return {"nll": nll, "lse": row["lse"], "positive": _mean_score(row, targets), "hit": row["hit"]}


def teacher_targets(
    z_BE: Float[Array, "B E"],
    keys_CE: Float[Array, "C E"],
    scale: Float[Array, ""],
    alpha: Float[Array, ""] | float = 1.0,
    *,
    more: Float[Array, "Q E"] | None = None,
) -> dict[str, Any]:
    """Soft targets α · softmax(scale · z·keys) + (1 − α) · identity, as arguments of `one_way`; without gradient.

    Args:
        z_BE: The teacher's rows, unit vectors.
        keys_CE: The teacher's keys, unit vectors.
        scale: Multiplies the teacher's scores.
        alpha: Weight of the softmax, in [0, 1].
        more: Further keys (a queue), for both the targets and the student's loss.

    Returns:
        `targets`, `a`, `b` and `more`: one_way(z, keys, scale, **teacher_targets(…)).

    Source: ALBEF (Li et al. 2021, arXiv:2107.07651, eq. 6).
    """
    z_BE, keys_CE, scale, more = jax.lax.stop_gradient((z_BE, keys_CE, scale, more))
    lse_B = one_way(z_BE, keys_CE, scale, more=more)["lse"]
    wide = lambda v: v.astype(jnp.promote_types(v.dtype, jnp.float32))
    alpha_B = jnp.broadcast_to(jnp.asarray(alpha, lse_B.dtype), lse_B.shape)
    found = None if more is None else Columns(more, wide(more))
    rows = {"z": scale * wide(z_BE), "lse": lse_B, "alpha": jax.lax.stop_gradient(alpha_B)}
    return {"targets": _mixed, "a": rows, "b": wide(keys_CE), "more": found}


def _mixed(i_R1: jax.Array, j_1S: jax.Array, a: PyTree, b_SE: jax.Array) -> jax.Array:
    s_RS = jnp.einsum("re,se->rs", a["z"], b_SE, precision=jax.lax.Precision.HIGHEST)
    alpha_R1 = a["alpha"][:, None]
    return alpha_R1 * jnp.exp(s_RS - a["lse"][:, None]) + (1 - alpha_R1) * (i_R1 == j_1S)


def sigmoid(
    zi: PyTree,
    zt: PyTree,
    scale: Float[Array, ""],
    bias: Float[Array, ""],
    *,
    where: Function | None = None,
    targets: Function | None = None,
    a: PyTree = (),
    b: PyTree = (),
    where_BK: Bool[Array, "B ..."] | None = None,
    more_texts: Columns | Float[Array, "Q E"] | None = None,
    more_images: Columns | Float[Array, "M E"] | None = None,
    score: Function = pairs.dot,
    params: PyTree = None,
    chunk: int = 0,
) -> Stats:
    """Sigmoid loss: Σⱼ −log σ(z (scale · xᵢ·yⱼ + bias)) over texts j, with z = 1 if i = j and −1 otherwise.

    Every pair is one binary decision (SigLIP, Zhai et al. 2023, arXiv:2303.15343, eq. 2).

    Args:
        bias: Added to the scores.
        targets: targets(i, j, a, b) in [0, 1], the probability that i and j match (default: 1 where i = j, else 0).
        more_images: Further images; their pairs are added to the loss of the text's example.
        where_BK: As in `softmax`; pairs of a missing text are not counted, and the loss of its image is 0.
        All others: As in `softmax`.

    Returns:
        Arrays [B]: `loss` (a sum over texts, not a mean), `hit_i2t`, `hit_t2i`.

    Raises:
        UserError: the numbers of images and texts differ.
    """
    if _has_captions(zi, zt):
        one = lambda text, where_B: sigmoid(
            zi, text[0], scale, bias, where=where, targets=targets, a=a, b=text[1], where_BK=where_B,
            more_texts=more_texts, more_images=more_images, score=score, params=params, chunk=chunk,
        )  # fmt: skip
        return over_captions(one, (zt, b), where_BK)
    _num_pairs(zi, zt)
    each = _binary if targets is None else _soft_binary
    what = pairs.Pairs(score=score, where=where, targets=targets, each=each)
    weights = {"scale": scale, "bias": bias, **(params or {})}
    more_texts, more_images = _columns(more_texts), _columns(more_images)
    image, text = _both_ways(what, weights, zi, zt, a, b, where_BK, more_texts, None, chunk)
    loss = image["each"]
    if more_images:
        _, others = _further_rows(what, weights, more_images, zt, a, b, where_BK, chunk)
        loss = loss + others["each"]
        text = pairs.join(text, others)
    if where_BK is not None:
        loss = jnp.where(where_BK, loss, 0)
    return {"loss": loss, "hit_i2t": image["hit"], "hit_t2i": text["hit"]}


def _binary(score: jax.Array, target: jax.Array) -> jax.Array:
    return -jax.nn.log_sigmoid((2 * target - 1) * score)


def _soft_binary(score: jax.Array, target: jax.Array) -> jax.Array:
    return -target * jax.nn.log_sigmoid(score) - (1 - target) * jax.nn.log_sigmoid(-score)


def over_captions(
    f: Callable[[PyTree, jax.Array | None], Stats],
    zt_BKE: PyTree,
    where_BK: Bool[Array, "B K"] | None = None,
) -> Stats:
    """Computes a loss for each caption index k and returns its mean over k.

    Caption k of an image is contrasted with the captions k of the other images.

    Args:
        f: f(zt_BE, where_B), the loss of one caption per image; its results have leading axis B.
        zt_BKE: Texts, or a pytree with leading axes [B K].
        where_BK: Which captions exist. The mean is over those; an example without captions gets 0.

    Returns:
        The structure that f returns. The captions are scanned, so the compiled program does not grow with K.

    Source: LaCLIP (Fan et al. 2023, arXiv:2305.20088, §3.2) draws one of the captions; this is the expectation.
    """
    num, given = jax.tree.leaves(zt_BKE)[0].shape[1], (zt_BKE, where_BK)
    if num == 1:
        return f(*jax.tree.map(lambda v: v[:, 0], given))

    def captions_first(v: Any) -> jax.Array:
        v = jnp.moveaxis(jnp.asarray(v), 1, 0)
        return meshes.constrain(v, None, "batch", *[None] * (v.ndim - 2))

    def body(sums: Stats, xs: PyTree) -> tuple[Stats, None]:
        return jax.tree.map(jnp.add, sums, f(*xs)), None

    zero = jax.eval_shape(f, *jax.tree.map(lambda v: v[:, 0], given))
    zero = jax.tree.map(lambda v: jnp.zeros(v.shape, v.dtype), zero)
    if where_BK is None:
        sums, _ = jax.lax.scan(body, zero, jax.tree.map(captions_first, given))
        return jax.tree.map(lambda v: v / num, sums)

    def existing(sums: Stats, xs: PyTree) -> tuple[Stats, None]:
        add = lambda s, v: s + jnp.where(_rows_like(xs[1], v), v, 0)
        return jax.tree.map(add, sums, f(*xs)), None

    sums, _ = jax.lax.scan(existing, zero, jax.tree.map(captions_first, given))
    count_B = jnp.maximum(where_BK.sum(1), 1)
    return jax.tree.map(lambda v: v / _rows_like(count_B, v), sums)


def _rows_like(x_B: jax.Array, like: jax.Array) -> jax.Array:
    return x_B.reshape(-1, *[1] * (like.ndim - 1))


def metrics(
    loss: Stats,
    scale: Float[Array, ""],
    left_out: int = 0,
    more_texts: int = 0,
    more_images: int = 0,
) -> dict[str, Term]:
    """Metrics to log: retrieval@1, the logit scale, and the loss minus that of a random model (ln of the columns).

    Args:
        loss: A result of `softmax` or `sigmoid`.
        scale: The logit scale.
        left_out: Number of pairs per row that are not in its denominator: 1 for leave-one-out.
        more_texts: Number of further columns of i2t.
        more_images: Number of further columns of t2i.

    Returns:
        Terms by name. "contrastive/minus_log_batch" exists only for `softmax`.
    """
    num = loss["hit_i2t"].shape[0]
    hits_B = 0.5 * (loss["hit_i2t"] + loss["hit_t2i"])
    out = {"contrastive/retrieval@1": Term(hits_B.sum(), num), "logit_scale": Term(scale, 1)}
    if "i2t" in loss:
        logs = [math.log(num - left_out + more) for more in (more_texts, more_images)]
        excess_B = 0.5 * (loss["i2t"] + loss["t2i"]) - 0.5 * sum(logs)
        out["contrastive/minus_log_batch"] = Term(excess_B.sum(), num)
    return out


def _has_captions(zi: PyTree, zt: PyTree) -> bool:
    """Returns whether texts are [B K E] and images [B E]."""
    return isinstance(zt, jax.Array) and zt.ndim == 3 and jnp.ndim(zi) == 2


def _num_pairs(zi: PyTree, zt: PyTree) -> int:
    """Returns the number of pairs. Raises UserError if the numbers of images and texts differ."""
    shapes = lambda z: z.shape if isinstance(z, jax.Array) else jax.tree.leaves(z)[0].shape[:1]
    if isinstance(zi, jax.Array) == isinstance(zt, jax.Array) and shapes(zi) != shapes(zt):
        got, do = f"{shapes(zi)} images and {shapes(zt)} texts", "give one text for each image"
        raise check.error("losses.contrastive", got, "equal shapes", do)
    return jax.tree.leaves(zi)[0].shape[0]


def _columns(more: Columns | jax.Array | None) -> Columns | None:
    return more if more is None or isinstance(more, Columns) else Columns(more)


def _both_ways(
    what: pairs.Pairs, params: PyTree, x: PyTree, y: PyTree, a: PyTree, b: PyTree,
    exists: jax.Array | None, more_y: Columns | None, more_x: Columns | None, chunk: int,
) -> tuple[Stats, Stats]:  # fmt: skip
    """Sums of each row x over y and more_y, and of each column y over x and more_x. exists: bool, which y exist."""
    rows, cols = _reduce(what, params, x, y, a, b, exists, chunk)
    if more_y:
        num = jax.tree.leaves(y)[0].shape[0]
        part = dataclasses.replace(what, first_column=num, columns=False)
        further, _ = _reduce(part, params, x, more_y.z, a, more_y.leaves, more_y.where, chunk)
        rows = pairs.join(rows, further)
    if more_x:
        _, further = _further_rows(what, params, more_x, y, a, b, exists, chunk)
        cols = pairs.join(cols, further)
    return rows, cols


def _further_rows(
    what: pairs.Pairs, params: PyTree, more: Columns, y: PyTree, a: PyTree, b: PyTree,
    exists: jax.Array | None, chunk: int,
) -> tuple[Stats, Stats]:  # fmt: skip
    part = dataclasses.replace(what, first_row=jax.tree.leaves(y)[0].shape[0])
    return _reduce(part, params, more.z, y, more.leaves, b, exists, chunk, more.where)


def _reduce(
    what: pairs.Pairs, params: PyTree, x: PyTree, y: PyTree, a: PyTree, b: PyTree,
    of_y: jax.Array | None, chunk: int, of_x: jax.Array | None = None,
) -> tuple[Stats, Stats]:  # fmt: skip
    """`pairs.reduce` over the rows and columns that exist: bool masks of_x and of_y (None: all)."""
    if of_x is not None or of_y is not None:
        targets = what.targets and _TargetsOfExisting(what.targets)
        what = dataclasses.replace(what, where=_Existing(what.where), targets=targets)
        a, b = (a, of_x), (b, of_y)
    return pairs.reduce(what, params, x, y, a, b, chunk=chunk)


@dataclasses.dataclass(frozen=True)
class _Existing:
    """`where`, and False for rows and columns that do not exist. a and b are pairs (leaves, mask)."""

    where: Function | None

    def __call__(self, i: Any, j: Any, a: PyTree, b: PyTree) -> jax.Array:
        masks = [] if self.where is None else [self.where(i, j, a[0], b[0])]
        masks += [] if a[1] is None else [a[1][:, None]]
        masks += [] if b[1] is None else [b[1][None, :]]
        return functools.reduce(jnp.logical_and, masks)


@dataclasses.dataclass(frozen=True)
class _TargetsOfExisting:
    """`targets`, 0 where a row or column does not exist."""

    targets: Function

    def __call__(self, i: Any, j: Any, a: PyTree, b: PyTree) -> jax.Array:
        return jnp.where(_Existing(None)(i, j, a, b), self.targets(i, j, a[0], b[0]), 0)


@dataclasses.dataclass(frozen=True)
class _IgnoreMatrix:
    """Calls `where` without the matrix of targets, which is the second item of a."""

    where: Function

    def __call__(self, i: Any, j: Any, a: PyTree, b: PyTree) -> jax.Array:
        return self.where(i, j, a[0], b)


def _row_of_matrix(i_B1: Any, j_1B: jax.Array, a: PyTree, b: Any) -> jax.Array:
    return jnp.take(a[1], j_1B[0], axis=1, mode="clip")


def _mean_score(sums: Stats, targets: Any) -> jax.Array:
    """Returns the positive pair's score, or the mean score weighted by the targets (0 if all are 0)."""
    if targets is None:
        return sums["target"]
    return sums["target"] / jnp.where(sums["mass"] > 0, sums["mass"], 1)


def _cross_entropy(sums: Stats, targets: Any, exists: jax.Array | None) -> jax.Array:
    """Returns the cross-entropy per row; 0 for a row without targets and for a row that does not exist."""
    loss = sums["lse"] - _mean_score(sums, targets)
    if targets is not None:
        loss = jnp.where(sums["mass"] > 0, loss, 0)
    return loss if exists is None else jnp.where(exists, loss, 0)
