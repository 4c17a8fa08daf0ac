"""Every head by name: shapes, gradients, the same numbers on one device and on eight."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vlp.core import mesh as meshes
from vlp.core import tree
from vlp.core.check import UserError
from vlp.core.types import Apply
from vlp.models import heads
from vlp.models.text import Text
from vlp.models.two_tower import TwoTower
from vlp.models.vit import ViT

B, L, N, D = 8, 5, 9, 16
RNG = np.random.default_rng(0)
X_BD, TEXT_BLD, IMAGE_BND = (
    RNG.normal(size=shape).astype(np.float32) for shape in ((B, D), (B, L, D), (B, N, D))
)
MASK_BL = np.arange(L) < RNG.integers(1, L + 1, (B, 1))
BOXES_BM4 = np.float32([[0, 0, 1 / 3, 1 / 3], [0.5, 0, 1, 1]])[None].repeat(B, 0)
# head → its section, the arrays and keywords of a call, the shapes that it returns
CASES = {
    "mlp": (dict(width_out=4, hidden=6, depth=3), (X_BD,), {}, (B, 4)),
    "norm_mlp": (dict(width_out=4, depth=3, norm="layer", norm_out=True), (X_BD,), {}, (B, 4)),
    "norm_mlp of batches": (dict(width_out=4, depth=3), (X_BD,), dict(keys=0), (B, 4)),
    "fusion": (
        dict(depth=2, heads=2, mlp=24), (TEXT_BLD, IMAGE_BND), dict(mask=MASK_BL),
        {"pooled": (B, D), "tokens": (B, L, D)},
    ),
    "words": (
        dict(tied=False, vocab=12), (TEXT_BLD,), dict(embedding=RNG.normal(size=(11, 8)).astype(np.float32)),
        {"hidden": (B, L, 9), "unembed": (9, 12)},
    ),
    "prototypes": (dict(num=7, hidden=6, bottleneck=5), (X_BD,), {}, (B, 7)),
    "regions": (dict(width_out=4), (IMAGE_BND, BOXES_BM4), {}, (B, 2, 4)),
    "mixture": (dict(width_out=4, heads=2), (IMAGE_BND, TEXT_BLD[:1]), {}, (B, L, 4)),
}  # fmt: skip


def built(name):
    section, args, kwargs, _ = CASES[name]
    args, kwargs = jax.tree.map(jnp.asarray, (args, kwargs))
    if "keys" in kwargs:  # as in training
        kwargs = {"keys": jax.random.split(jax.random.key(0), B)}
    return heads.build({"x": {"name": name.split()[0], **section}})["x"], args, kwargs


def loss(params, head, args, kwargs):
    """A sum in which no two numbers weigh alike."""
    out = jax.tree.leaves(head.apply({"params": params}, *args, **kwargs))
    wave = lambda x: jnp.cos(jnp.arange(x.size, dtype=jnp.float32)).reshape(x.shape)
    return sum((x * wave(x)).sum() for x in out)


@pytest.fixture(scope="module")
def initial():
    @functools.cache
    def make(name):
        head, args, kwargs = built(name)
        boxed = jax.jit(lambda key: head.init(key, *args, **kwargs))(jax.random.key(0))["params"]
        noise = np.random.default_rng(1)
        shake = lambda x: x + 0.1 * noise.normal(size=x.shape).astype(np.float32)
        return boxed, jax.tree.map(shake, nn.unbox(boxed))

    return make


def test_each_head_has_a_case():
    missing = sorted(heads.HEADS.keys() - {name.split()[0] for name in CASES})
    assert not missing, (
        f"heads {missing} of vlp/models/heads.py are not tested. Add a row of each to CASES in this file: "
        "its section, the arrays and keywords of a call, the shapes that it returns."
    )


@pytest.mark.parametrize("name", CASES)
def test_shapes(name, initial):
    head, args, kwargs = built(name)
    out = jax.eval_shape(lambda p: head.apply({"params": p}, *args, **kwargs), initial(name)[1])
    assert jax.tree.map(lambda x: x.shape, out) == CASES[name][3]


@pytest.mark.parametrize("name", CASES)
def test_gradients_reach_every_leaf_and_are_the_same_on_eight_devices(name, initial, error):
    head, args, kwargs = built(name)
    boxed, params = initial(name)
    grad = jax.jit(jax.grad(loss), static_argnums=1)
    one = grad(params, head, args, kwargs)
    for leaf, g in tree.named(one).items():
        assert np.isfinite(g).all() and np.abs(g).max() > 0, leaf
    mesh = meshes.make(meshes.MeshShape(2, 2, 2))
    with jax.set_mesh(mesh):
        placed = jax.device_put(params, meshes.shardings(boxed, mesh))
        rows = lambda x: x if x.shape[0] != B else jax.device_put(x, meshes.batch_sharding(mesh))
        eight = grad(placed, head, *jax.tree.map(rows, (args, kwargs)))
    assert error(eight, one) < 1e-5


@pytest.mark.parametrize("name", CASES)
def test_every_matrix_names_its_axes(name, initial):
    is_box = lambda x: isinstance(x, nn.meta.AxisMetadata)
    for leaf in jax.tree.leaves(initial(name)[0], is_leaf=is_box):
        assert isinstance(leaf, nn.LogicallyPartitioned)


def test_a_region_is_the_mean_of_what_its_box_covers():
    head = heads.RegionsHead()
    grid_133D = IMAGE_BND[:1].reshape(1, 3, 3, D)
    boxes = np.float32([[0, 0, 1 / 3, 1 / 3], [0.5, 0, 1, 1], [0.4, 0.4, 0.4, 0.4]])[None]
    out = head.apply({}, jnp.asarray(IMAGE_BND[:1]), jnp.asarray(boxes))[0]
    right = (0.5 * grid_133D[0, :, 1] + grid_133D[0, :, 2]).sum(0) / (3 * 1.5)
    want = [grid_133D[0, 0, 0], right, IMAGE_BND[0].mean(0)]
    np.testing.assert_allclose(out, want, atol=1e-5)
    weights = np.float32(RNG.uniform(size=(1, 2, N)))
    out = head.apply({}, jnp.asarray(IMAGE_BND[:1]), jnp.asarray(weights), boxes=False)[0]
    want = weights[0] @ IMAGE_BND[0] / weights[0].sum(1, keepdims=True)
    np.testing.assert_allclose(out, want, atol=1e-5)


def test_pads_do_not_change_what_is_fused(initial):
    head, (text, image), kwargs = built("fusion")
    params = initial("fusion")[1]
    run = lambda text: head.apply({"params": params}, text, image, **kwargs)["tokens"]
    other = jnp.where(MASK_BL[..., None], text, 7.0)
    np.testing.assert_allclose(run(text)[MASK_BL], run(other)[MASK_BL], atol=1e-5)


def test_prototypes_are_cosines(initial):
    head, args, _ = built("prototypes")
    params = initial("prototypes")[1]
    out = head.apply({"params": params}, *args)
    assert np.abs(out).max() <= 1 + 1e-5
    longer = dict(params, prototypes=3 * params["prototypes"])
    np.testing.assert_allclose(head.apply({"params": longer}, *args), out, rtol=1e-4, atol=1e-6)


def test_tied_words_read_the_text_towers_embedding():
    tower = dict(width=8, depth=1, heads=2)
    model = TwoTower(
        ViT(patch=8, **tower),
        Text(vocab=11, **tower),
        heads=heads.build({"words": {"name": "words"}}),
    )

    def all_of(module):
        tokens = module.text(jnp.ones((1, 4), jnp.int32))["tokens"]
        return module.head("words", tokens)

    params = nn.unbox(jax.jit(lambda: nn.init(all_of, model)(jax.random.key(0)))()["params"])
    assert params["heads_words"].keys() == {"bias", "dense", "norm"}
    out = Apply(model, params)("head", "words", jnp.ones((1, 4, 8)))
    np.testing.assert_array_equal(out["unembed"][:-1], params["text_tower"]["embedding"].T)
    np.testing.assert_array_equal(out["hidden"][..., -1], np.ones((1, 4)))


@pytest.mark.parametrize(
    "section, message",
    [
        (
            {"name": "mpl", "width_out": 2},
            "x.name: got 'mpl', expected one of ['fusion', 'mixture'",
        ),
        ({"name": "mlp"}, "width_out"),
        ({"name": "mlp", "width_out": 2, "dept": 1}, "did you mean 'depth'?"),
    ],
)
def test_wrong_sections(section, message):
    with pytest.raises(UserError) as caught:
        heads.build({"x": section})
    assert message in str(caught.value) and "\n" not in str(caught.value)
