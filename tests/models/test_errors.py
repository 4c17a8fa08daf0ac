"""What a config can get wrong about a model is one line, before anything compiles."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

from helpers.everything import abstract
from vlp.core.check import UserError
from vlp.core.types import Apply
from vlp.models import heads
from vlp.models.text import Text
from vlp.models.two_tower import Decoder, Poolers, TwoTower
from vlp.models.vit import ViT

IMAGE, TEXT = ViT(4, 16, 1, 2), Text(16, 16, 1, 2)
CAPTIONER = TwoTower(IMAGE, TEXT, embed=8, decoder=Decoder(1), poolers=Poolers(queries=2))
DUAL = TwoTower(
    IMAGE.clone(pool="cls"),
    TEXT,
    embed=8,
    heads=heads.build({"predict": {"name": "mlp", "width_out": 4}}),
)
image = lambda **kwargs: CAPTIONER.clone(image_tower=IMAGE.clone(**kwargs))
text = lambda **kwargs: CAPTIONER.clone(text_tower=TEXT.clone(**kwargs))


@pytest.mark.parametrize(
    "model, message",
    [
        (
            image(pool="max"),
            "model.image.pool: got 'max', expected one of ['cls', 'map', 'mean', 'mean_patches', 'none']; did you mean",
        ),
        (
            image(pos="learnt"),
            "got 'learnt', expected one of ['learned', 'sincos', 'sincos_big_vision']; did you mean 'learned'?",
        ),
        (
            image(patch=5),
            "image_px: got 8, expected a multiple of model.image.patch = 5; set it to 5, or",
        ),
        (
            image(activation="gelo"),
            "activation: got 'gelo', expected one of ['gelu', 'gelu_exact', 'quick_gelu', 'relu']; did",
        ),
        (
            image(remat="dot"),
            "remat: got 'dot', expected one of ['dots', 'dots_no_batch', 'full', 'none']; did you",
        ),
        (
            image(width=18, pos="sincos"),
            "width: got 18, expected a multiple of 4 for sincos positions",
        ),
        (image(heads=3), "width: got 16, expected a multiple of heads = 3"),
        (
            text(pool="eot"),
            "got 'eot', expected one of ['cls', 'eos', 'first', 'last', 'map', 'mean', 'none', 'norm_mean'",
        ),
        (
            text(pool="first"),
            "got 'first' in a causal tower, where the first token sees nothing else, expected 'eos'",
        ),
        (
            DUAL.clone(project_image=False),
            "config.model.embed: got 8, expected the tower's width 16; make them equal or set",
        ),
        (
            text(pool="none"),
            "text_tower.pool: got 'none', expected a pooled text to embed",
        ),
        (
            text(causal=False),
            "text_tower.causal: got False, expected a causal text tower under the decoder",
        ),
        (text(activation="relo"), "activation: got 'relo'"),
        (DUAL.clone(image_tower=IMAGE), "image_tower.pool: got 'none', expected a pooled image"),
        (
            DUAL.clone(text_tower=TEXT.clone(pool="none")),
            "text_tower.pool: got 'none', expected a pooled text",
        ),
    ],
)
def test_mistakes_in_a_models_section_are_one_line(model, message):
    with pytest.raises(UserError) as caught:
        abstract(model, 8, 4)
    assert message in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "model, method, args, kwargs, message",
    [
        (
            DUAL,
            "head",
            ("predct", (1, 8)),
            {},
            "head: got 'predct', expected one of ['predict']; did you mean 'predict'? else declare heads = ",
        ),
        (
            CAPTIONER,
            "head",
            ("predict", (1, 8)),
            {},
            "head: got 'predict', expected one of []; declare",
        ),
        (
            DUAL,
            "image",
            ((1, 8, 8, 3),),
            {"keep_ratio": 0.0},
            "keep_ratio: got 0.0, expected a fraction in (0, 1]",
        ),
        (
            DUAL,
            "image",
            ((1, 8, 8, 3),),
            {"keep_ratio": 1.5},
            "keep_ratio: got 1.5, expected a fraction in (0, 1]",
        ),
        (
            DUAL,
            "image",
            ((1, 10, 10, 3),),
            {},
            "image_px: got 10, expected a multiple of model.image.patch = 4",
        ),
    ],
)
def test_calls_that_a_model_cannot_answer_are_one_line(model, method, args, kwargs, message):
    params = nn.unbox(abstract(model, 8, 4))
    args = [jnp.zeros(a) if isinstance(a, tuple) else a for a in args]
    with pytest.raises(UserError) as caught:
        jax.eval_shape(lambda p: Apply(model, p)(method, *args, **kwargs), params)
    assert message in str(caught.value) and "\n" not in str(caught.value)
