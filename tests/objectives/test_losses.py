"""Losses of embeddings and of captions, value and gradients, against float64 loops.

CASES has the objectives that need no more than embeddings and the decoder's hidden states; others have a file each.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vlp.core.check import UserError
from vlp.core.types import Apply, Ctx
from vlp.objectives.cap import Cap
from vlp.objectives.clip import Clip
from vlp.objectives.coca import Coca
from vlp.objectives.mammut import Mammut
from vlp.objectives.siglip import Siglip


@dataclasses.dataclass(frozen=True)
class Given(Apply):
    """A model whose embeddings, and hidden states of the decoder, are its parameters."""

    def __call__(self, method, *args, **kwargs):
        p = self.params
        if method == "scale_bias":
            return p["scale"], p["bias"]
        if method == "decode":
            return {"hidden": p["hidden"], "unembed": p["unembed"]}
        return {"embed": p[method], "tokens": None, "feats": None}


WORDS = np.int32(
    [[1, 4, 3, 2, 0], [1, 2, 0, 0, 0], [1, 3, 3, 5, 2]] * 2
)  # 1 begins, 2 ends, 0 pads


def point(scale, bias=0.0, num=6, width=5, seed=0, pull=0.0):
    """pull: how close pairs are to each other (0: independent)."""
    rng = np.random.default_rng(seed)
    zi, zt = rng.normal(size=(2, num, width))
    zt = zt + pull * zi
    unit = lambda z: z / np.linalg.norm(z, axis=1, keepdims=True)
    return {
        "image": unit(zi),
        "text": unit(zt),
        "scale": np.float64(scale),
        "bias": np.float64(bias),
        "hidden": rng.normal(size=(num, WORDS.shape[1], 3)),
        "unembed": rng.normal(size=(3, 6)),
    }


def scores(p):
    num = len(p["image"])
    dots = [[math.fsum(p["image"][i] * p["text"][j]) for j in range(num)] for i in range(num)]
    return p["scale"] * np.array(dots) + p["bias"]


def log_sum(values):
    top = max(values)
    return top + math.log(math.fsum(math.exp(v - top) for v in values))


def clip_loops(p, leave_one_out=False, focal=0.0):
    total, s = 0.0, scores(p)
    for matrix in (s, s.T):
        for i, row in enumerate(matrix):
            others = [v for j, v in enumerate(row) if j != i]
            if leave_one_out:
                total += log_sum(others) - row[i]
                continue
            nll = math.log1p(math.fsum(math.exp(v - row[i]) for v in others))
            total += (1 - math.exp(-nll)) ** focal * nll
    return total / 2 / len(s)


def siglip_loops(p):
    s = scores(p)
    sign = lambda i, j: 1 if i == j else -1
    return math.fsum(
        np.logaddexp(0, -sign(i, j) * s[i, j]) for i in range(len(s)) for j in range(len(s))
    ) / len(s)


def caption_loops(p):
    """−log P of every real token but the first, over their number."""
    total, count = 0.0, 0
    for hidden, words in zip(p["hidden"], WORDS):
        for state, word in zip(hidden, words[1:]):
            if word != 0:
                logits = [math.fsum(state * column) for column in p["unembed"].T]
                total, count = total + log_sum(logits) - logits[word], count + 1
    assert count == 2 * (3 + 1 + 4)
    return total / count


def slopes(loops, p, eps=1e-6):
    """Central differences of the loops, number by number."""
    out = {}
    for name, x in p.items():
        out[name] = np.zeros_like(x)
        for at in np.ndindex(x.shape):
            step = np.zeros_like(x)
            step[at] = eps
            up, down = (loops(p | {name: x + sign * step}) for sign in (1, -1))
            out[name][at] = (up - down) / (2 * eps)
    return out


def ours(objective, p, dtype):
    def loss(params):
        batch = {"image": params["image"], "text": jnp.asarray(WORDS)}
        terms = objective(Ctx(Given(None, params), batch)).terms.values()
        return sum(term.weight * term.mean() for term in terms)

    return jax.value_and_grad(loss)(jax.tree.map(lambda x: jnp.asarray(x, dtype), p))


CASES = {
    "clip": (Clip(), clip_loops),
    "leave_one_out": (Clip(leave_one_out=True), lambda p: clip_loops(p, leave_one_out=True)),
    "focal": (Clip(focal=2.0), lambda p: clip_loops(p, focal=2.0)),
    "siglip": (Siglip(), siglip_loops),
    "cap": (Cap(), caption_loops),
    "coca": (
        Coca(contrastive_weight=0.7, caption_weight=3.0),
        lambda p: 0.7 * 2 * clip_loops(p) + 3 * caption_loops(p),  # the sum of both directions
    ),
    "mammut": (
        Mammut(contrastive_weight=0.7, caption_weight=3.0, focal=2.0),
        lambda p: 0.7 * clip_loops(p, focal=2.0) + 3 * caption_loops(p),
    ),
}


@pytest.mark.parametrize("scale", [10.0, 100.0])
@pytest.mark.parametrize("name", CASES)
def test_losses_of_objectives_equal_loops(name, scale, error):
    objective, loops = CASES[name]
    p = point(scale, -10.0 if name == "siglip" else 0.0)
    want, grads = loops(p), slopes(loops, p)
    with jax.enable_x64(True):
        value, got = ours(objective, p, jnp.float64)
    # Term divides by its count in float32, exactly; differences resolve 1e-6 of a slope.
    np.testing.assert_allclose(value, want, rtol=1e-10)
    assert error(got, grads) < 1e-6
    value, got = ours(objective, p, jnp.float32)
    np.testing.assert_allclose(value, want, rtol=3e-5)
    assert error(got, grads) < 1e-4


@pytest.mark.parametrize("dtype", [jnp.float64, jnp.float32], ids=["float64", "float32"])
def test_leave_one_out_where_the_pair_dominates(dtype, error):
    """At scale 100 a denominator that held the pair would equal it to the last bit: p = 1 − 1e-40."""
    p = point(100.0, pull=30.0, width=16)
    loops = CASES["leave_one_out"][1]
    with jax.enable_x64(dtype == jnp.float64):
        value, grads = ours(Clip(leave_one_out=True), p, dtype)
    assert loops(p) < -20  # float32's log-sum-exp resolves 1e-5: nothing below −12 could be told
    fine = dtype == jnp.float64
    np.testing.assert_allclose(value, loops(p), rtol=1e-10 if fine else 1e-6)
    assert error(grads, slopes(loops, p)) < (1e-6 if fine else 1e-4)


def test_focal_of_a_pair_that_is_certain_is_zero_with_finite_gradients():
    value, grads = ours(Clip(focal=2.0), point(100.0, pull=30.0, width=16), jnp.float32)
    assert abs(value) < 1e-6 and all(np.isfinite(g).all() for g in jax.tree.leaves(grads))


@pytest.mark.parametrize(
    "options", [dict(focal=0.5), dict(focal=-1.0), dict(focal=2.0, leave_one_out=True)]
)
def test_options_that_do_not_fit(options):
    with pytest.raises(
        UserError, match="config.objective.focal: got .*, expected 0, or at least 1"
    ):
        Clip(**options)
