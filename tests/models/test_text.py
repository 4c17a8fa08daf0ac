"""The text tower: who sees whom, its pools, and padding."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vlp.core.types import Apply
from vlp.models.text import Text, attention_mask
from vlp.models.two_tower import TwoTower
from vlp.models.vit import ViT

LENGTH = 8
TEXT = Text(vocab=16, width=16, depth=1, heads=2, mlp=32)
TEXT_BL = np.int32(
    [[1, 5, 9, 4, 2, 0, 0, 0], [1, 6, 2, 0, 0, 0, 0, 0], [1, 7, 8, 3, 2, 0, 0, 0], [1, 2] + [0] * 6]
)
TOWERS = {
    "cls": TEXT,
    "eos": TEXT.clone(pool="eos"),
    "mean": TEXT.clone(pool="mean", causal=False),
    "last": TEXT.clone(pool="last", causal=False),
    "first": TEXT.clone(pool="first", causal=False),
    "map": TEXT.clone(pool="map", causal=False),
}


@pytest.fixture(scope="module")
def params(random_params):
    tower = ViT(patch=4, width=16, depth=1, heads=2, pool="mean")
    every = random_params(TwoTower(tower, TEXT.clone(pool="map"), embed=8), 4, LENGTH)["text_tower"]
    return every | random_params(TwoTower(tower, TEXT, embed=8), 4, LENGTH)["text_tower"]


@functools.partial(jax.jit, static_argnums=0)
def run(tower, params, text):
    return Apply(tower, params)("__call__", text)


@pytest.mark.parametrize("cls", [False, True])
@pytest.mark.parametrize("causal", [False, True])
def test_attention_mask_equals_its_definition(causal, cls):
    real = TEXT_BL != 0
    got = np.asarray(attention_mask(jnp.asarray(real), causal=causal, cls=cls))
    size = LENGTH + cls
    for b, t, s in np.ndindex(4, size, size):
        if s == t:
            want = True  # everyone sees itself
        elif s == LENGTH:
            want = False  # nobody sees the CLS
        elif t == LENGTH:
            want = real[b, s]  # the CLS sees the text
        else:
            want = real[b, s] and (s < t or not causal)
        assert got[b, t, s] == want, (b, t, s)


@pytest.mark.parametrize("pool", ["cls", "eos", "mean", "first", "map"])
def test_padding_changes_nothing(params, pool):
    tower = TOWERS[pool]
    out = run(tower, params, TEXT_BL)
    loud = params | {"embedding": params["embedding"].copy()}
    loud["embedding"][0] = 100.0
    other = run(tower, loud, TEXT_BL)
    np.testing.assert_array_equal(out["pooled"], other["pooled"])
    np.testing.assert_array_equal(out["tokens"][TEXT_BL != 0], other["tokens"][TEXT_BL != 0])
    cut = run(tower, params | {"pos": params["pos"][:5]}, TEXT_BL[:, :5])
    np.testing.assert_allclose(out["pooled"], cut["pooled"], atol=1e-5)
    np.testing.assert_array_equal(out["mask"], TEXT_BL != 0)


@pytest.mark.parametrize("pool", ["cls", "eos", "mean", "first", "map"])
def test_every_token_reaches_the_pool(params, pool):
    tower = TOWERS[pool]
    before = run(tower, params, TEXT_BL)["pooled"]
    for place in range(4):
        text = np.where((np.arange(LENGTH) == place) & (TEXT_BL > 2), 15, TEXT_BL)
        after = run(tower, params, text)["pooled"]
        moved = np.abs(after - before).max(axis=1) > 1e-4
        np.testing.assert_array_equal(moved, TEXT_BL[:, place] > 2)


def test_pools_read_what_they_say(params):
    """Per example: at the first EOS, the mean of real tokens, the last position whatever it holds."""
    norm = lambda x: (
        (x - x.mean()) / np.sqrt(x.var() + 1e-6) * params["norm"]["scale"] + params["norm"]["bias"]
    )
    for pool in ("eos", "mean", "last", "first"):
        out = run(TOWERS[pool], params, TEXT_BL)
        for row, text in enumerate(TEXT_BL):
            x = np.asarray(out["tokens"][row])
            want = {
                "eos": x[list(text).index(2)],
                "mean": x[text != 0].mean(0),
                "last": x[-1],
                "first": x[0],
            }[pool]
            np.testing.assert_allclose(out["pooled"][row], norm(want), atol=2e-5)


def test_map_pooling_equals_its_definition(params):
    """One query, softmax attention to the normalised real tokens, and an MLP on top of its normalised result."""
    out = run(TOWERS["map"], params, TEXT_BL)
    p, norm = (
        params["pool_map"],
        lambda x, q: (
            (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6) * q["scale"]
            + q["bias"]
        ),
    )
    linear = lambda x, q: np.tensordot(x, q["kernel"], x.ndim - 1 and 1) + q["bias"]
    for row, text in enumerate(TEXT_BL):
        x = norm(np.asarray(out["tokens"][row])[text != 0], params["norm"])
        q_HK = linear(p["query"], p["attention"]["q"])[0]
        k_LHK, v_LHK = np.moveaxis(linear(x, p["attention"]["kv"]), 1, 0)
        logits_HL = np.einsum("hk,lhk->hl", q_HK, k_LHK) / np.sqrt(8)
        weights_HL = np.exp(logits_HL) / np.exp(logits_HL).sum(-1, keepdims=True)
        mixed_HK = np.einsum("hl,lhk->hk", weights_HL, v_LHK)
        out_kernel = p["attention"]["out"]["kernel"]
        y = np.einsum("hk,hkd->d", mixed_HK, out_kernel) + p["attention"]["out"]["bias"]
        hidden = np.asarray(jax.nn.gelu(linear(norm(y, p["norm"])[None], p["mlp"]["up"])))
        want = y + linear(hidden, p["mlp"]["down"])[0]
        np.testing.assert_allclose(out["pooled"][row], want, rtol=2e-4, atol=2e-4)


def test_pads_are_words_where_the_paper_has_no_mask(params):
    """attend_padding: what the PAD row holds matters, and all positions reach the pool."""
    tower = TOWERS["first"].clone(attend_padding=True)
    other = params | {"embedding": params["embedding"].copy()}
    other["embedding"][0] *= -1.0
    before, after = (run(tower, p, TEXT_BL) for p in (params, other))
    assert (np.abs(before["pooled"] - after["pooled"]).max(axis=1) > 1e-4).all()
    np.testing.assert_array_equal(before["mask"], TEXT_BL != 0)


def test_the_first_of_several_ends_counts(params):
    text = np.where(TEXT_BL == 0, 2, TEXT_BL)  # CLIP pads with what ends a text
    out, want = (run(TOWERS["eos"], params, x)["pooled"] for x in (text, TEXT_BL))
    np.testing.assert_array_equal(out, want)


def test_a_bidirectional_tower_sees_the_future_and_no_padding(params):
    before = run(TOWERS["mean"], params, TEXT_BL)["tokens"]
    text = TEXT_BL.copy()
    text[0, 3] = 15
    after = run(TOWERS["mean"], params, text)["tokens"]
    moved = np.abs(after - before).max(axis=-1) > 1e-5
    assert moved[0, :5].all() and not moved[1:].any()


def test_no_pool_has_no_norm(random_params):
    model = TwoTower(ViT(patch=4, width=16, depth=1, heads=2, pool="mean"), TEXT, embed=8)
    names = set(random_params(model, 4, LENGTH)["text_tower"])
    shapes = jax.eval_shape(
        lambda: TEXT.clone(pool="none").init(jax.random.key(0), jnp.asarray(TEXT_BL))
    )["params"]
    assert names - set(shapes) == {"norm", "cls"}
