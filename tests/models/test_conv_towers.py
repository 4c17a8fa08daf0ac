"""ConvNeXt and CLIP's ResNet against plain NumPy; scan, remat and precision; what they refuse."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from helpers import runs
from vlp.core import tree
from vlp.core.check import UserError
from vlp.core.types import Apply
from vlp.models.convnext import ConvNeXt
from vlp.models.resnet import ResNet
from vlp.ops import statistics

PX = 16
CONVNEXT = ConvNeXt(depths=(1, 2), widths=(4, 6), drop_path=0.5)
RESNET = ResNet(depths=(1, 3), width=4, heads=2, out=6)
TOWERS = {"convnext": CONVNEXT, "resnet": RESNET}
KEYS = jax.random.split(jax.random.key(0), 2)
RNG = np.random.default_rng(1)
IMAGE = jnp.asarray(RNG.integers(0, 256, (2, PX, PX, 3)), jnp.uint8)
PIXELS = np.asarray(IMAGE) / 127.5 - 1


def boxed(tower):
    init = lambda key: tower.init(key, IMAGE)
    return jax.eval_shape(init, jax.random.key(0))["params"]


@pytest.fixture(scope="module")
def params():
    def one(name, leaf):
        noise = RNG.normal(size=leaf.shape).astype(np.float32)
        if name.endswith("stat_share"):
            return np.ones(leaf.shape, np.float32)
        return 1 + 0.2 * np.abs(noise) if name.endswith(("/scale", "stat_var")) else 0.3 * noise

    return {name: tree.map_named(one, nn.unbox(boxed(tower))) for name, tower in TOWERS.items()}


def conv(x, p, stride=1, padding=0):
    x = np.pad(x, ((0, 0), (padding,) * 2, (padding,) * 2, (0, 0)))
    size, depthwise = p["kernel"].shape[0], p["kernel"].shape[2] == 1 and x.shape[-1] > 1
    sides = range(0, x.shape[1] - size + 1, stride)
    product = "bijc,ijc->bc" if depthwise else "bijc,ijcd->bd"
    kernel = p["kernel"][:, :, 0] if depthwise else p["kernel"]
    window = lambda i, j: np.einsum(product, x[:, i : i + size, j : j + size], kernel)
    out = np.stack([np.stack([window(i, j) for j in sides], 1) for i in sides], 1)
    return out + p.get("bias", np.float32(0))


def linear(x, p):
    return x @ p["kernel"] + p.get("bias", np.float32(0))


def layer_norm(x, p):
    x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)
    return x * p["scale"] + p["bias"]


def batch_norm(x, p):
    x = (x - p["stat_mean"]) / np.sqrt(p["stat_var"] + 1e-5)
    return x * p["scale"] + p["bias"]


def convnext(p):
    x = layer_norm(conv(PIXELS, p["stem"], 4), p["stem_norm"])
    for i, depth in enumerate(CONVNEXT.depths):
        if i:
            x = conv(layer_norm(x, p[f"down{i}_norm"]), p[f"down{i}"], 2)
        for n in range(depth):
            block = jax.tree.map(lambda a, n=n: a[n], p[f"stage{i}"]["blocks"])
            y = layer_norm(conv(x, block["conv"], padding=3), block["norm"])
            y = np.asarray(nn.gelu(linear(y, block["mlp"]["up"]), approximate=False))
            x = x + linear(y, block["mlp"]["down"]) * block["layer_scale"]
    tokens = x.reshape(2, -1, 6)
    return layer_norm(tokens, p["norm"]), layer_norm(tokens.mean(1), p["norm"])


def average(x, size):
    return x.reshape(2, x.shape[1] // size, size, x.shape[2] // size, size, -1).mean((2, 4))


def bottleneck(x, p, stride=1):
    relu = lambda y: np.maximum(y, 0)
    y = relu(batch_norm(linear(x, p["conv0"]), p["conv0_norm"]))
    y = average(relu(batch_norm(conv(y, p["conv1"], padding=1), p["conv1_norm"])), stride)
    y = batch_norm(linear(y, p["conv2"]), p["conv2_norm"])
    if "project" in p:
        x = batch_norm(linear(average(x, stride), p["project"]), p["project_norm"])
    return relu(x + y)


def resnet(p):
    x = PIXELS
    for i in range(3):
        x = conv(x, p[f"stem{i}"], 1 if i else 2, 1)
        x = np.maximum(batch_norm(x, p[f"stem{i}_norm"]), 0)
    x = average(x, 2)
    for i, depth in enumerate(RESNET.depths):
        x = bottleneck(x, p[f"stage{i}"]["first"], 2 if i else 1)
        for n in range(depth - 1):
            x = bottleneck(x, jax.tree.map(lambda a, n=n: a[n], p[f"stage{i}"]["blocks"]))
    tokens, p = x.reshape(2, -1, x.shape[-1]), p["pool"]
    x = np.concatenate([tokens.mean(1, keepdims=True), tokens], 1) + p["pos"]
    q = np.einsum("bd,dhk->bhk", x[:, 0], p["q"]["kernel"]) + p["q"]["bias"]
    kv = np.einsum("bnd,dchk->bnchk", x, p["kv"]["kernel"]) + p["kv"]["bias"]
    logits = np.einsum("bhk,bnhk->bhn", q, kv[:, :, 0]) / np.sqrt(q.shape[-1])
    weights = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    mixed = np.einsum("bhn,bnhk->bhk", weights, kv[:, :, 1])
    return tokens, np.einsum("bhk,hke->be", mixed, p["out"]["kernel"]) + p["out"]["bias"]


@pytest.mark.parametrize("name, plain", [("convnext", convnext), ("resnet", resnet)])
def test_each_tower_equals_plain_numpy(name, plain, params):
    out = jax.jit(lambda p: Apply(TOWERS[name], p)("__call__", IMAGE))(params[name])
    tokens, pooled = plain(params[name])
    np.testing.assert_allclose(out["tokens"], tokens, rtol=2e-4, atol=2e-4)
    np.testing.assert_allclose(out["pooled"], pooled, rtol=2e-4, atol=2e-4)


def trained(tower, params):
    def loss(params):
        out = Apply(tower, params)("__call__", IMAGE, keys=KEYS)
        return jnp.sin(out["tokens"]).sum() + jnp.cos(out["pooled"]).sum()

    return jax.jit(jax.value_and_grad(loss))(params)


@pytest.mark.parametrize("name", TOWERS)
def test_scan_and_remat_change_no_numbers(name, params, error):
    """Nor do they change what batch norm records, which is among the gradients."""
    want, want_grads = trained(TOWERS[name], params[name])
    for change in (dict(scan=False), dict(remat="full")):
        value, grads = trained(TOWERS[name].clone(**change), params[name])
        np.testing.assert_allclose(value, want, rtol=1e-5, err_msg=str(change))
        assert error(grads, want_grads) < 1e-4, change
        for leaf, g in tree.named(grads).items():
            assert np.abs(g).max() > 0, leaf


@pytest.mark.parametrize("name", TOWERS)
def test_half_precision_products_and_wide_norms(name, params):
    tower = TOWERS[name].clone(dtype="bfloat16", scan=False)
    run = lambda p: Apply(tower, p)("__call__", IMAGE, keys=KEYS)
    jaxpr, types = jax.make_jaxpr(run)(params[name]), {}

    def walk(jaxpr):
        for eqn in jaxpr.eqns:
            kinds = {v.aval.dtype.name for v in eqn.outvars[:1]}
            types.setdefault(eqn.primitive.name, set()).update(kinds)
            for inner in runs.inner_jaxprs(eqn):
                walk(inner)

    walk(jaxpr.jaxpr)
    assert types["conv_general_dilated"] == {"bfloat16"} and types["rsqrt"] == {"float32"}
    assert "bfloat16" in types["dot_general"]
    out = jax.eval_shape(run, params[name])
    assert out["tokens"].dtype == out["pooled"].dtype == jnp.bfloat16


@pytest.mark.parametrize("name", TOWERS)
def test_every_parameter_names_its_axes(name):
    is_box = lambda x: isinstance(x, nn.meta.AxisMetadata)
    for leaf in jax.tree.leaves(boxed(TOWERS[name]), is_leaf=is_box):
        assert is_box(leaf) and len(leaf.names) == leaf.value.ndim, leaf
        assert leaf.value.ndim == 0 or {*leaf.names} & {"embed", "mlp", "heads", "layers"}, leaf


def test_evaluation_reads_the_running_statistics_alone(params):
    run = jax.jit(lambda p, x: Apply(RESNET, p)("__call__", x)["pooled"])
    whole, first = run(params["resnet"], IMAGE), run(params["resnet"], IMAGE[:1])
    np.testing.assert_allclose(whole[:1], first, rtol=1e-4, atol=1e-5)  # no row sees another
    louder = lambda name, x: 4 * x if name.endswith("stat_var") else x
    other = run(tree.map_named(louder, params["resnet"]), IMAGE)
    assert np.abs(other - whole).max() > 1e-2
    train = jax.jit(lambda p: Apply(RESNET, p)("__call__", IMAGE, keys=KEYS)["pooled"])
    usual = train(params["resnet"])
    np.testing.assert_array_equal(train(tree.map_named(louder, params["resnet"])), usual)


def test_drop_path_rises_from_zero_and_drops_whole_branches():
    """With branches of a size of their own, the last block's is there for some examples alone; the first's for all."""
    image, keys = jnp.zeros((64, PX, PX, 3)), jax.random.split(jax.random.key(1), 64)
    tower = CONVNEXT.clone(depths=(2,), widths=(4,), drop_path=0.5)
    shapes = nn.unbox(jax.eval_shape(lambda: tower.init(jax.random.key(0), image)))["params"]
    fixed = lambda name, x: np.full(
        x.shape, np.float32("layer_scale" in name or "down/bias" in name)
    )
    params = tree.map_named(fixed, shapes)
    params["stem_norm"]["bias"] = np.float32([0, 0, 0, 1])
    params["stage0"]["blocks"]["mlp"]["down"]["bias"] = np.float32([[1, 0, 0, 0], [0, 1, 0, 0]])
    params["norm"]["scale"] = np.ones(4, np.float32)
    run = jax.jit(lambda p: Apply(tower, p)("__call__", image, keys=keys)["tokens"])
    tokens = np.asarray(run(params)[:, 0])
    kinds = {tuple(np.round(row, 3)) for row in tokens}
    first = np.float32([1, 0, 0, 1]), np.float32([1, 2, 0, 1])  # kept branches count 1 / (1 − rate)
    want = {tuple(np.round((v - v.mean()) / np.sqrt(v.var() + 1e-6), 3)) for v in first}
    assert kinds == want


@pytest.mark.parametrize("name", TOWERS)
@pytest.mark.parametrize(
    "px, kwargs, message",
    [
        (PX, {"keep_ratio": 0.5}, "keep_ratio: got 0.5, expected 1 with {}, which sees whole images; set it to 1, or"),
        (PX, {"kept": jnp.zeros((2, 4), int)}, "keep_ratio: got a choice of patches, expected 1 with {}"),
        (PX, {"layers": True}, "image_tower: {}: got layers=True, expected a ViT; set config.model.image_tower.name"),
        (20, {}, "config.data.image_px: got 20, expected a multiple of 8 with {}; set it to 16"),
    ],
)  # fmt: skip
def test_what_they_refuse(name, px, kwargs, message, params):
    image = jnp.zeros((2, px, px, 3), jnp.uint8)
    with pytest.raises(UserError) as caught:
        Apply(TOWERS[name], params[name])("__call__", image, **kwargs)
    assert message.format(type(TOWERS[name]).__name__) in str(caught.value)


@pytest.mark.parametrize(
    "tower, message",
    [
        (CONVNEXT.clone(depths=(1,)), "got depths (1,), widths (4, 6), expected a depth and a width per stage"),
        (CONVNEXT.clone(depths=(1, 0)), "got depths (1, 0)"),
        (RESNET.clone(depths=()), "config.model.image_tower.depths: got ()"),
        (RESNET.clone(heads=5), "config.model.image_tower.heads: got 5, expected a divisor of 32; set it to 1"),
    ],
)  # fmt: skip
def test_wrong_sizes(tower, message):
    with pytest.raises(UserError) as caught:
        boxed(tower)
    assert message in str(caught.value)


def test_running_statistics_are_named_and_no_others(params):
    slots = {n for n in tree.named(params["resnet"]) if statistics.is_slot(n)}
    norms = {n.rpartition("/")[0] for n in slots}
    assert norms and slots == {
        f"{n}/{s}" for n in norms for s in ("stat_mean", "stat_var", "stat_share")
    }
    assert all("norm" in n for n in norms)
    assert not any(map(statistics.is_slot, tree.named(params["convnext"])))
