"""The text tower run again as the decoder (MaMMUT): that run cannot see the future, the other sees no image."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vlp.core import tree
from vlp.core.types import Apply
from vlp.models.text import Text
from vlp.models.two_tower import Decoder, TwoTower
from vlp.models.vit import ViT

TOWER = dict(width=16, depth=2, heads=2, mlp=32)
MODEL = TwoTower(
    ViT(patch=8, pool="mean", **TOWER),
    Text(vocab=24, pool="norm_mean", causal=False, **TOWER),
    embed=8,
    decoder=Decoder(),
)
TEXT = jnp.array([[1, 5, 9, 7, 2, 0, 0, 0]])
IMAGE = jnp.asarray(np.random.default_rng(0).integers(0, 256, (1, 16, 16, 3)), jnp.uint8)


@pytest.fixture(scope="module")
def apply(random_params):
    return Apply(MODEL, jax.tree.map(jnp.asarray, random_params(MODEL, 16, 8)))


def hidden(apply, text, image=IMAGE):
    return apply("decode", apply("text", text)["tokens"], apply("image", image)["feats"])["hidden"]


def test_captions_cannot_see_the_future_and_see_the_image(apply):
    one, other = hidden(apply, TEXT), hidden(apply, TEXT.at[0, 3].set(8))
    np.testing.assert_array_equal(one[:, :3], other[:, :3])
    assert (one[:, 3] != other[:, 3]).any()
    assert (hidden(apply, TEXT, 255 - IMAGE) != one).any(axis=(0, 2)).all()


def test_the_embedding_sees_both_ways_no_pads_and_no_image(apply):
    embed = lambda text: apply("text", text)["embed"]
    assert (embed(TEXT) != embed(TEXT.at[0, 3].set(8))).any()

    def loud(name, x):
        return x.at[0].set(7.0) if name == "text_tower/embedding" else x

    pads = Apply(MODEL, tree.map_named(loud, apply.params))
    np.testing.assert_array_equal(embed(TEXT), pads("text", TEXT)["embed"])

    def first(params):
        return Apply(MODEL, params)("text", TEXT)["embed"][0, 0]

    grads = tree.named(jax.grad(first)(apply.params))
    cross = {name for name in grads if "/cross/" in name or "norm_cross" in name}
    assert len(cross) == 8
    for name, g in grads.items():
        read = name.startswith(("text_tower", "joint_text")) and name not in cross
        assert np.abs(g).max() > 0 if read else (g == 0).all(), name
