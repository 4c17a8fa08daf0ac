"""The engine of sums over pairs: every variant, chunk and mesh against float64 sums over the whole matrix."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from vlp.core import mesh as meshes
from vlp.core.check import UserError
from vlp.losses import contrastive, pairs, reference


def other_caption(i, j, a, b):
    """Equal captions are no negatives of each other; the own one always counts."""
    return (a[:, None] != b[None, :]) | (i == j)


def same_group(i, j, a, b):
    """Soft targets: half of a point for the group, one for the pair."""
    return 0.5 * (a[:, None] == b[None, :]) + 0.5 * (i == j)


def euclid(params, x, y, precision):
    square = (x**2).sum(1)[:, None] + (y**2).sum(1)[None, :]
    return -params["scale"] * (square - 2 * jnp.einsum("re,se->rs", x, y, precision=precision))


VARIANTS = {
    "identity": pairs.Pairs(),
    "where": pairs.Pairs(where=other_caption),
    "targets": pairs.Pairs(targets=same_group),
    "where and targets": pairs.Pairs(where=other_caption, targets=same_group),
    "sigmoid": pairs.Pairs(each=contrastive._binary),
    "sigmoid, where": pairs.Pairs(each=contrastive._binary, where=other_caption),
    "euclid": pairs.Pairs(score=euclid),
}


def whole(variant, params, x, y, a, b):
    """Every result from the whole matrix at once; no chunks, no running sums, no derivative of ours."""
    num = np.arange(x.shape[0])[:, None], np.arange(y.shape[0])[None, :]
    scores = variant.score(params, x, y, jax.lax.Precision.HIGHEST)
    own = num[0] == num[1]
    targets = variant.targets(*num, a, b) if variant.targets else own
    targets = jnp.asarray(targets, scores.dtype)
    where = variant.where(*num, a, b) if variant.where else jnp.ones(scores.shape, bool)
    out = []
    for axis in (1, 0):
        if variant.each is None:
            sums = {"lse": jax.nn.logsumexp(jnp.where(where, scores, -jnp.inf), axis)}
        else:
            sums = {"each": jnp.where(where, variant.each(scores, targets), 0).sum(axis)}
        kept = jnp.where(where, scores, -jnp.inf)
        best = kept.max(axis, keepdims=True)
        ties = (kept == best).sum(axis)
        hit = (jnp.where(own, scores, -jnp.inf).max(axis) >= best.squeeze(axis)) / ties
        sums |= {"target": (targets * scores).sum(axis), "mass": targets.sum(axis), "hit": hit}
        sums |= {"max": best.squeeze(axis), "ties": ties}
        out.append(sums)
    return tuple(out)


def graded(f, args, weights):
    """Results, and the gradients of a weighted sum of all of them (so every cotangent is another number)."""

    def total(params, x, y):
        out = f(params, x, y, *args[3:])
        names = [n for n in out[0] if n in ("lse", "each", "target")]
        return sum((w[n] * o[n]).sum() for o, w in zip(out, weights) for n in names), out

    (_, out), grads = jax.value_and_grad(total, (0, 1, 2), has_aux=True)(*args[:3])
    return out, grads


def inputs(rows, cols, width, scale, seed=0):
    rng = np.random.default_rng(seed)
    unit = lambda z: z / np.linalg.norm(z, axis=1, keepdims=True)
    x, y = (unit(rng.normal(size=(n, width))) for n in (rows, cols))
    a, b = (rng.integers(0, 3, n) for n in (rows, cols))
    names = ("lse", "each", "target")
    weights = tuple({k: rng.uniform(0.5, 2, n) for k in names} for n in (rows, cols))
    return ({"scale": np.float64(scale), "bias": np.float64(-3.0)}, x, y, a, b), weights


def both(variant, args, weights, dtype, shape=None, **sizes):
    """(ours, theirs): ours in dtype, on a mesh if `shape` is given; theirs in float64."""
    with jax.enable_x64(True):
        theirs = jax.device_get(graded(lambda *xs: whole(variant, *xs), args, weights))
    cast = lambda tree: jax.tree.map(
        lambda v: jnp.asarray(v, dtype if np.asarray(v).dtype.kind == "f" else jnp.int32), tree
    )
    run = jax.jit(lambda args, w: graded(lambda *xs: pairs.reduce(variant, *xs, **sizes), args, w))
    with jax.enable_x64(dtype == jnp.float64):
        args, weights = cast(args), cast(weights)
        if shape is None:
            return jax.device_get(run(args, weights)), theirs
        devices = jax.devices()[: int(np.prod(shape))]
        mesh = meshes.make(meshes.MeshShape(*shape), devices)
        rows, replicated = meshes.batch_sharding(mesh), meshes.replicated(mesh)
        args = tuple(
            jax.device_put(v, rows if k in (1, 3) else replicated) for k, v in enumerate(args)
        )
        with jax.set_mesh(mesh):
            return jax.device_get(run(args, jax.device_put(weights, replicated))), theirs


def check(ours, theirs, tolerance):
    leaves = zip(jax.tree.leaves_with_path(ours), jax.tree.leaves(theirs), strict=True)
    for (path, got), want in leaves:
        got, want = np.asarray(got, np.float64), np.asarray(want)
        one = np.isneginf(got) & np.isneginf(want)  # of a column that no row keeps
        got, want = np.where(one, 0, got), np.where(one, 0, want)
        off = np.linalg.norm(got - want) / max(np.linalg.norm(want), 1.0)
        assert off <= tolerance, f"{jax.tree_util.keystr(path)}: off by {off:.2g}"


@pytest.mark.parametrize("name", VARIANTS)
def test_chunks_of_any_size_are_the_whole_matrix(name):
    args, weights = inputs(12, 12, 5, 1 / 0.07)
    for sizes in ({}, {"chunk": 5, "tile": 7}, {"chunk": 1, "tile": 12}, {"chunk": 12, "tile": 4}):
        check(*both(VARIANTS[name], args, weights, jnp.float32, **sizes), 1e-5)
    args, weights = inputs(12, 12, 5, 100.0)
    check(*both(VARIANTS[name], args, weights, jnp.float64, chunk=5, tile=7), 1e-10)


@pytest.mark.parametrize("shape", [(2, 1, 1), (1, 4, 1), (8, 1, 1), (2, 2, 2)])
@pytest.mark.parametrize("name", ["where and targets", "sigmoid"])
def test_sharding_changes_nothing(name, shape):
    args, weights = inputs(16, 16, 4, 1 / 0.07, seed=1)
    check(*both(VARIANTS[name], args, weights, jnp.float32, shape), 1e-5)
    uneven = {"chunk": 9 * shape[0] * shape[1], "tile": 3}
    if shape != (2, 1, 1):
        uneven["chunk"] = 8  # one column of each device at a time
    check(*both(VARIANTS[name], args, weights, jnp.float32, shape, **uneven), 1e-5)
    args, weights = inputs(16, 16, 4, 100.0, seed=1)
    check(*both(VARIANTS[name], args, weights, jnp.float64, shape, **uneven), 1e-10)


@pytest.mark.parametrize("name", ["where and targets", "sigmoid", "euclid"])
def test_an_exchange_in_two_stages_is_the_same(name, monkeypatch):
    """What more than pairs.STAGE devices do: neighbours first, then those at the same place of each group."""
    monkeypatch.setattr(pairs, "STAGE", 2)
    args, weights = inputs(24, 24, 3, 100.0, seed=2)
    for shape in ((8, 1, 1), (2, 2, 2)):
        check(*both(VARIANTS[name], args, weights, jnp.float64, shape, chunk=8), 1e-10)


@settings(max_examples=10, deadline=None, derandomize=True, phases=[Phase.generate])
@given(st.data())
def test_pair_losses_take_any_shape(data):
    """More columns than rows are extra negatives; a device may have fewer rows than a tile."""
    draw = lambda low, high: data.draw(st.integers(low, high))
    ways = data.draw(st.sampled_from([1, 2, 8]))
    rows, cols = ways * draw(1, 3), draw(1, 5 * ways)
    args, weights = inputs(rows, cols, draw(1, 6), draw(1, 100), seed=draw(0, 99))
    name = data.draw(st.sampled_from(["identity", "where", "targets", "sigmoid, where", "euclid"]))
    shape = None if ways == 1 else (ways, 1, 1)
    sizes = {"chunk": draw(1, cols + 3), "tile": draw(1, 4)}
    check(*both(VARIANTS[name], args, weights, jnp.float64, shape, **sizes), 1e-9)


def sets(rows, cols, num_row, num_col, width):
    """Token sets of ragged sizes; the first row and the second column are empty."""
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(rows, num_row, width)), rng.normal(size=(cols, num_col, width))
    x_has, y_has = (rng.uniform(size=z.shape[:2]) < 0.7 for z in (x, y))
    x_has[0], y_has[1] = False, False
    x_has[1:, 0], y_has[0, 0], y_has[2:, 0] = True, True, True
    return (x, x_has), (y, y_has)


@pytest.mark.parametrize("shape", [None, (4, 2, 1)])
@pytest.mark.parametrize("mean_over", ["columns", "rows", "both"])
def test_scores_of_token_sets(mean_over, shape):
    """A few columns at a time, the last ones fewer, are the plain form."""
    (x, x_has), (y, y_has) = sets(8, 9, 3, 5, 4)
    (params, *_), weights = inputs(8, 9, 1, 2.0)
    filled = [jnp.asarray(h | ~h.any(1, keepdims=True)) for h in (x_has, y_has)]
    empty = ~x_has.any(1)[:, None] | ~y_has.any(1)[None, :]
    variant = pairs.Pairs(score=pairs.TokenSets(mean_over, numbers=3 * 5 * 6))

    def score(params, x, y, precision):
        scores = reference.token_sets(x, y, *filled, mean_over=mean_over)
        return params["scale"] * jnp.where(empty, 0, scores) + params["bias"]

    def theirs(params, x, y):
        return whole(pairs.Pairs(score=score), params, x, y, (), ())

    def ours(params, x, y):
        has = jnp.asarray(x_has), jnp.asarray(y_has)
        return pairs.reduce(variant, params, (x, has[0]), (y, has[1]), chunk=4)

    run = lambda f: jax.jit(lambda *args: graded(f, args, weights))
    with jax.enable_x64(True):
        args = jax.tree.map(jnp.asarray, (params, x, y))
        want = run(theirs)(*args)
        if shape is None:
            check(run(ours)(*args), want, 1e-10)
            return
        with jax.set_mesh(meshes.make(meshes.MeshShape(*shape))):
            check(run(ours)(*args), want, 1e-10)


def test_half_precision_tokens_with_a_mask_are_scored_in_one_pass():
    (x, x_has), (y, y_has) = sets(8, 8, 3, 5, 4)
    half = [(jnp.asarray(z, jnp.bfloat16), jnp.asarray(h)) for z, h in ((x, x_has), (y, y_has))]
    wide = [(z.astype(jnp.float32), h) for z, h in half]
    variant, params = pairs.Pairs(score=pairs.TokenSets()), {"scale": jnp.float32(3)}
    got, want = (pairs.reduce(variant, params, *z)[0]["lse"] for z in (half, wide))
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, want, rtol=1e-6)
    assert "HIGHEST" not in str(jax.make_jaxpr(lambda *z: pairs.reduce(variant, params, *z))(*half))


@pytest.mark.parametrize("mean_over", ["columns", "rows"])
def test_token_sets_cost_no_array_of_all_tokens(mean_over):
    """512 × 512 pairs of 16 × 8 tokens would be 128 MiB; what a device holds is bounded by `numbers`."""
    tokens = lambda n: jax.ShapeDtypeStruct((512, n, 8), jnp.float32)
    has = lambda n: jnp.ones((512, n), bool)
    variant = pairs.Pairs(score=pairs.TokenSets(mean_over, numbers=1 << 18))  # 1 MiB

    def loss(x, y):
        rows, _ = pairs.reduce(variant, {"scale": 9.0}, (x, has(16)), (y, has(8)))
        return (rows["lse"] - rows["target"]).sum()

    compiled = jax.jit(jax.grad(loss, (0, 1))).lower(tokens(16), tokens(8)).compile()
    used = compiled.memory_analysis().temp_size_in_bytes
    assert used < 16 << 20 < 4 * 512 * 512 * 16 * 8, used


def test_scores_far_apart_are_not_lost():
    """A tile whose best score is 200 above another row's best: a shift shared by the tile would lose that row."""
    x = jnp.array([[1.0, 0], [-1.0, 0], [0, 1.0]])
    params = {"scale": jnp.float32(100)}
    rows, cols = pairs.reduce(pairs.Pairs(), params, x, jnp.tile(x[:1], (3, 1)))
    np.testing.assert_allclose(rows["lse"], np.log(3) + np.array([100, -100, 0]), rtol=1e-6)
    np.testing.assert_allclose(cols["lse"], 100, rtol=1e-6)


def test_a_row_without_pairs_is_zero_in_the_gradient():
    nothing = pairs.Pairs(where=_never)
    args, _ = inputs(4, 4, 3, 10.0)
    x, y = jnp.float32(args[1]), jnp.float32(args[2])
    rows, _ = pairs.reduce(nothing, {"scale": 1.0}, x, y)
    np.testing.assert_array_equal(rows["lse"], -np.inf)
    grad = jax.grad(lambda x: pairs.reduce(nothing, {"scale": 1.0}, x, y)[0]["lse"].sum())(x)
    np.testing.assert_array_equal(grad, 0)


def _never(i, j, a, b):
    return (i < 0) & (j < 0)


def test_memory_is_of_tiles_not_of_pairs():
    """Compiled for 8 devices: ≤ 16·b·D + 12·b·rows bytes of temporaries a device, where a logits row alone has B."""
    per_device, width, chunk = 2048, 64, 1024
    mesh = meshes.make(meshes.MeshShape(8))
    z = jax.ShapeDtypeStruct(
        (8 * per_device, width), jnp.bfloat16, sharding=meshes.batch_sharding(mesh)
    )
    loss = lambda x, y: sum(
        s["lse"].sum() for s in pairs.reduce(pairs.Pairs(), {"scale": 9.0}, x, y, chunk=chunk)
    )
    with jax.set_mesh(mesh):
        compiled = jax.jit(jax.grad(loss, (0, 1))).lower(z, z).compile()
    bound = 16 * per_device * width + 12 * per_device * chunk
    assert compiled.memory_analysis().temp_size_in_bytes <= bound


def test_a_chunk_that_cannot_be_is_one_line():
    x = jnp.ones((2, 2))
    with pytest.raises(UserError, match=r"losses\.pairs: got chunk -1"):
        pairs.reduce(pairs.Pairs(), {"scale": 1.0}, x, x, chunk=-1)
