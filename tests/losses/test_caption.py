"""The captioning loss against loops in float64, its shift and padding, and on meshes."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding

from vlp.core import mesh as meshes
from vlp.losses import caption, reference

TEXT_BL = np.array(
    [
        [1, 5, 3, 4, 2, 0, 0],
        [1, 2, 0, 0, 0, 0, 0],
        [1, 0, 0, 0, 0, 0, 0],  # no target at all
        [1, 4, 4, 7, 8, 6, 2],
        [1, 3, 8, 2, 0, 0, 0],
        [1, 7, 6, 5, 4, 3, 2],
        [1, 6, 2, 0, 0, 0, 0],
        [1, 5, 5, 5, 2, 0, 0],
    ],
    np.int32,
)
VOCAB = 9


def loops(hidden, unembed, text, weights):
    """Per example: the sum over its targets, their number; and gradients of weights · total."""
    num, length, _ = hidden.shape
    total, count = np.zeros(num), np.zeros(num)
    dhidden, dunembed = np.zeros_like(hidden), np.zeros_like(unembed)
    for b in range(num):
        for t in range(length - 1):
            target = text[b, t + 1]
            if target == 0:
                continue
            logits = [float(hidden[b, t] @ unembed[:, v]) for v in range(unembed.shape[1])]
            top = max(logits)
            z = sum(math.exp(x - top) for x in logits)
            total[b] -= logits[target] - top - math.log(z)
            count[b] += 1
            for v, x in enumerate(logits):
                g = weights[b] * (math.exp(x - top) / z - (v == target))
                dhidden[b, t] += g * unembed[:, v]
                dunembed[:, v] += g * hidden[b, t]
    return {"total": total, "count": count, "grads": (dhidden, dunembed)}


@functools.partial(jax.jit, static_argnames="chunk")
def ours(hidden, unembed, text, weights, chunk=0):
    def weighted(hidden, unembed):
        loss = caption.nll(hidden, unembed, text, chunk=chunk)
        return (weights * loss["total"]).sum(), loss

    (_, loss), grads = jax.value_and_grad(weighted, (0, 1), has_aux=True)(hidden, unembed)
    return {"total": loss["total"], "count": loss["count"], "grads": grads}


def inputs(dtype, spread=1.0):
    rng = np.random.default_rng(0)
    hidden = rng.normal(size=(*TEXT_BL.shape, 8)) * spread
    return (
        hidden.astype(dtype),
        rng.normal(size=(8, VOCAB)).astype(dtype),
        TEXT_BL,
        rng.uniform(0.5, 2, 8).astype(dtype),
    )


def arrays():
    return [jnp.asarray(x) for x in inputs(np.float32)]


def test_caption_loss_equals_loops(error):
    args = inputs(np.float64)
    assert error(ours(*inputs(np.float32)), loops(*args)) < 1e-5
    args = inputs(np.float64, spread=20.0)
    with jax.enable_x64(True):
        assert error(ours(*args), loops(*args)) < 1e-10


@pytest.mark.parametrize("chunk", [1, 4, 100])
def test_vocabulary_chunks_give_the_same_loss_and_gradients(chunk, error):
    """Chunks of the vocabulary, also uneven ones: the same loss, gradients and hits."""
    args = inputs(np.float32)
    assert error(ours(*args, chunk=chunk), loops(*inputs(np.float64))) < 1e-5
    with jax.enable_x64(True):
        args = inputs(np.float64, spread=20.0)
        assert error(ours(*args, chunk=chunk), loops(*args)) < 1e-10
    hits = [caption.nll(*arrays()[:3], chunk=c)["correct"] for c in (chunk, 0)]
    np.testing.assert_array_equal(*hits)
    assert sum(hits[0]) > 0
    uniform = caption.nll(jnp.zeros(args[0].shape), *arrays()[1:3], chunk=chunk)
    assert (uniform["correct"] == 0).all()


@pytest.mark.parametrize("chunk", [0, 8])
def test_sharded_equals_one_device(mesh, chunk, error):
    rng = np.random.default_rng(1)
    hidden, _, text, weights = inputs(np.float32)
    unembed = rng.normal(size=(8, 16)).astype(np.float32)
    shape = meshes.spec(("embed", "vocab"), unembed.shape, mesh)
    rows = meshes.batch_sharding(mesh)
    args = (hidden, unembed, text, weights)
    places = (rows, NamedSharding(mesh, shape), rows, rows)
    with jax.set_mesh(mesh):
        placed = (jax.device_put(x, s) for x, s in zip(args, places, strict=True))
        got = ours(*placed, chunk=chunk)
        assert error(got, ours(*args)) < 1e-5


def test_uniform_logits_cost_ln_vocab():
    hidden, unembed, text, _ = arrays()
    loss = caption.nll(jnp.zeros_like(hidden), unembed, text)
    np.testing.assert_allclose(loss["total"], loss["count"] * math.log(VOCAB), rtol=1e-6)
    np.testing.assert_array_equal(loss["count"], [4, 1, 0, 6, 3, 6, 2, 4])
    assert float(loss["total"][2]) == 0
    assert (loss["correct"] == 0).all()  # a model that knows nothing scores no hits by ties


def oracle(text_BL, wanted_BL):
    """The loss of a model that is sure of `wanted` at each position, per real token."""
    hidden_BLD = 50.0 * jax.nn.one_hot(wanted_BL, VOCAB)
    loss = caption.nll(hidden_BLD, jnp.eye(VOCAB), jnp.asarray(text_BL))
    return np.asarray(loss["total"]), np.asarray(loss["count"]), np.asarray(loss["correct"])


def test_labels_are_shifted_exactly_once():
    text = TEXT_BL[[0, 4, 5]]  # no token follows itself here
    ahead = lambda n: np.concatenate([text[:, n:], np.zeros((3, n), np.int32)], axis=1)
    total, count, correct = oracle(text, ahead(1))
    np.testing.assert_allclose(total, 0, atol=1e-5)
    np.testing.assert_array_equal(correct, count)
    for wrong in (text, ahead(2)):  # copies the present token; shifts twice
        total, count, correct = oracle(text, wrong)
        assert (total > 30 * count).all() and (correct == 0).all()


def test_targets_do_not_leak_into_other_rows():
    hidden, unembed, text, _ = arrays()
    before = caption.nll(hidden, unembed, text)["total"]
    others = jnp.asarray(np.random.default_rng(2).integers(3, VOCAB, text.shape), jnp.int32)
    for row in (0, 3, 7):
        changed = jnp.where(jnp.arange(len(text))[:, None] == row, text, others)
        after = caption.nll(hidden, unembed, changed)["total"]
        assert after[row] == before[row]
        assert (np.delete(after, row) != np.delete(before, row)).all()
    grads = jax.grad(lambda h: caption.nll(h, unembed, text)["total"][3])(hidden)
    assert (np.delete(grads, 3, axis=0) == 0).all() and (grads[3, -1] == 0).all()
    assert (np.abs(grads[3, :-1]).sum(-1) > 0).all()


def test_half_precision_has_float32_logits():
    hidden, unembed, text, _ = arrays()
    half = hidden.astype(jnp.bfloat16), unembed.astype(jnp.bfloat16)
    full = [x.astype(jnp.float32) for x in half]
    got, want = caption.nll(*half, text), caption.nll(*full, text)
    assert got["total"].dtype == jnp.float32
    np.testing.assert_allclose(got["total"], want["total"], rtol=1e-5)


@pytest.mark.parametrize("pad_id", [0, 5])
def test_the_pad_id_is_the_callers(pad_id):
    hidden, unembed, text, _ = arrays()
    loss = caption.nll(hidden, unembed, text, pad_id)
    np.testing.assert_array_equal(loss["count"], (text[:, 1:] != pad_id).sum(axis=1))


def masked_inputs():
    """Text whose words are predicted at their own place, which of them, and a teacher of another width."""
    rng = np.random.default_rng(3)
    hidden, unembed, text, _ = inputs(np.float32)
    where = rng.uniform(size=text.shape) < 0.5
    teacher = rng.normal(size=(*text.shape, 5)), rng.normal(size=(5, VOCAB))
    where[0], where[1] = False, True
    cast = lambda z: jnp.asarray(z, jnp.float32)
    return (
        cast(hidden),
        cast(unembed),
        jnp.asarray(text),
        jnp.asarray(where),
        tuple(map(cast, teacher)),
    )


@pytest.mark.parametrize(
    "shift, soft, chunk", [(False, False, 0), (True, True, 0), (False, True, 4)]
)
def test_masked_words_and_a_teacher_are_the_plain_form(shift, soft, chunk, error):
    hidden, unembed, text, where, teacher = masked_inputs()
    first = int(shift)
    cut = lambda z: z[:, : z.shape[1] - first]
    targets = where[:, first:] & (text[:, first:] != 0)

    def plain(hidden, unembed):
        logits = cut(hidden) @ unembed
        theirs = cut(teacher[0]) @ teacher[1] if soft else None
        return reference.nll(logits, text[:, first:], targets, theirs)

    def ours(hidden, unembed):
        loss = caption.nll(
            hidden, unembed, text, chunk=chunk, where=where, shift=shift, teacher=teacher
        )
        return loss["soft" if soft else "total"]

    counted = caption.nll(hidden, unembed, text, where=where, shift=shift)["count"]
    np.testing.assert_array_equal(counted, targets.sum(1))
    values = [f(hidden, unembed) for f in (ours, plain)]
    assert error(*values) < 1e-5 and values[0][0] == 0
    grad = lambda f: jax.grad(lambda *z: f(*z).sum(), (0, 1))(hidden, unembed)
    assert error(grad(ours), grad(plain)) < 1e-5


def test_words_without_a_mask_have_no_influence():
    hidden, unembed, text, where, _ = masked_inputs()
    grad = jax.grad(
        lambda h: caption.nll(h, unembed, text, where=where, shift=False)["total"].sum()
    )(hidden)
    used = np.abs(grad).sum(-1) > 0
    np.testing.assert_array_equal(used, where & (text != 0))


@pytest.mark.parametrize("chunk", [0, 4])
def test_the_teacher_gets_no_gradient_and_bounds_the_soft_loss(chunk):
    hidden, unembed, text, where, teacher = masked_inputs()
    args = {"chunk": chunk, "where": where, "shift": False}
    soft = lambda t: caption.nll(hidden, unembed, text, teacher=t, **args)["soft"].sum()
    assert all((g == 0).all() for g in jax.grad(soft)(teacher))
    own = caption.nll(*teacher, text, teacher=teacher, **args)["soft"].sum()
    assert own < soft(teacher)
    # shared/METHODS: teacher [1, 0, ½], student [.2, .1, 0]
    one = lambda *logits: jnp.asarray([[[*logits]]], jnp.float32)
    known = caption.nll(
        one(0.2, 0.1, 0), jnp.eye(3), jnp.ones((1, 1), jnp.int32), chunk=chunk, shift=False,
        teacher=(one(1, 0, 0.5), jnp.eye(3)),
    )  # fmt: skip
    np.testing.assert_allclose(known["soft"], 1.082014, rtol=1e-6)
