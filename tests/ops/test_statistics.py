"""Changes that leave a forward pass as gradients: through scans, rematerialisation and several passes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vlp.ops import statistics

SLOTS = {"stat_mean": jnp.array([1.0, 2.0]), "stat_share": jnp.float32(1)}
X = jnp.asarray(np.random.default_rng(0).normal(size=(6, 2)), jnp.float32)


def layer(slots, x):
    """Asks its slot to move to the mean of x."""
    change = {"stat_mean": x.mean(0) - slots["stat_mean"]}
    mean = {"stat_mean": slots["stat_mean"]}
    return statistics.record(x, mean, slots["stat_share"], change)


def moved(loss, slots=SLOTS):
    return statistics.updated(slots, jax.grad(loss)(slots))


def test_the_value_and_its_gradient_are_as_without():
    loss = lambda x, f: jnp.sin(f(x)).sum()
    ours, plain = (jax.value_and_grad(loss)(X, f) for f in (lambda x: layer(SLOTS, x), lambda x: x))
    jax.tree.map(np.testing.assert_array_equal, ours, plain)


def test_a_slot_moves_by_the_mean_of_what_its_passes_ask():
    one = moved(lambda s: layer(s, X).sum())
    np.testing.assert_allclose(one["stat_mean"], X.mean(0), rtol=1e-6)
    assert one["stat_share"] == 1
    two = moved(lambda s: layer(s, X[:2]).sum() + 3 * layer(s, X[2:4]).sum())
    np.testing.assert_allclose(two["stat_mean"], (X[:2].mean(0) + X[2:4].mean(0)) / 2, rtol=1e-5)


def test_a_pass_without_a_gradient_records_nothing():
    still = moved(lambda s: jax.lax.stop_gradient(layer(s, X)).sum() + s["stat_mean"].sum() * 0)
    jax.tree.map(np.testing.assert_array_equal, still, SLOTS)


@pytest.mark.parametrize("remat", [False, True])
def test_layers_of_a_scan_have_their_own_and_micro_batches_are_averaged(remat):
    """Layer n sees x · 2ⁿ; each of three micro-batches is a third of the pass, as `Ctx.map` says."""
    stacked = {k: np.stack([v, 10 * v]) for k, v in SLOTS.items()} | {"stat_share": np.ones(2)}
    stacked = jax.tree.map(np.float32, stacked)

    def loss(slots):
        shared = slots | {"stat_share": slots["stat_share"] / 3}

        def call(carry, x):
            body = lambda x, s: (2 * layer(s, x), None)
            body = jax.checkpoint(body) if remat else body
            return carry + jax.lax.scan(body, x, shared)[0].sum(), None

        return jax.lax.scan(call, 0.0, X.reshape(3, 2, 2))[0]

    after = jax.jit(lambda s: statistics.updated(s, jax.grad(loss)(s)))(stacked)
    want = np.stack([X.mean(0), 2 * X.mean(0)])
    np.testing.assert_allclose(after["stat_mean"], want, rtol=1e-5, atol=1e-6)


def test_an_attached_loss_is_part_of_what_is_minimised():
    weight = jnp.float32(0.25)
    balance = lambda x: jnp.square(x).mean()
    ours = jax.grad(lambda x: jnp.sin(statistics.attach(x, balance(x), weight)).sum())(X)
    plain = jax.grad(lambda x: jnp.sin(x).sum() + 0.25 * balance(x))(X)
    np.testing.assert_allclose(ours, plain, rtol=1e-6)
