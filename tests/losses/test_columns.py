"""More columns than rows, several captions of an image, soft targets: against the plain forms, on meshes, in memory."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vlp.core import mesh as meshes
from vlp.core.check import UserError
from vlp.losses import contrastive, reference
from vlp.losses.contrastive import Columns

B, K, Q, E = 8, 2, 16, 6
SCALE = 9.0


def unit(rng, *shape):
    z = rng.normal(size=shape)
    return z / np.linalg.norm(z, axis=-1, keepdims=True)


def inputs(dtype=np.float64):
    """Images, texts of K captions, further texts and images, groups of each, which captions exist."""
    rng = np.random.default_rng(0)
    z = [unit(rng, B, E), unit(rng, B, K, E), unit(rng, Q, E), unit(rng, 2 * Q, E)]
    groups = [rng.integers(0, 4, n) for n in (B, (B, K), Q, 2 * Q)]
    exists = rng.uniform(size=(B, K)) < 0.7
    exists[0], exists[1] = False, True  # one example without a caption, one with all
    return [x.astype(dtype) for x in z], groups, exists


def batch():
    """Images, one caption of each and further texts, in float32."""
    z, _, _ = inputs(np.float32)
    return jnp.asarray(z[0]), jnp.asarray(z[1][:, 0]), jnp.asarray(z[2])


def other_group(i, j, a, b):
    """Pairs of one group are no negatives of each other; the own pair always counts."""
    return (a[:, None] != b[None, :]) | (i == j)


def same_group(i, j, a, b):
    return 0.5 * (a[:, None] == b[None, :]) + 0.5 * (i == j)


def plain(zi, zt, qt, qi, groups, exists, variant):
    """Both directions by whole matrices, caption by caption."""
    gi, gt, gqt, gqi = groups
    losses = []
    for k in range(K):
        rows = jnp.concatenate([zi, qi]), np.concatenate([gi, gqi])
        cols = jnp.concatenate([zt[:, k], qt]), np.concatenate([gt[:, k], gqt])
        logits = SCALE * rows[0] @ cols[0].T
        ids = np.arange(len(rows[1]))[:, None], np.arange(len(cols[1]))[None]
        there = np.concatenate([exists[:, k], np.full(Q, True)])
        where = np.full(logits.shape, True)
        targets = (ids[0] == ids[1]).astype(float)
        if variant:  # the targets of a text that is missing do not matter
            where = other_group(*ids, rows[1], cols[1])
            targets = np.where(there, same_group(*ids, rows[1], cols[1]), targets)
        i2t = [jnp.asarray(m[:B]) for m in (logits, where & there, targets)]
        t2i = [jnp.asarray(m[:, :B].T) for m in (logits, where, targets)]
        losses.append([reference.cross_entropy(*i2t), reference.cross_entropy(*t2i)])
    return [reference.over_captions(jnp.stack(one), jnp.asarray(exists)) for one in zip(*losses)]


def ours(zi, zt, qt, qi, groups, exists, variant, chunk=0):
    gi, gt, gqt, gqi = groups
    functions = {"where": other_group, "targets": same_group} if variant else {}
    loss = contrastive.softmax(
        zi, zt, jnp.asarray(SCALE, zi.dtype), a=gi, b=gt, where_BK=jnp.asarray(exists),
        more_texts=Columns(qt, gqt), more_images=Columns(qi, gqi), chunk=chunk,
        **functions,
    )  # fmt: skip
    return [loss["i2t"], loss["t2i"]]


def graded(f, variant, z, groups, exists, **sizes):
    """Losses and the gradients of a sum with another weight for every number."""
    weights = np.random.default_rng(1).uniform(0.5, 2, (2, B))

    def total(*z):
        out = f(*z, groups, exists, variant, **sizes)
        return sum((jnp.asarray(w, o.dtype) * o).sum() for w, o in zip(weights, out)), out

    (_, out), grads = jax.value_and_grad(total, tuple(range(len(z))), has_aux=True)(*z)
    return out, grads


@pytest.mark.parametrize("variant", ["", "where targets"])
def test_equals_the_plain_form(variant, error):
    z, groups, exists = inputs()
    with jax.enable_x64(True):
        want = graded(plain, variant, z, groups, exists)
        got = jax.jit(lambda *z: graded(ours, variant, z, groups, exists, chunk=5))(
            *map(jnp.asarray, z)
        )
        assert error(got, want) < 1e-10
    assert np.all(np.asarray(want[0])[:, 0] == 0)  # the example without a caption


def test_sharding_changes_nothing(mesh, error):
    z, groups, exists = inputs(np.float32)
    rows = meshes.batch_sharding(mesh)
    put = lambda tree: jax.tree.map(lambda v: jax.device_put(v, rows), tree)
    run = jax.jit(lambda z, groups, exists: graded(ours, "where targets", z, groups, exists))
    want = run(z, groups, exists)
    with jax.set_mesh(mesh):
        assert error(run(put(z), put(groups), put(exists)), want) < 1e-5


def test_a_sigmoid_of_more_columns(error):
    z, _, exists = inputs()

    def plain(zi, zt, qt, qi):
        losses = []
        for k in range(K):
            rows, cols = jnp.concatenate([zi, qi]), jnp.concatenate([zt[:, k], qt])
            logits = SCALE * rows @ cols.T - 3.0
            there = jnp.tile(np.concatenate([exists[:, k], np.full(Q, True)]), (B, 1))
            batch = reference.sigmoid(logits[:B], there)
            # every further image meets the batch's texts alone
            turned = reference.sigmoid(logits[B:, :B].T, targets_BC=jnp.zeros((B, len(qi))))
            losses.append(batch + turned)
        return [reference.over_captions(jnp.stack(losses), jnp.asarray(exists))]

    def ours(zi, zt, qt, qi):
        scale, bias = (jnp.asarray(x, zi.dtype) for x in (SCALE, -3.0))
        return [
            contrastive.sigmoid(
                zi, zt, scale, bias, where_BK=jnp.asarray(exists), more_texts=qt, more_images=qi
            )["loss"]
        ]

    with jax.enable_x64(True):
        run = lambda f: graded(lambda *xs: f(*xs[:4]), "", z, None, None)
        assert error(run(ours), run(plain)) < 1e-10


def test_soft_targets_of_a_sigmoid():
    (zi, zt, _), (_, groups, _) = batch(), inputs()
    scale, bias = jnp.float32(SCALE), jnp.float32(-3)
    got = contrastive.sigmoid(
        zi, zt, scale, bias, targets=same_group, a=groups[0], b=groups[1][:, 0]
    )["loss"]
    ids = np.arange(B)[:, None], np.arange(B)[None]
    targets = same_group(*ids, groups[0], groups[1][:, 0])
    want = reference.sigmoid(SCALE * zi @ zt.T - 3, targets_BC=jnp.asarray(targets, jnp.float32))
    np.testing.assert_allclose(got, want, rtol=1e-5)


def test_further_columns_that_do_not_exist_are_none():
    (zi, zt, qt), scale = batch(), jnp.float32(SCALE)
    there = jnp.arange(Q) % 3 == 0
    masked = contrastive.softmax(zi, zt, scale, more_texts=Columns(qt, where=there))
    fewer = contrastive.softmax(zi, zt, scale, more_texts=qt[there])
    none = contrastive.softmax(zi, zt, scale)
    np.testing.assert_allclose(masked["i2t"], fewer["i2t"], rtol=1e-6)
    assert (masked["i2t"] > none["i2t"]).all()
    np.testing.assert_array_equal(masked["t2i"], none["t2i"])


def test_one_caption_is_the_plain_loss_to_the_bit():
    (zi, zt, _), scale = batch(), jnp.float32(SCALE)
    got, want = (contrastive.softmax(zi, t, scale) for t in (zt[:, None], zt))
    jax.tree.map(np.testing.assert_array_equal, got, want)
    same = jnp.repeat(zt[:, None], K, axis=1)
    jax.tree.map(
        lambda g, w: np.testing.assert_allclose(g, w, rtol=1e-6),
        contrastive.softmax(zi, same, scale), want,
    )  # fmt: skip


def equations(jaxpr):
    inner = [p for e in jaxpr.eqns for p in jax.tree.leaves(e.params, is_leaf=_is_jaxpr)]
    return len(jaxpr.eqns) + sum(equations(getattr(p, "jaxpr", p)) for p in inner if _is_jaxpr(p))


def _is_jaxpr(x):
    return hasattr(x, "eqns") or hasattr(getattr(x, "jaxpr", None), "eqns")


def test_the_program_does_not_grow_with_captions():
    def size(num):
        loss = lambda zi, zt: contrastive.softmax(zi, zt, jnp.float32(9))["i2t"].sum()
        args = jnp.ones((B, E)), jnp.ones((B, num, E))
        return equations(jax.make_jaxpr(jax.grad(loss, (0, 1)))(*args).jaxpr)

    assert size(1) > 100
    assert size(8) == size(2) <= 1.2 * size(1)


def test_a_missing_text_takes_no_part():
    """Neither its values nor their gradients reach anything, whatever it holds."""
    (zi, zt, _), there = batch(), jnp.arange(B) != 2
    loss = lambda zt: contrastive.softmax(zi, zt, jnp.float32(SCALE), where_BK=there)
    before, after = loss(zt), loss(zt.at[2].set(zi[0]))
    for name in ("i2t", "t2i"):
        np.testing.assert_array_equal(before[name], after[name])
        assert before[name][2] == 0
    grad = jax.grad(lambda t: sum(loss(t)[n].sum() for n in ("i2t", "t2i")))(zt)
    assert (grad[2] == 0).all() and np.isfinite(grad).all() and (np.abs(grad[0]) > 0).any()


def test_hits_and_ties_count_further_columns():
    zi = jnp.eye(4)
    best = contrastive.softmax(zi, zi, jnp.float32(5), more_texts=zi[:1])
    np.testing.assert_array_equal(best["hit_i2t"], [0.5, 1, 1, 1])
    np.testing.assert_array_equal(best["hit_t2i"], 1)
    worse = contrastive.softmax(zi, 0.9 * zi, jnp.float32(5), more_texts=zi[:1])
    np.testing.assert_array_equal(worse["hit_i2t"], [0, 1, 1, 1])


def test_nothing_learned_logs_zero():
    zi, queue = jnp.ones((4, 1)), jnp.ones((12, 1))
    loss = contrastive.softmax(zi, zi, jnp.float32(3), more_texts=queue)
    logged = contrastive.metrics(loss, jnp.float32(3), more_texts=12)
    np.testing.assert_allclose(logged["contrastive/minus_log_batch"].mean(), 0, atol=1e-6)


def albef(alpha):
    """shared/METHODS: logits [[2,0,1],[0,1,0]], the teacher's [[1,0,0],[0,1,1]]; two in the batch, one in the queue."""
    student, theirs = jnp.array([[2.0, 0, 1], [0, 1, 0]]), jnp.array([[1.0, 0, 0], [0, 1, 1]])
    keys, one = jnp.eye(3), jnp.float32(1)
    targets = contrastive.teacher_targets(theirs, keys[:2], one, alpha, more=keys[2:])
    return contrastive.one_way(student, keys[:2], one, **targets)["nll"].mean()


def test_soft_targets_over_batch_and_queue():
    np.testing.assert_allclose(albef(0.0), 0.479525, atol=1e-6)
    np.testing.assert_allclose(albef(0.4), 0.722227, atol=1e-6)
    student, theirs = jnp.array([[2.0, 0, 1], [0, 1, 0]]), jnp.array([[1.0, 0, 0], [0, 1, 1]])
    targets = reference.mixed_targets(theirs, 0.4)
    plain = reference.cross_entropy(student, targets_BC=targets).mean()
    np.testing.assert_allclose(albef(0.4), plain, rtol=1e-6)
    grad = jax.grad(albef)(jnp.float32(0.4))
    assert grad == 0


def test_a_queue_costs_no_matrix():
    """Compiled: a batch of 1,024 over a queue of 65,536 has fewer temporaries than its scores alone (256 MiB)."""
    one = jnp.float32(20)

    def loss(z, keys, queue):
        targets = contrastive.teacher_targets(keys, keys, one, 0.4, more=queue)
        return contrastive.one_way(z, keys, one, **targets)["nll"].mean()

    shape = lambda n: jax.ShapeDtypeStruct((n, 32), jnp.float32)
    compiled = jax.jit(jax.grad(loss)).lower(shape(1024), shape(1024), shape(65536)).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 64 << 20 < 4 * 1024 * 65536


def test_gradients_of_a_row_without_negatives_are_finite():
    z = jnp.eye(2)
    alone = contrastive.Columns(z, where=jnp.array([False, False]))
    loss = lambda z: contrastive.softmax(z, z, jnp.float32(5), where=_none, more_texts=alone)
    grad = jax.grad(lambda z: loss(z)["lse_i2t"].sum())(z)
    assert np.isneginf(loss(z)["lse_i2t"]).all() and (grad == 0).all()


def _none(i, j, a, b):
    return (i < 0) & (j < 0)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"zt": np.ones((3, E))}, r"losses.contrastive: got \(8, 6\) images and \(3, 6\) texts"),
        ({"targets": np.eye(3)}, r"targets \(3, 3\), expected \(8, 8\)"),
        ({"targets": np.eye(B), "more_texts": np.ones((2, E))}, "a matrix of targets and further"),
    ],
)
def test_refusals(change, message):
    zi, zt, _ = batch()
    args = {"zi": zi, "zt": zt, "scale": jnp.float32(1)} | change
    args = jax.tree.map(lambda v: jnp.asarray(v, jnp.float32), args)
    with pytest.raises(UserError, match=message):
        contrastive.softmax(args.pop("zi"), args.pop("zt"), args.pop("scale"), **args)


def test_a_matrix_and_a_mask_go_together():
    (zi, zt, _), (_, groups, _) = batch(), inputs()
    matrix = jnp.asarray(np.random.default_rng(3).uniform(size=(B, B)), jnp.float32)
    args = {"where": other_group, "a": groups[0], "b": groups[1][:, 0]}
    got = contrastive.softmax(zi, zt, jnp.float32(SCALE), targets=matrix, **args)
    ids = np.arange(B)[:, None], np.arange(B)[None]
    where = other_group(*ids, args["a"], args["b"])
    want = reference.cross_entropy(SCALE * zi @ zt.T, jnp.asarray(where), matrix)
    np.testing.assert_allclose(got["i2t"], want, rtol=1e-5)
