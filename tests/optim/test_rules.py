"""Rules of what happens to which parameter, and AdamW against a calculation by hand."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vlp.core import tree
from vlp.core.check import UserError
from vlp.optim import make as optimisers
from vlp.optim.make import DEFAULT_RULES, Optim, Rule

PARAMS = {
    "tower": {"kernel": np.float32([[1.0, -2.0], [0.5, 3.0]]), "bias": np.float32([0.1, -0.3])},
    "head": {"kernel": np.float32([4.0, -1.0])},
    "temperature": {"logit_scale": np.float32(2.0)},
}
GRADS = [jax.tree.map(lambda x, s=s: np.float32(np.cos(3.0 * x + s)), PARAMS) for s in range(3)]


def train(optim, grads=GRADS, lr=0.1, params=PARAMS):
    """Parameters after each step, and the last state of the optimiser."""
    updater = optimisers.make(optim, params)
    trainable = tree.where(updater.trainable, params)
    frozen = tree.where(jax.tree.map(lambda t: not t, updater.trainable), params)
    opt, out = updater.init(params), []
    update = jax.jit(updater.update)
    for g in grads:
        trainable, opt, norm = update(tree.where(updater.trainable, g), opt, trainable, lr)
        out.append(tree.merge(trainable, frozen))
    return out, opt, float(norm)


def adamw_by_hand(optim, rules, grads, lr, params):
    """One leaf at a time, in float64; rules: (lr multiplier, decay multiplier) by leaf."""
    p, out = {k: np.float64(v) for k, v in tree.named(params).items()}, []
    m, v = ({k: np.zeros_like(x) for k, x in p.items()} for _ in range(2))
    for t, g in enumerate(grads, 1):
        g = {k: np.float64(x) for k, x in tree.named(g).items()}
        norm = math.sqrt(sum((x**2).sum() for x in g.values()))
        if optim.clip_norm and norm > optim.clip_norm:
            g = {k: x * optim.clip_norm / norm for k, x in g.items()}
        for k, (lr_times, decay_times) in rules.items():
            m[k] = optim.b1 * m[k] + (1 - optim.b1) * g[k]
            v[k] = optim.b2 * v[k] + (1 - optim.b2) * g[k] ** 2
            step = (m[k] / (1 - optim.b1**t)) / (np.sqrt(v[k] / (1 - optim.b2**t)) + optim.eps)
            step += optim.weight_decay * decay_times * p[k]
            p[k] = p[k] - lr * lr_times * step
        out.append(dict(p))
    return out


@pytest.mark.parametrize("clip_norm", [None, 0.7, 100.0])
def test_adamw_equals_a_calculation_by_hand(clip_norm):
    rules = (
        Rule(".*/bias", decay=0.0),
        Rule("head/.*", lr=0.1, decay=2.0),
        Rule(".*logit_scale", lr=3.0, decay=0.0),
        Rule(".*"),
    )
    optim = Optim(b1=0.8, b2=0.9, eps=1e-3, weight_decay=0.3, clip_norm=clip_norm, rules=rules)
    multipliers = {
        "head/kernel": (0.1, 2.0),
        "temperature/logit_scale": (3.0, 0.0),
        "tower/bias": (1.0, 0.0),
        "tower/kernel": (1.0, 1.0),
    }
    got, _, _ = train(optim)
    want = adamw_by_hand(optim, multipliers, GRADS, 0.1, PARAMS)
    for ours, by_hand in zip(got, want, strict=True):
        for name, leaf in tree.named(ours).items():
            np.testing.assert_allclose(leaf, by_hand[name], rtol=1e-5, atol=1e-6, err_msg=name)


def test_clipping_is_by_the_norm_of_all_leaves():
    huge = jax.tree.map(lambda g: 1e6 * g, GRADS[0])
    norm = float(tree.norm(huge))
    b1 = dict(b1=0.0, b2=0.0, weight_decay=0.0, rules=(Rule(".*"),))
    _, opt, _ = train(Optim(clip_norm=2.0, **b1), [huge])
    mu = tree.named(opt[1].mu)
    for name, g in tree.named(huge).items():
        np.testing.assert_allclose(mu[name], g * 2.0 / norm, rtol=1e-5)
    _, opt, _ = train(Optim(clip_norm=None, **b1), [huge])
    np.testing.assert_allclose(
        tree.named(opt[1].mu)["tower/bias"], huge["tower"]["bias"], rtol=1e-6
    )


def test_frozen_leaves_stay_to_the_bit_and_have_no_memory():
    rules = (Rule("tower/.*", freeze=True), *DEFAULT_RULES)
    got, opt, _ = train(Optim(rules=rules))
    for name, leaf in tree.named(PARAMS).items():
        same = np.array_equal(tree.named(got[-1])[name], leaf)
        assert same == name.startswith("tower/"), name
    assert sorted(tree.named(opt[1].mu)) == ["head/kernel", "temperature/logit_scale"]
    assert sorted(tree.named(opt[1].nu)) == ["head/kernel", "temperature/logit_scale"]


def test_all_frozen_but_one_is_clipped_by_that_one():
    rules = (Rule("head/.*"), Rule(".*", freeze=True))
    _, opt, _ = train(Optim(b1=0.0, clip_norm=1.0, rules=rules), GRADS[:1])
    np.testing.assert_allclose(np.linalg.norm(opt[1].mu["head"]["kernel"]), 1.0, rtol=1e-5)


@pytest.mark.parametrize("sign, bound", [(-1, math.log(100.0)), (1, 0.0)])
def test_the_logit_scale_is_clamped_after_the_update(sign, bound):
    grads = jax.tree.map(lambda g: np.full_like(g, sign * 1e8), GRADS[0])
    got, _, norm = train(Optim(clip_norm=None), [grads], lr=50.0)
    scale = got[0]["temperature"]["logit_scale"]
    np.testing.assert_allclose(scale, bound, rtol=1e-6)
    assert np.exp(scale) <= 100.001
    moved = [after - before for after, before in zip(*map(jax.tree.leaves, (got[0], PARAMS)))]
    np.testing.assert_allclose(norm, tree.norm(moved), rtol=1e-6)  # of what was applied


def test_no_decay_on_the_logit_scale_norms_and_biases():
    """Zero gradients: what moves is what decays."""
    params = {
        "image_tower": {
            "pos": np.float32([1.0]),
            "cls": np.float32([1.0]),
            "norm": {"scale": np.float32([1.0]), "bias": np.float32([1.0])},
            "encoder": {"blocks": {"norm_self": {"scale": np.float32([1.0])}}},
            "patch": {"kernel": np.float32([1.0])},
        },
        "text_tower": {"embedding": np.float32([1.0])},
        "pool_caption": {"query": np.float32([1.0])},
        "temperature": {"logit_scale": np.float32(1.0), "logit_bias": np.float32(1.0)},
        "unembedding": np.float32([1.0]),
    }
    grads = jax.tree.map(np.zeros_like, params)
    got, _, _ = train(Optim(weight_decay=0.5), [grads], lr=0.1, params=params)
    moved = {name for name, leaf in tree.named(got[0]).items() if float(leaf.sum()) != 1.0}
    assert moved == {"image_tower/patch/kernel", "text_tower/embedding", "unembedding"}
    np.testing.assert_allclose(got[0]["unembedding"], 1 - 0.1 * 0.5, rtol=1e-6)


def test_first_match_wins_and_every_leaf_is_covered():
    rules = (Rule("tower/kernel", lr=2.0), Rule("tower/.*", lr=3.0), Rule(".*kernel"), Rule(".*"))
    assigned = tree.named(optimisers.assign(rules, PARAMS))
    assert assigned == {
        "head/kernel": rules[2],
        "temperature/logit_scale": rules[3],
        "tower/bias": rules[1],
        "tower/kernel": rules[0],
    }
    with pytest.raises(
        UserError, match="no rule for 'head/kernel', .*a last rule that matches '.[*]'"
    ):
        optimisers.assign((Rule("tower/.*"), Rule("temperature/.*")), PARAMS)
    with pytest.raises(UserError, match="no rule for"):  # the whole name must match
        optimisers.assign((Rule("tower"), Rule("head/.*")), PARAMS)


def test_a_rule_that_matches_nothing_is_refused():
    with pytest.raises(UserError) as caught:
        optimisers.assign((Rule("tower/kernal", freeze=True), Rule(".*")), PARAMS)
    assert "got 'tower/kernal'" in str(caught.value) and "\n" not in str(caught.value)
    assert "did you mean 'tower/kernel'?" in str(caught.value)
    shadowed = (Rule("tower/.*"), Rule("tower/bias", decay=0.0), Rule(".*"))
    with pytest.raises(UserError, match="matches no parameter that an earlier rule leaves"):
        optimisers.assign(shadowed, PARAMS)
    optimisers.assign(DEFAULT_RULES, {"w": np.ones(1)})  # the defaults need not all apply


def test_the_table_counts_what_each_rule_covers():
    rules = (Rule("tower/.*", freeze=True), *DEFAULT_RULES)
    lines = optimisers.table(rules, PARAMS).splitlines()[1:]
    counts = [(line.split()[0], *map(int, line.split()[1:3])) for line in lines]
    want = [(2, 6), (1, 1), (0, 0), (1, 2)]
    assert counts == [(r.match, *w) for r, w in zip(rules, want, strict=True)]
    assert "frozen" in lines[0] and "clamped to [0, 4.605]" in lines[1]


def test_the_optimiser_is_hashable_data():
    assert hash(Optim()) == hash(dataclasses.replace(Optim()))


def test_half_precision_gradients_of_float32_parameters():
    """The update is made in the parameters' type."""
    grads = jax.tree.map(lambda g: jnp.asarray(g, jnp.bfloat16), GRADS[0])
    got, _, _ = train(Optim(), [grads])
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(got[0]))
