"""Schedules against their formulas, and that samples, not steps, are what they count."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vlp.core.check import UserError
from vlp.optim.schedules import Schedule


def values(schedule, batch, num_steps):
    return np.asarray(jax.vmap(schedule.at(batch, num_steps))(jnp.arange(num_steps)))


@pytest.mark.parametrize("shape", ["cosine", "linear", "constant"])
def test_equals_its_formula(shape):
    got = values(Schedule(0.3, shape, warmup_steps=4, end_frac=0.1), 8, 20)
    for step, lr in enumerate(got):
        if step + 1 < 4:
            want = 0.3 * (step + 1) / 4
        else:
            done = (step + 1 - 4) / 16
            fall = {"cosine": (1 + math.cos(math.pi * done)) / 2, "linear": 1 - done, "constant": 1}
            want = 0.3 * (0.1 + 0.9 * fall[shape])
        np.testing.assert_allclose(lr, want, rtol=1e-5, atol=1e-8)
    assert got[3] == np.float32(0.3) and got.argmax() == 3


def test_the_first_step_moves_and_the_last_ends():
    got = values(Schedule(1.0, "cosine", warmup_steps=10), 8, 50)
    assert got[0] == np.float32(0.1) and got[-1] < 1e-6
    assert values(Schedule(1.0, "linear", end_frac=0.25), 8, 5)[-1] == 0.25
    assert values(Schedule(1.0, "cosine"), 8, 1) == [0.0]
    assert (values(Schedule(1.0, "constant"), 8, 5) == 1).all()
    assert (
        values(Schedule(1.0, "constant", warmup_steps=5), 8, 5)
        == np.float32([0.2, 0.4, 0.6, 0.8, 1])
    ).all()


@pytest.mark.parametrize("warmup", [dict(warmup_samples=96), dict(warmup_frac=0.2), {}])
@pytest.mark.parametrize("shape", ["cosine", "linear"])
def test_the_batch_size_does_not_show(shape, warmup):
    """After equally many samples the rate is equal."""
    schedule = Schedule(0.1, shape, **warmup)
    small, large = values(schedule, 8, 60), values(schedule, 24, 20)
    np.testing.assert_allclose(small[2::3], large, rtol=1e-5, atol=1e-8)


def test_the_units_of_warmup():
    assert Schedule(1.0, warmup_samples=96).warmup(8, 60) == 12
    assert Schedule(1.0, warmup_samples=100).warmup(8, 60) == 12.5
    assert Schedule(1.0, warmup_steps=7).warmup(8, 60) == 7
    assert Schedule(1.0, warmup_frac=0.25).warmup(8, 60) == 15
    assert Schedule(1.0).warmup(8, 60) == 0


def test_mistakes_in_the_schedule_are_one_line():
    with pytest.raises(UserError, match="got warmup_samples and warmup_frac, expected one warm-up"):
        Schedule(1.0, warmup_samples=10, warmup_frac=0.1)
    with pytest.raises(UserError, match="got warmup_samples and warmup_steps, expected one"):
        Schedule(1.0, warmup_samples=10, warmup_steps=1)
    with pytest.raises(UserError, match="shape: got 'cosin', .*did you mean 'cosine'"):
        Schedule(1.0, "cosin")
    with pytest.raises(UserError, match="got a warm-up of 12.5 steps, expected at most 12"):
        Schedule(1.0, warmup_samples=100).at(8, 12)
