"""Parameters transferred into a model of other shapes."""

import logging

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from helpers.everything import abstract
from vlp.ckpt import init_from
from vlp.core import check, tree
from vlp.core import mesh as meshes
from vlp.core.config import build_named
from vlp.models import MODELS
from vlp.ops import posembed

TOWER = {"width": 8, "depth": 1, "heads": 2, "mlp": 16}


def model(**image):
    image_tower = {"patch": 8, "pool": "mean", **TOWER, **image}
    text_tower = {"vocab": 32, "pool": "eos", **TOWER}
    section = {
        "name": "two_tower",
        "embed": 8,
        "image_tower": image_tower,
        "text_tower": text_tower,
    }
    return build_named(MODELS, section, "config.model")


def named(params):
    """Every array by name, in NumPy."""
    return {name: np.asarray(value) for name, value in tree.named(params).items()}


@pytest.fixture
def draw(random_params):
    """The function (model, image_px, text_len, seed) → its parameters by name."""
    return lambda *args: jax.tree.map(jnp.asarray, random_params(*args))


def test_equal_sizes_to_the_bit(draw):
    old, fresh = draw(model(), 16, 8, 0), draw(model(), 16, 8, 1)
    carried = init_from.transfer_params(old, fresh)
    assert jax.tree.structure(carried) == jax.tree.structure(fresh)
    np.testing.assert_equal(named(carried), named(old))


@pytest.mark.parametrize(("px", "length"), [(24, 8), (16, 12), (8, 5)])
def test_positions_are_resized(draw, px, length):
    old, fresh = draw(model(), 16, 8, 0), draw(model(), px, length, 1)
    carried, before = named(init_from.transfer_params(old, fresh)), named(old)
    grid = posembed.resize_grid(jnp.asarray(before.pop("image_tower/pos")), (px // 8) ** 2)
    np.testing.assert_array_equal(carried.pop("image_tower/pos"), grid)
    words = carried.pop("text_tower/pos")
    np.testing.assert_array_equal(words[:8], before.pop("text_tower/pos")[:length])
    np.testing.assert_array_equal(words[8:], named(fresh)["text_tower/pos"][8:])
    np.testing.assert_equal(carried, before)


def test_sincos_has_no_table(draw):
    old, fresh = draw(model(pos="sincos"), 16, 8, 0), draw(model(pos="sincos"), 24, 8, 1)
    assert "image_tower/pos" not in named(fresh)
    np.testing.assert_equal(named(init_from.transfer_params(old, fresh)), named(old))


def test_new_and_dropped_leaves_are_named(draw, caplog):
    fresh = draw(model(), 16, 8, 1)
    old = {**draw(model(), 16, 8, 0), "old_head": {"kernel": jnp.ones(3)}}
    fresh["probe"] = {"kernel": jnp.full(2, 7.0)}
    with caplog.at_level(logging.INFO):
        carried = init_from.transfer_params(old, fresh, "stage 'x'")
    assert "stage 'x': new, initialised: probe/kernel" in caplog.messages
    assert "stage 'x': not used: old_head/kernel" in caplog.messages
    np.testing.assert_array_equal(carried["probe"]["kernel"], [7, 7])
    assert "old_head" not in carried


def test_a_pattern_picks_what_is_carried(draw):
    """LiT: only the other run's image tower is transferred, whatever the shapes of the rest."""
    old, fresh = draw(model(), 16, 8, 0), draw(model(), 24, 8, 1)
    old["text_tower"] = {"pos": jnp.ones((3, 5))}
    picked = init_from.select_params(old, "image_tower/.*", "init")
    init_from.check_fits(picked, fresh, "init")
    carried = named(init_from.transfer_params(picked, fresh))
    for name, leaf in named(fresh).items():
        if name != "image_tower/pos":  # which is resized
            want = named(old)[name] if name.startswith("image_tower/") else leaf
            np.testing.assert_array_equal(carried[name], want)
    assert (carried["image_tower/pos"] != fresh["image_tower"]["pos"]).any()
    with pytest.raises(
        check.UserError, match="init_match: got 'image_towr/.*', expected a pattern for"
    ):
        init_from.select_params(old, "image_towr/.*", "init")


def test_other_shapes_are_refused(draw):
    old, fresh = draw(model(), 16, 8, 0), draw(model(mlp=24), 16, 8, 1)
    message = (
        r"init: image_tower/encoder/blocks/mlp/.*: got shape \(1, .*16.*\), expected \(1, .*24"
    )
    for refuse in (init_from.transfer_params, init_from.check_fits):
        with pytest.raises(check.UserError, match=message):
            refuse(old, fresh, "init")
    wide = {"image_tower": {"pos": jnp.ones((9, 8))}}, {"image_tower": {"pos": jnp.ones((4, 6))}}
    with pytest.raises(check.UserError, match="image_tower/pos"):
        init_from.check_fits(*wide, "init")


def test_shards_and_types_of_the_fresh(draw):
    """NumPy arrays, as loaded from a checkpoint, get the run's sharding and dtype."""
    mesh = meshes.make(meshes.MeshShape(2, 2, 2))
    boxed = abstract(model(), 24, 8)
    shards = meshes.shardings(boxed, mesh)
    fresh = jax.device_put(draw(model(), 24, 8, 1), nn.unbox(shards))
    old = jax.tree.map(lambda x: np.asarray(x, np.float64), draw(model(), 16, 8, 0))
    carried = init_from.transfer_params(old, fresh)
    assert jax.tree.all(jax.tree.map(lambda a, b: a.sharding == b.sharding, carried, fresh))
    assert jax.tree.all(jax.tree.map(lambda a, b: a.dtype == b.dtype, carried, fresh))
    assert not all(x.sharding.is_fully_replicated for x in jax.tree.leaves(carried))
