"""big_vision's two towers (SigLIP), written here with flax's own layers as its released code has them."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from vlp.exchange import compare, folders

WIDTH, HEADS, MLP, DEPTH, PATCH, LENGTH, VOCAB = 32, 4, 64, 2, 4, 7, 50


class Mlp(nn.Module):
    @nn.compact
    def __call__(self, x):
        y = nn.gelu(nn.Dense(MLP, name="Dense_0")(x))
        return nn.Dense(x.shape[-1], name="Dense_1")(y)


class Encoder1D(nn.Module):
    @nn.compact
    def __call__(self, x):
        y = nn.LayerNorm(name="LayerNorm_0")(x)
        attention = nn.MultiHeadDotProductAttention(HEADS, name="MultiHeadDotProductAttention_0")
        x = x + attention(y, y)
        return x + Mlp(name="MlpBlock_0")(nn.LayerNorm(name="LayerNorm_1")(x))


class Encoder(nn.Module):
    @nn.compact
    def __call__(self, x):
        for i in range(DEPTH):
            x = Encoder1D(name=f"encoderblock_{i}")(x)
        return nn.LayerNorm(name="encoder_norm")(x)


class MapHead(nn.Module):
    @nn.compact
    def __call__(self, x):
        probe = self.param("probe", nn.initializers.xavier_uniform(), (1, 1, x.shape[-1]))
        probe = jnp.tile(probe, [x.shape[0], 1, 1])
        attention = nn.MultiHeadDotProductAttention(HEADS, name="MultiHeadDotProductAttention_0")
        x = attention(probe, x)
        return (x + Mlp(name="MlpBlock_0")(nn.LayerNorm(name="LayerNorm_0")(x)))[:, 0]


class Image(nn.Module):
    @nn.compact
    def __call__(self, image):
        x = nn.Conv(WIDTH, (PATCH, PATCH), (PATCH, PATCH), "VALID", name="embedding")(image)
        x = x.reshape(x.shape[0], -1, WIDTH)
        x = x + self.param("pos_embedding", nn.initializers.normal(), (1, x.shape[1], WIDTH))
        return MapHead(name="MAPHead_0")(Encoder(name="Transformer")(x))


class Text(nn.Module):
    @nn.compact
    def __call__(self, text):
        x = nn.Embed(VOCAB, WIDTH, name="Embed_0")(text)
        x = x + self.param("pos_embedding", nn.initializers.normal(), (1, LENGTH, WIDTH))
        return nn.Dense(WIDTH, name="head")(Encoder(name="Encoder_0")(x)[:, -1])


class TwoTowers(nn.Module):
    @nn.compact
    def __call__(self, image, text):
        zi, zt = Image(name="img")(image), Text(name="txt")(text)
        t = self.param("t", nn.initializers.constant(np.log(10.0)), (1,))
        b = self.param("b", nn.initializers.constant(-10.0), (1,))
        unit = lambda z: z / (jnp.linalg.norm(z, axis=1, keepdims=True) + 1e-8)
        return unit(zi), unit(zt), jnp.exp(t), b


@pytest.mark.parametrize("scanned", [False, True])
def test_its_files_give_its_embeddings(scanned, tmp_path):
    """Trained-like: norms and biases moved. To 1e-6; the export is the same file."""
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (3, 8, 8, 3)).astype(np.uint8)
    text = rng.integers(3, VOCAB, (3, LENGTH)).astype(np.int32)
    text[0, 3:] = 1
    model = TwoTowers()
    params = model.init(jax.random.key(0), image / 127.5 - 1, text)["params"]
    moved = lambda x: np.asarray(x + 0.1 * rng.normal(size=x.shape), np.float32)
    params = jax.tree.map(moved, params)
    want = jax.jit(model.apply)({"params": params}, image / 127.5 - 1, text)
    flat = traverse_util.flatten_dict(params, sep="/")
    arrays = {f"params/{n}": x for n, x in flat.items()}
    if scanned:
        for name in [n for n in arrays if "encoderblock_0" in n]:
            layers = [arrays.pop(name.replace("block_0/", f"block_{i}/")) for i in range(DEPTH)]
            arrays[name.replace("encoderblock_0", "encoderblock")] = np.stack(layers)
    np.savez(tmp_path / "model.npz", **arrays)
    exchanged = folders.read(tmp_path / "model.npz")
    found = compare.outputs(exchanged, image, text)
    assert np.abs(found["image"] - want[0]).max() <= 1e-6
    assert np.abs(found["text"] - want[1]).max() <= 1e-6
    np.testing.assert_array_equal(np.exp(exchanged.leaves["temperature/logit_scale"]), want[2][0])
    folders.write(exchanged, tmp_path / "again.npz", "big_vision")
    with np.load(tmp_path / "again.npz") as again:
        assert set(again) == {f"params/{n}" for n in flat}
        for name, x in flat.items():
            np.testing.assert_array_equal(again[f"params/{name}"], x)
