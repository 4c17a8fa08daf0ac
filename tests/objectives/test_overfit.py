"""The whole of CoCa on sixteen pairs: it learns them by heart."""

import jax
import jax.numpy as jnp
import numpy as np

from vlp.core.types import Apply
from vlp.data.toy_shapes import Shapes
from vlp.losses import contrastive
from vlp.models.text import Text
from vlp.models.two_tower import Decoder, Poolers, TwoTower
from vlp.models.vit import ViT
from vlp.objectives import Coca
from vlp.ops import decoding
from vlp.optim.make import Optim

LENGTH, STEPS = 24, 200
TOWER = dict(width=32, depth=1, heads=2, mlp=64)


def test_sixteen_pairs_are_retrieved_and_captioned_exactly(training, random_params):
    source = Shapes(16)
    tokenizer = source.tokenizer()
    captions = [source[i]["captions"][0]["text"] for i in range(16)]
    batch = {
        "image": np.stack([source[i]["image"][::2, ::2] for i in range(16)]),
        "text": np.stack([tokenizer.encode(c, LENGTH) for c in captions]),
        "index": np.stack([np.zeros(16), np.arange(16)], axis=1).astype(np.uint32),
    }
    assert len(set(captions)) == 16 and (batch["text"][:, -1] == 0).all()  # none is cut
    model = TwoTower(
        ViT(patch=8, **TOWER),
        Text(vocab=tokenizer.vocab_size, **TOWER),
        embed=16,
        decoder=Decoder(1),
        poolers=Poolers(queries=4),
    )
    case = training(
        model=model,
        objective=Coca(),
        params=random_params(model, 32, LENGTH),
        optim=Optim(weight_decay=0.0),
        lr=5e-3,
        px=32,
        length=LENGTH,
    )
    mesh, state, step = case.start()
    with jax.set_mesh(mesh):
        for _ in range(STEPS):
            state, metrics = step(state, batch)
    assert float(metrics["contrastive/retrieval@1"]) == 1
    assert float(metrics["caption"]) < 0.05, metrics

    apply = Apply(model, state.params)
    encode = lambda apply, image, text: (
        apply("image", image)["embed"],
        apply("text", text)["embed"],
    )
    zi, zt = apply.jit(encode)(batch["image"], batch["text"])
    loss = contrastive.softmax(zi, zt, jnp.float32(10))
    assert float(loss["hit_i2t"].mean()) == float(loss["hit_t2i"].mean()) == 1
    options = {"length": LENGTH, "vocab_size": tokenizer.vocab_size}
    written = apply.jit(decoding.captions, **options)(batch["image"])
    assert [tokenizer.decode(row) for row in np.asarray(written)] == captions
    np.testing.assert_array_equal(written, batch["text"])
