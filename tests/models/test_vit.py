"""The image tower: patches, positions, and what dropping patches keeps."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vlp.core import tree
from vlp.core.types import Apply
from vlp.models.layers import ACTIVATIONS
from vlp.models.text import Text
from vlp.models.two_tower import TwoTower
from vlp.models.vit import ViT, patchify

PX, NUM = 16, 16
VIT = ViT(patch=4, width=16, depth=2, heads=2, mlp=32, pool="mean")
KEYS = jax.random.split(jax.random.key(0), 3)


@pytest.fixture(scope="module")
def params(random_params):
    return tower_params(random_params, VIT)


def tower_params(random_params, tower):
    text = Text(vocab=8, width=16, depth=1, heads=2)
    return random_params(TwoTower(tower, text, embed=8), PX, 4)["image_tower"]


@pytest.fixture(scope="module")
def image():
    return np.random.default_rng(1).integers(0, 256, (3, PX, PX, 3)).astype(np.uint8)


@functools.partial(jax.jit, static_argnums=0, static_argnames=("keep_ratio", "layers"))
def run(tower, params, image, **kwargs):
    return Apply(tower, params)("__call__", image, **kwargs)


def test_patches_are_cut_row_by_row(image):
    patches = np.asarray(patchify(jnp.asarray(image), 4))
    for i in range(NUM):
        y, x = divmod(i, 4)
        block = image[:, 4 * y : 4 * y + 4, 4 * x : 4 * x + 4]
        np.testing.assert_array_equal(patches[:, i], block.reshape(3, 48))


def test_keeping_all_is_no_masking_to_the_bit(params, image):
    whole, kept = run(VIT, params, image), run(VIT, params, image, keep_ratio=1.0, keys=KEYS)
    assert kept["kept"] is None
    for name in ("tokens", "pooled"):
        np.testing.assert_array_equal(whole[name], kept[name])


def test_kept_patches_carry_their_own_positions(params, image):
    """Patches may be kept in any order: the tokens come out in that order, and are the same."""
    whole = run(VIT, params, image)
    rng = np.random.default_rng(0)
    for order in (np.tile(np.arange(NUM), (3, 1)), rng.permuted([range(NUM)] * 3, axis=1)):
        out = run(VIT, params, image, kept=jnp.asarray(order))
        want = np.take_along_axis(np.asarray(whole["tokens"]), order[..., None], axis=1)
        np.testing.assert_allclose(out["tokens"], want, atol=2e-5)
        np.testing.assert_allclose(out["pooled"], whole["pooled"], atol=2e-5)


def test_masked_is_the_subset_of_the_whole(params, image):
    """With attention switched off, each token is a function of its patch and position alone."""
    off = lambda name, x: np.zeros_like(x) if "self/out" in name else x
    alone = tree.map_named(off, params)
    out = run(VIT, alone, image, keep_ratio=0.5, keys=KEYS)
    kept = np.asarray(out["kept"])
    assert kept.shape == (3, 8) and len({tuple(row) for row in kept}) == 3
    want = np.take_along_axis(np.asarray(run(VIT, alone, image)["tokens"]), kept[..., None], axis=1)
    np.testing.assert_allclose(out["tokens"], want, atol=1e-5)


def test_dropped_patches_are_not_seen(params, image):
    out = run(VIT, params, image, keep_ratio=0.5, keys=KEYS)
    kept = np.asarray(out["kept"])
    assert out["tokens"].shape == (3, 8, 16)
    grid = np.zeros((3, NUM), bool)
    np.put_along_axis(grid, kept, True, axis=1)
    seen = np.kron(grid.reshape(3, 4, 4), np.ones((4, 4), bool))[..., None]
    blank = run(VIT, params, np.where(seen, image, 0).astype(np.uint8), keep_ratio=0.5, keys=KEYS)
    np.testing.assert_array_equal(out["tokens"], blank["tokens"])
    again = run(VIT, params, image, kept=out["kept"])
    np.testing.assert_allclose(out["tokens"], again["tokens"], atol=1e-6)


def test_every_pool_has_its_shape(params, image, random_params):
    out = run(VIT, params, image)
    np.testing.assert_allclose(out["pooled"], out["tokens"].mean(axis=1), atol=1e-6)
    cls = VIT.clone(pool="cls")
    with_cls = tower_params(random_params, cls)
    out = run(cls, with_cls, image, keep_ratio=0.5, keys=KEYS)
    assert out["tokens"].shape == (3, 9, 16)  # the CLS is never dropped
    np.testing.assert_array_equal(out["pooled"], out["tokens"][:, 0])
    assert {"cls"} == set(with_cls) - set(params)
    assert jax.eval_shape(lambda: run(VIT.clone(pool="none"), params, image))["pooled"] is None


def test_pixels_are_bytes_or_fractions_and_normalised(params, image):
    out = run(VIT, params, image)
    exact = run(VIT, params, (image / np.float32(255)).astype(np.float32))
    np.testing.assert_allclose(out["tokens"], exact["tokens"], atol=1e-5)
    mean, std = np.float32([0.1, 0.2, 0.3]), np.float32([0.4, 0.5, 0.6])
    tinted = VIT.clone(mean=tuple(map(float, mean)), std=tuple(map(float, std)))
    pixels = (image / np.float32(255) - 0.5) / 0.5 * std + mean
    again = run(tinted, params, pixels.astype(np.float32))
    np.testing.assert_allclose(out["tokens"], again["tokens"], atol=2e-5)


def test_fixed_positions_are_no_parameter(params, random_params, image):
    fixed = tower_params(random_params, VIT.clone(pos="sincos"))
    assert set(params) - set(fixed) == {"pos"}
    same = run(VIT.clone(pos="sincos"), fixed, np.full_like(image, 7))
    assert np.abs(np.diff(same["tokens"], axis=1)).min() > 0  # positions still tell patches apart


def test_layers_are_the_outputs_of_the_blocks(params, image):
    out = run(VIT, params, image, layers=True)
    assert out["layers"].shape == (2, 3, NUM, 16)
    last = np.asarray(out["layers"][-1])
    norm = (last - last.mean(-1, keepdims=True)) / np.sqrt(last.var(-1, keepdims=True) + 1e-6)
    want = norm * params["norm"]["scale"] + params["norm"]["bias"]
    np.testing.assert_allclose(out["tokens"], want, atol=2e-5)


def test_registers_are_seen_and_not_returned(params, random_params, image):
    tower = VIT.clone(registers=3)
    with_registers = tower_params(random_params, tower)
    assert {"registers"} == set(with_registers) - set(params)
    out = run(tower, with_registers, image, keep_ratio=0.5, keys=KEYS, layers=True)
    assert out["tokens"].shape == (3, 8, 16) and out["layers"].shape == (2, 3, 8, 16)
    others = with_registers | {"registers": -with_registers["registers"]}
    other = run(tower, others, image, keep_ratio=0.5, keys=KEYS)
    assert (np.abs(out["pooled"] - other["pooled"]).max(axis=1) > 1e-4).all()
    deaf = tree.map_named(lambda name, x: np.zeros_like(x) if "self/out" in name else x, others)
    plain = {k: v for k, v in deaf.items() if k != "registers"}
    ours, theirs = run(tower, deaf, image), run(VIT, plain, image)  # without attention, no trace
    np.testing.assert_allclose(ours["tokens"], theirs["tokens"], atol=1e-6)


def test_the_mean_counts_the_cls_where_there_is_one(params, random_params, image):
    """FLIP averages over all tokens that its blocks give, the CLS among them."""
    tower = VIT.clone(cls=True)
    out = run(tower, tower_params(random_params, tower), image, keep_ratio=0.5, keys=KEYS)
    assert out["tokens"].shape == (3, 9, 16)
    np.testing.assert_allclose(out["pooled"], out["tokens"].mean(axis=1), atol=1e-6)


def test_a_norm_before_the_blocks_forgets_the_scale(random_params, image):
    """CLIP: with no bias of its own and no positions, the size of the patch embedding cannot matter."""
    tower = VIT.clone(pre_norm=True, patch_bias=False)
    params = tower_params(random_params, tower)
    assert "bias" not in params["patch"] and set(params["norm_pre"]) == {"scale", "bias"}
    params = params | {"pos": np.zeros_like(params["pos"])}
    double = params | {"patch": {"kernel": 2 * params["patch"]["kernel"]}}
    before, after = (run(tower, p, image)["tokens"] for p in (params, double))
    np.testing.assert_allclose(before, after, atol=1e-4)


def test_map_pooling_reads_all_tokens_and_no_order(random_params, image):
    tower = VIT.clone(pool="map")
    params = tower_params(random_params, tower)
    out = run(tower, params, image)
    order = np.random.default_rng(0).permuted([range(NUM)] * 3, axis=1)
    shuffled = run(tower, params, image, kept=jnp.asarray(order))
    np.testing.assert_allclose(out["pooled"], shuffled["pooled"], atol=5e-5)
    part = run(tower, params, image, kept=jnp.asarray(order[:, :-1]))
    assert (np.abs(out["pooled"] - part["pooled"]).max(axis=1) > 1e-4).all()


def test_quick_gelu_is_its_formula():
    x = np.linspace(-4, 4, 17, dtype=np.float32)
    np.testing.assert_allclose(
        ACTIVATIONS["quick_gelu"](x), x / (1 + np.exp(-1.702 * x)), rtol=1e-5
    )
