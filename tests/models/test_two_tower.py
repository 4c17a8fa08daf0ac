"""The two-tower model with all its parts: causality, padding, the CLS, variants, and names of parameters."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from helpers import runs
from helpers.everything import abstract
from vlp.core import tree
from vlp.core.types import Apply
from vlp.losses import caption
from vlp.models import heads
from vlp.models.text import Text
from vlp.models.two_tower import Decoder, Poolers, TwoTower
from vlp.models.vit import ViT

PX, LENGTH, VOCAB = 16, 8, 24
TOWER = dict(width=16, depth=2, heads=2, mlp=32, dropout=0.1, drop_path=0.1)
MODEL = TwoTower(
    image_tower=ViT(patch=4, **TOWER),
    text_tower=Text(vocab=VOCAB, **TOWER),
    embed=8,
    decoder=Decoder(depth=2),
    poolers=Poolers(queries=3),
    heads=heads.build({"predict": {"name": "mlp", "width_out": 4}}),
)
TEXT_BL = np.int32(
    [
        [1, 5, 9, 4, 2, 0, 0, 0],
        [1, 6, 2, 0, 0, 0, 0, 0],
        [1, 7, 8, 3, 2, 0, 0, 0],
        [1, 0, 0, 0, 0, 0, 0, 0],
    ]
)
FULL_BL = np.int32([[1, 10, 11, 12, 13, 14, 15, 2]] * 4)  # every position another token


@pytest.fixture(scope="module")
def params(random_params):
    return random_params(MODEL, PX, LENGTH, heads=(("predict", 8),))


@pytest.fixture(scope="module")
def image():
    return np.random.default_rng(1).integers(0, 256, (4, PX, PX, 3)).astype(np.uint8)


@functools.partial(jax.jit, static_argnums=0)
def forward(model, params, image, text):
    apply = Apply(model, params)
    zi, zt = apply("image", image), apply("text", text)
    out = apply("decode", zt["tokens"], zi["feats"])
    return {
        "image": zi["embed"],
        "text": zt["embed"],
        "tokens": zt["tokens"],
        "hidden": out["hidden"],
        "logits": out["hidden"] @ out["unembed"],
        "loss": caption.nll(out["hidden"], out["unembed"], text)["total"],
    }


def changed(params, name, change):
    """The parameters with one leaf changed."""
    return tree.map_named(lambda n, x: change(np.array(x)) if n == name else x, params)


def filled(row, value):
    def change(x):
        x[row] = value
        return x

    return change


def same(a, b, names, rows=slice(None)):
    for name in names:
        np.testing.assert_array_equal(a[name][rows], b[name][rows], err_msg=name)


def differ(a, b, name):
    return float(np.abs(a[name] - b[name]).max()) > 1e-3


def test_future_tokens_have_no_gradient(params):
    """Each position and each token of FULL enters at one place: its rows of the two tables tell who sees it."""
    mix_LV = np.random.default_rng(2).normal(size=(LENGTH, VOCAB)).astype(np.float32)
    feats = jnp.asarray(np.random.default_rng(3).normal(size=(1, 3, 16)), jnp.float32)

    def seen_at(tables, last):
        apply = Apply(MODEL, params | {"text_tower": params["text_tower"] | tables})
        out = apply("decode", apply("text", jnp.asarray(FULL_BL[:1]))["tokens"], feats)
        logits_LV = (out["hidden"] @ out["unembed"])[0]
        return (logits_LV * mix_LV * (jnp.arange(LENGTH) <= last)[:, None]).sum()

    tables = {k: params["text_tower"][k] for k in ("pos", "embedding")}
    grads = jax.jit(jax.vmap(jax.grad(seen_at), in_axes=(None, 0)))(tables, jnp.arange(LENGTH))
    for last in range(LENGTH):
        for rows in (grads["pos"][last], grads["embedding"][last, FULL_BL[0]]):
            assert (rows[last + 1 :] == 0).all()
            assert (np.abs(rows[: last + 1]).max(axis=1) > 0).all()


def test_another_future_changes_no_logit(params, image):
    before = forward(MODEL, params, image, FULL_BL)
    for last in range(LENGTH - 1):
        text = FULL_BL.copy()
        text[:, last + 1 :] = np.flip(text[:, last + 1 :], axis=1) + 3
        after = forward(MODEL, params, image, text)
        same(before, after, ["logits"], np.s_[:, : last + 1])
        assert differ(before, after, "logits") and differ(before, after, "text")


def test_the_pad_row_changes_nothing(params, image):
    before = forward(MODEL, params, image, TEXT_BL)
    other = changed(params, "text_tower/embedding", filled(0, 100.0))
    after = forward(MODEL, other, image, TEXT_BL)
    same(before, after, ["image", "text", "loss"])
    same(before, after, ["hidden", "tokens"], TEXT_BL != 0)


def test_appended_pads_change_nothing(params, image):
    whole = forward(MODEL, params, image, TEXT_BL)
    short = changed(params, "text_tower/pos", lambda x: x[:5])
    cut = forward(MODEL, short, image, TEXT_BL[:, :5])
    for name in ("image", "text", "loss"):
        np.testing.assert_allclose(whole[name], cut[name], rtol=1e-5, atol=1e-5, err_msg=name)
    real = TEXT_BL[:, :5] != 0
    np.testing.assert_allclose(whole["hidden"][:, :5][real], cut["hidden"][real], atol=1e-5)


def test_captions_do_not_see_the_cls(params, image):
    before = forward(MODEL, params, image, FULL_BL)
    other = changed(params, "text_tower/cls", lambda x: 2 * x + 1)
    after = forward(MODEL, other, image, FULL_BL)
    same(before, after, ["hidden", "tokens", "loss", "image"])
    assert differ(before, after, "text")


def test_the_cls_sees_all_of_the_text(params, image):
    before = forward(MODEL, params, image, TEXT_BL)["text"]
    for place in range(5):
        text = np.where((np.arange(LENGTH) == place) & (TEXT_BL != 0), 20, TEXT_BL)
        after = forward(MODEL, params, image, text)["text"]
        moved = np.abs(after - before).max(axis=1) > 1e-4
        np.testing.assert_array_equal(moved, TEXT_BL[:, place] != 0)


def test_rows_do_not_see_each_other(params, image):
    before = forward(MODEL, params, image, TEXT_BL)
    order = np.array([2, 0, 3, 1])
    after = forward(MODEL, params, image[order], TEXT_BL[order])
    for name in before:
        np.testing.assert_allclose(before[name][order], after[name], atol=2e-5, err_msg=name)
    others = np.arange(4) != 1
    text = np.where(others[:, None], FULL_BL, TEXT_BL)
    after = forward(MODEL, params, np.where(others[:, None, None, None], 255 - image, image), text)
    same(before, after, before.keys(), slice(1, 2))


def test_captions_read_the_image_and_embeddings_are_unit_vectors(params, image):
    before, after = (forward(MODEL, params, x, TEXT_BL) for x in (image, image[::-1].copy()))
    assert differ(before, after, "logits") and differ(before, after, "image")
    same(before, after, ["text", "tokens"])
    for name in ("image", "text"):
        np.testing.assert_allclose(np.linalg.norm(before[name], axis=1), 1, rtol=1e-5)


def test_evaluation_ignores_keep_and_dropout(image):
    """Without keys the traced program is that of a model that has neither."""

    def program(model, **kwargs):
        params = abstract(model, PX, 8)

        def run(params, image, text):
            apply = Apply(model, params)
            feats = apply("image", image, **kwargs)["feats"]
            return apply("decode", apply("text", text)["tokens"], feats)

        return str(jax.make_jaxpr(run)(params, image, TEXT_BL))

    off = dict(dropout=0.0, drop_path=0.0)
    towers = {n: getattr(MODEL, n).clone(**off) for n in ("image_tower", "text_tower")}
    assert program(MODEL, keep_ratio=0.5) == program(MODEL.clone(**towers))


def test_draws_come_from_each_examples_key(params, image):
    keys = jax.random.split(jax.random.key(0), 4)

    @jax.jit
    def draw(params, keys, image, text):
        apply = Apply(MODEL, params)
        out = apply("image", image, keep_ratio=0.5, keys=keys)
        text = apply("text", text, keys=keys)
        hidden = apply("decode", text["tokens"], out["feats"], keys=keys)["hidden"]
        return {"image": out["embed"], "text": text["embed"], "kept": out["kept"], "hidden": hidden}

    noisy = functools.partial(draw, params)
    alike = np.tile(image[:1], (4, 1, 1, 1)), np.tile(FULL_BL[:1], (4, 1))
    out = noisy(keys, *alike)
    for name, x in out.items():  # the same example under four keys
        assert len({np.asarray(row).tobytes() for row in x}) == 4, name
    again = noisy(keys, *alike)
    same(out, again, out.keys())
    order = np.array([3, 1, 0, 2])
    moved = noisy(keys[order], *alike)
    for name in out:
        np.testing.assert_allclose(out[name][order], moved[name], atol=2e-5, err_msg=name)


def test_double_precision_stays_double(random_params, image):
    """Nothing rounds to float32 on the way, so that comparisons at 1e-10 are possible."""
    towers = {n: getattr(MODEL, n).clone(dtype="float64") for n in ("image_tower", "text_tower")}
    model = MODEL.clone(**towers)

    def conversions(jaxpr):
        for eqn in jaxpr.eqns:
            kinds = (
                eqn.primitive.name,
                eqn.invars and eqn.invars[0].aval.dtype,
                eqn.outvars and eqn.outvars[0].aval.dtype,
            )
            if kinds == ("convert_element_type", np.float64, np.float32):
                yield eqn
            for inner in runs.inner_jaxprs(eqn):
                yield from conversions(inner)

    with jax.enable_x64(True):
        params = jax.tree.map(np.float64, random_params(MODEL, PX, LENGTH))
        jaxpr = jax.make_jaxpr(functools.partial(forward, model))(params, image, TEXT_BL)
        assert {x.dtype for x in jaxpr.out_avals} == {np.dtype(np.float64)}
        assert not list(conversions(jaxpr.jaxpr))


@functools.partial(jax.jit, static_argnums=0)
def encode(model, params, image):
    return Apply(model, params)("image", image)


def test_cascade_and_parallel_poolers(params, image):
    """Cascade: the contrastive pooler reads the captioning pooler. Parallel: it reads the tokens."""
    query = lambda p: changed(p, "pool_caption/query", lambda x: 1 - x)
    before, after = encode(MODEL, params, image), encode(MODEL, query(params), image)
    assert differ(before, after, "embed") and differ(before, after, "feats")
    parallel = MODEL.clone(poolers=Poolers(queries=3, cascade=False))
    before, after = encode(parallel, params, image), encode(parallel, query(params), image)
    same(before, after, ["embed"])
    assert differ(before, after, "feats")
    assert before["feats"].shape == (4, 3, 16)


def test_without_queries_the_decoder_reads_the_tokens(random_params, image):
    model = MODEL.clone(poolers=Poolers(queries=0, cascade=False))
    params = random_params(model, PX, LENGTH)
    assert "pool_caption" not in params
    out = encode(model, params, image)
    same(out, out | {"feats": out["tokens"]}, ["feats"])


def test_variants_have_the_parameters_they_use(random_params):
    names = lambda model: set(tree.named(random_params(model, PX, LENGTH)))
    full = names(MODEL)
    tied = MODEL.clone(decoder=dataclasses.replace(MODEL.decoder, tied=True))
    assert full - names(tied) == {"unembedding"}
    cap = MODEL.clone(embed=0, text_tower=MODEL.text_tower.clone(pool="none"), heads=None)
    gone = {n.split("/")[0] for n in full - names(cap)}
    assert gone == {
        "pool_contrast",
        "joint_image",
        "joint_text",
        "temperature",
        "text_tower",
    }
    assert {n for n in full - names(cap) if n.startswith("text_tower")} == {
        "text_tower/cls",
        "text_tower/norm/scale",
        "text_tower/norm/bias",
    }
    assert names(MODEL.clone(bias=-10.0)) - full == {"temperature/logit_bias"}


def test_tied_logits_read_the_token_embeddings(random_params):
    tied = MODEL.clone(decoder=dataclasses.replace(MODEL.decoder, tied=True))
    params = random_params(tied, PX, LENGTH)
    decode = jax.jit(lambda p, x, feats: Apply(tied, p)("decode", x, feats))
    out = decode(params, jnp.zeros((1, LENGTH, 16)), jnp.zeros((1, 3, 16)))
    np.testing.assert_array_equal(out["unembed"], params["text_tower"]["embedding"].T)


def test_heads_and_scale(params):
    apply = Apply(MODEL, params)
    x = np.random.default_rng(0).normal(size=(3, 8)).astype(np.float32)
    layers = params["heads_predict"]
    hidden = jax.nn.gelu(x @ layers["layer0"]["kernel"] + layers["layer0"]["bias"][None])
    want = hidden @ layers["layer1"]["kernel"] + layers["layer1"]["bias"][None]
    np.testing.assert_allclose(apply("head", "predict", jnp.asarray(x)), want, rtol=1e-5, atol=1e-6)
    scale, bias = apply("scale_bias")
    np.testing.assert_allclose(scale, np.exp(2.0), rtol=1e-6)
    assert float(bias) == 0


def test_parameter_names_are_kept_in_checkpoints(random_params):
    """If one changes on purpose, old checkpoints need a rule for it (vlp/ckpt); then change this list."""
    model = MODEL.clone(heads=None)
    block = [f"{part}/{leaf}" for part in ("norm_self", "norm_mlp") for leaf in ("scale", "bias")]
    block += [
        f"{part}/{leaf}"
        for part in ("self/qkv", "self/out", "mlp/up", "mlp/down")
        for leaf in ("kernel", "bias")
    ]
    cross = [f"cross/{part}/{leaf}" for part in ("q", "kv", "out") for leaf in ("kernel", "bias")]
    cross += ["norm_cross/scale", "norm_cross/bias"]
    pool = [
        f"attention/{part}/{leaf}" for part in ("q", "kv", "out") for leaf in ("kernel", "bias")
    ]
    pool += ["query", "norm/scale", "norm/bias", "norm_query/scale", "norm_query/bias"]
    want = [
        f"image_tower/{n}" for n in ("pos", "patch/kernel", "patch/bias", "norm/scale", "norm/bias")
    ]
    want += [f"text_tower/{n}" for n in ("pos", "cls", "embedding", "norm/scale", "norm/bias")]
    want += [
        f"{tower}/encoder/blocks/{n}" for tower in ("image_tower", "text_tower") for n in block
    ]
    want += [f"decoder/blocks/{n}" for n in block + cross]
    want += [f"{name}/{n}" for name in ("pool_caption", "pool_contrast") for n in pool]
    want += ["joint_image/proj/kernel", "joint_text/proj/kernel", "temperature/logit_scale"]
    want += ["decoder_norm/scale", "decoder_norm/bias", "unembedding"]
    assert sorted(tree.named(random_params(model, PX, LENGTH))) == sorted(want)
