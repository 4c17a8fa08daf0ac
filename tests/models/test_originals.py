"""The parts in which the originals' towers differ, each against NumPy."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vlp.core.check import UserError
from vlp.core.types import Apply
from vlp.models.layers import BlockConfig, Stack
from vlp.models.text import Text, shifted_mask
from vlp.models.two_tower import Decoder, Poolers, TwoTower
from vlp.models.vit import ViT
from vlp.ops import posembed

VIT = dict(patch=4, width=8, depth=1, heads=2, mlp=8)
TEXT = dict(vocab=16, width=8, depth=1, heads=2, mlp=8)
MODEL = dict(image_tower=ViT(**VIT, pool="cls"), text_tower=Text(**TEXT), embed=6)
IMAGE = np.random.default_rng(0).integers(0, 256, (2, 8, 8, 3)).astype(np.uint8)
WORDS = np.int32([[1, 5, 6, 2, 0, 0], [1, 7, 8, 9, 9, 2]])


def norm(x, p, eps):
    x = np.asarray(x, np.float64)
    x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + eps)
    return x * p["scale"] + p["bias"]


def attention(p, x, context=None, mask=None):
    """x [T D], context [S C]."""
    if context is None:
        q, k, v = (
            np.einsum("td,dhk->htk", x, p["qkv"]["kernel"][:, i]) + p["qkv"]["bias"][i][:, None]
            for i in range(3)
        )
    else:
        q = np.einsum("td,dhk->htk", x, p["q"]["kernel"]) + p["q"]["bias"][:, None]
        k, v = (
            np.einsum("sc,chk->hsk", context, p["kv"]["kernel"][:, i]) + p["kv"]["bias"][i][:, None]
            for i in range(2)
        )
    logits = np.einsum("htk,hsk->hts", q, k) / np.sqrt(q.shape[-1])
    logits = logits if mask is None else np.where(mask, logits, -np.inf)
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    return np.einsum("hts,hsk,hkd->td", weights, v, p["out"]["kernel"]) + p["out"]["bias"]


def mlp(p, x):
    x = x @ p["up"]["kernel"] + p["up"]["bias"]
    gelu = 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))
    return gelu @ p["down"]["kernel"] + p["down"]["bias"]


def one_layer(tree):
    return {k: one_layer(v) if isinstance(v, dict) else np.asarray(v)[0] for k, v in tree.items()}


def close(a, b):
    np.testing.assert_allclose(np.asarray(a), b, atol=2e-5)


def whole(section, params, image=IMAGE, text=WORDS):
    """What both towers answer, as one compiled program."""
    run = lambda apply, image, text: (apply("image", image), apply("text", text))
    return Apply(section, params).jit(run)(image, text)


@pytest.mark.parametrize("where", ["image_tower", "text_tower"])
def test_epsilon_is_that_of_every_norm_of_a_tower(random_params, where):
    """With inputs this small a norm's epsilon decides; the whole tower equals one whose norms all have it."""
    tower = MODEL[where].clone(eps=1e-2)
    model = TwoTower(**{**MODEL, where: tower})
    params = random_params(model, 8, 6)
    out = whole(model, params)[0 if where == "image_tower" else 1]
    p = params[where]
    block = one_layer(p["encoder"]["blocks"])
    x = np.asarray(out["words"][1]) if where == "text_tower" else image_tokens(p)
    mask = None
    if where == "text_tower":
        x = np.concatenate([x, np.asarray(p["cls"])[None]])
        mask = np.tril(np.ones((7, 7), bool))
    x = x + attention(block["self"], norm(x, block["norm_self"], 1e-2), mask=mask)
    x = x + mlp(block["mlp"], norm(x, block["norm_mlp"], 1e-2))
    pooled = norm(x, p["norm"], 1e-2)[0 if where == "image_tower" else -1]
    close(out["pooled"][1], pooled)


def image_tokens(p, cls_pos=0.0):
    """What the blocks read of the second image."""
    patches = (IMAGE[1] / 255 - 0.5) / 0.5
    patches = patches.reshape(2, 4, 2, 4, 3).swapaxes(1, 2).reshape(4, 48)
    bias = p["patch"].get("bias", 0.0)
    x = patches @ np.asarray(p["patch"]["kernel"]) + bias + np.asarray(p["pos"])
    return np.concatenate([(np.asarray(p["cls"]) + cls_pos)[None], x])


def test_the_cls_may_have_a_position(random_params):
    """CLIP's and OpenCLIP's CoCa: one more row, added to the CLS alone."""
    for where, index in (("image_tower", 0), ("text_tower", 1)):
        model = TwoTower(**{**MODEL, where: MODEL[where].clone(cls_pos=True)})
        params = random_params(model, 8, 6)
        merged = {**params, where: dict(params[where])}
        row = merged[where].pop("cls_pos")
        merged[where]["cls"] = params[where]["cls"] + row
        found = whole(model, params)[index]["pooled"]
        close(found, whole(TwoTower(**MODEL), merged)[index]["pooled"])


@pytest.mark.parametrize("first", [True, False])
def test_clipas_pooling_leaves_the_cls_out_and_may_precede_the_norm(random_params, first):
    tower = ViT(**VIT, pool="mean_patches", cls=True, pool_first=first)
    model = TwoTower(**{**MODEL, "image_tower": tower})
    params = random_params(model, 8, 6)
    out = whole(model, params)[0]
    p = params["image_tower"]
    block, x = one_layer(p["encoder"]["blocks"]), image_tokens(p)
    x = x + attention(block["self"], norm(x, block["norm_self"], 1e-6))
    x = x + mlp(block["mlp"], norm(x, block["norm_mlp"], 1e-6))
    if first:
        want = norm(x[1:].mean(0), p["norm"], 1e-6)
    else:
        want = norm(x, p["norm"], 1e-6)[1:].mean(0)
    close(out["pooled"][1], want)
    assert out["tokens"].shape == (2, 5, 8)


def test_big_visions_table_reaches_the_temperature():
    """Its frequencies are 10000^(−k / (w/4 − 1)); MoCo's are 10000^(−k / (w/4))."""
    table = posembed.sincos_2d(2, 3, 16, ends=True)
    for row in range(2):
        for column in range(3):
            want = [
                f(at / 10_000 ** (k / 3))
                for at in (column, row)
                for f in (np.sin, np.cos)
                for k in range(4)
            ]
            close(table[3 * row + column], want)
    assert not np.allclose(table, posembed.sincos_2d(2, 3, 16))


def test_openclips_mask_is_one_position_late():
    """Of [w w w . .] and of a full text: rows are queries, the last one the CLS."""
    masks = np.asarray(shifted_mask(jnp.array([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]], bool)))
    causal = np.tril(np.ones((6, 6), bool))
    np.testing.assert_array_equal(masks[0], causal & (np.arange(6) <= 3))
    np.testing.assert_array_equal(masks[1], causal)


def test_the_shifted_cls_reads_the_first_pad_as_a_word(random_params):
    model = TwoTower(**{**MODEL, "text_tower": Text(**TEXT, cls_mask="shifted")})
    params = random_params(model, 8, 6)
    out = whole(model, params)[1]
    p = params["text_tower"]
    words = np.asarray(p["embedding"])[WORDS[0]] + np.asarray(p["pos"])
    x = np.concatenate([words, np.asarray(p["cls"])[None]])
    block = one_layer(p["encoder"]["blocks"])
    mask = np.tril(np.ones((7, 7), bool)) & (np.arange(7) <= 4)  # 4 real tokens, and one pad
    x = x + attention(block["self"], norm(x, block["norm_self"], 1e-6), mask=mask)
    x = x + mlp(block["mlp"], norm(x, block["norm_mlp"], 1e-6))
    close(out["pooled"][0], norm(x[-1], p["norm"], 1e-6))


def test_the_shifted_mask_needs_a_cls_in_a_causal_tower(random_params):
    for change in (dict(pool="eos"), dict(causal=False), dict(cls_mask="late")):
        tower = Text(**{**TEXT, "cls_mask": "shifted", **change})
        with pytest.raises(UserError, match="cls_mask"):
            random_params(TwoTower(**{**MODEL, "text_tower": tower}), 8, 6)


def test_a_decoders_layer_may_be_openclips(random_params):
    """Self-attention and MLP, then cross-attention to normalised image tokens and MLP."""
    config = BlockConfig(8, 2, 8, norm_context=True, mlp_self=True, eps=1e-5)
    stack = Stack(1, config)
    rng = np.random.default_rng(1)
    x, context = rng.normal(size=(1, 5, 8)), rng.normal(size=(1, 3, 6))
    x, context = jnp.asarray(x, jnp.float32), jnp.asarray(context, jnp.float32)
    params = stack.init(jax.random.key(0), x, context=context, causal=True)
    noisy = lambda leaf: np.asarray(leaf) + rng.normal(size=leaf.shape).astype(np.float32) * 0.3
    params = jax.tree.map(noisy, nn.unbox(params))
    got, _ = stack.apply(params, x, context=context, causal=True)
    p, y, context = one_layer(params["params"]["blocks"]), np.asarray(x[0]), np.asarray(context)
    y = y + attention(p["self"], norm(y, p["norm_self"], 1e-5), mask=np.tril(np.ones((5, 5), bool)))
    y = y + mlp(p["mlp_self"], norm(y, p["norm_mlp_self"], 1e-5))
    y = y + attention(
        p["cross"], norm(y, p["norm_cross"], 1e-5), norm(context[0], p["norm_context"], 1e-5)
    )
    close(got[0], y + mlp(p["mlp"], norm(y, p["norm_mlp"], 1e-5)))


def test_a_shared_pooler_gives_the_embedding_first(random_params):
    """OpenCLIP's CoCa: one pooler, whose first query is the contrastive one; equal to two with its weights."""
    apart = TwoTower(**MODEL, decoder=Decoder(depth=1), poolers=Poolers(queries=3, cascade=False))
    shared = apart.clone(poolers=Poolers(queries=3, cascade=False, shared=True))
    params = random_params(shared, 8, 6)
    two = dict(params)
    pool = two.pop("pool_shared")
    two["pool_contrast"] = {**pool, "query": pool["query"][:1]}
    two["pool_caption"] = {**pool, "query": pool["query"][1:]}
    got, want = (whole(m, p)[0] for m, p in ((shared, params), (apart, two)))
    for name in ("embed", "feats", "pooled"):
        close(got[name], want[name])


def test_a_shared_pooler_has_no_cascade(random_params):
    with pytest.raises(UserError, match="cascade=False"):
        random_params(TwoTower(**MODEL, poolers=Poolers(queries=3, shared=True)), 8, 6)
