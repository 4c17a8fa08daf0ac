"""Attention against loops over queries and keys."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vlp.core import mesh as meshes
from vlp.core.check import UserError
from vlp.ops import attention
from vlp.ops.attention import attend


def loops(q, k, v, mask, causal):
    batch, queries, heads, size = q.shape
    out = np.zeros_like(q)
    for b, t, h in np.ndindex(batch, queries, heads):
        seen = [
            s
            for s in range(k.shape[1])
            if (mask is None or mask[b, t, s]) and (not causal or s <= t)
        ]
        score = np.array([q[b, t, h] @ k[b, s, h] / np.sqrt(size) for s in seen])
        weight = np.exp(score - score.max()) / np.exp(score - score.max()).sum()
        out[b, t, h] = sum(w * v[b, s, h] for w, s in zip(weight, seen, strict=True))
    return out


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_attention_equals_loops(causal, masked):
    rng = np.random.default_rng(0)
    q, k, v = rng.normal(size=(3, 2, 5, 2, 4))
    mask = None
    if masked:
        mask = (rng.uniform(size=(2, 5, 5)) < 0.5) | np.eye(5, dtype=bool)
    args = [jnp.asarray(x, jnp.float32) for x in (q, k, v)]
    got = attend(*args, None if mask is None else jnp.asarray(mask), causal=causal)
    np.testing.assert_allclose(got, loops(q, k, v, mask, causal), atol=1e-5)


def test_queries_and_keys_may_differ_in_number():
    rng = np.random.default_rng(1)
    q, k, v = rng.normal(size=(1, 2, 2, 4)), *rng.normal(size=(2, 1, 6, 2, 4))
    got = attend(*(jnp.asarray(x, jnp.float32) for x in (q, k, v)))
    np.testing.assert_allclose(got, loops(q, k, v, None, False), atol=1e-5)


@pytest.mark.parametrize("sizes, causal", [((130, 130), True), ((150, 70), False)])
def test_splash_is_the_same(sizes, causal, monkeypatch):
    """Several blocks, made up to whole ones, forward and backward; on CPUs the kernel is interpreted."""
    monkeypatch.setattr(attention, "BLOCK", 128)
    queries, keys = sizes
    draw = lambda seed, n: jax.random.normal(jax.random.key(seed), (2, n, 2, 8))
    args = draw(0, queries), draw(1, keys), draw(2, keys)

    def grads(kernel):
        f = lambda *a: attend(*a, causal=causal, kernel=kernel)
        cubes = lambda *a: (f(*a) ** 3).sum()
        return jax.jit(lambda *a: (f(*a), jax.grad(cubes, argnums=(0, 1, 2))(*a)))(*args)

    for a, b in zip(jax.tree.leaves(grads("splash")), jax.tree.leaves(grads("xla"))):
        np.testing.assert_allclose(a, b, atol=2e-6 * float(jnp.abs(b).max()))


def test_splash_over_a_mesh():
    """Each device has its examples and heads; the gradient of the whole batch is the same."""
    mesh = meshes.make(meshes.MeshShape(data=2, fsdp=2, tensor=2))
    q, k, v = (jax.random.normal(jax.random.key(i), (4, 9, 2, 8)) for i in range(3))

    def grads(kernel, *args):
        f = lambda *a: (attend(*a, kernel=kernel) ** 3).sum()
        return jax.jit(jax.grad(f, argnums=(0, 1, 2)))(*args)

    plain = grads("xla", q, k, v)
    with jax.set_mesh(mesh):
        rows = meshes.batch_sharding(mesh)
        split = grads("splash", *(jax.device_put(x, rows) for x in (q, k, v)))
    for a, b in zip(split, plain):
        np.testing.assert_allclose(a, b, atol=2e-6 * float(jnp.abs(b).max()))


@pytest.mark.parametrize("kernel, masked, says", [
    ("flash", False, "got 'flash', expected one of"),
    ("splash", True, "'splash' with a mask"),
    ("cudnn", False, "'cudnn' for float32 on cpu"),
])  # fmt: skip
def test_kernels_that_cannot_be(kernel, masked, says):
    x = jnp.zeros((1, 3, 1, 4))
    with pytest.raises(UserError, match=says):
        attend(x, x, x, jnp.ones((1, 3, 3), bool) if masked else None, kernel=kernel)


@pytest.mark.parametrize("length, platform, kind", [
    (attention.SPLASH_FROM, "tpu", "splash"),
    (attention.SPLASH_FROM - 1, "tpu", "xla"),
    (attention.SPLASH_FROM, "cpu", "xla"),
])  # fmt: skip
def test_chosen_by_the_devices(length, platform, kind):
    device = jax.sharding.AbstractDevice(platform, None, platform=platform)
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), (), abstract_device=device)):
        assert attention._kind("auto", False, length, jnp.dtype("bfloat16")) == kind
        assert attention._kind("auto", True, length, jnp.dtype("bfloat16")) == "xla"


def test_giants_image_tower_takes_splash_on_a_tpu():
    """288 px in patches of 18: 256 tokens; a decoder's 64 queries of them do not."""
    device = jax.sharding.AbstractDevice("TPU v5 lite", 1, platform="tpu")
    bf16 = lambda n: jax.ShapeDtypeStruct((2, n, 2, 88), jnp.bfloat16)
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), (), abstract_device=device)):
        names = lambda n: str(jax.make_jaxpr(attend)(bf16(n), bf16(256), bf16(256)))
        assert "pallas_call" in names(256) and "pallas_call" not in names(64)


def test_whole_rows_move_on_a_cpu():
    """Heads are brought forward row by row: keys and values are nowhere with a column for each of them."""
    x = jnp.zeros((2, 64, 4, 32))
    program = jax.jit(attend).lower(x, x, x).compile().as_text()
    assert "f32[2,4,64,32]" in program and "f32[2,4,32,64]" not in program
