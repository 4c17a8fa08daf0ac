"""Three steps of AdamW from the same weights, batch and hyper-parameters as OpenCLIP's: losses and gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from parity import originals
from vlp.core import tree
from vlp.core.types import Apply, Ctx, answer
from vlp.exchange import folders, open_clip_tensors, tensors
from vlp.objectives import OBJECTIVES
from vlp.optim.make import DEFAULT_RULES, Optim, Rule, make
from vlp.train import state as states
from vlp.train.step import train_step

torch = pytest.importorskip("torch")
pytest.importorskip("open_clip")
pytestmark = pytest.mark.parity

STEPS, LR = 3, 1e-3
HYPER = dict(b1=0.9, b2=0.98, eps=1e-6, weight_decay=0.2)
CASES = {
    "clip": (dict(originals.OPEN_CLIP["ViT-B-32"]), {}),
    "siglip": (
        dict(originals.OPEN_CLIP["ViT-B-32"], custom_text=True, init_logit_bias=-10, init_logit_scale=2.3),
        {},
    ),
    # OpenCLIP takes the mean of the two directions
    "coca": (dict(originals.OPEN_CLIP["coca_ViT-B-32"]), dict(contrastive_weight=0.5, caption_weight=2.0)),
}  # fmt: skip


def their_loss(name, model):
    losses = pytest.importorskip("open_clip.loss")
    if name == "clip":
        loss = losses.ClipLoss()
        return lambda x, y: loss(*model(x, y)[:2], model.logit_scale.exp())
    if name == "siglip":
        loss = losses.SigLipLoss()
        return lambda x, y: loss(*model(x, y)[:2], model.logit_scale.exp(), model.logit_bias)
    loss = losses.CoCaLoss(caption_loss_weight=2.0, clip_loss_weight=1.0)

    def coca(x, y):
        out = model(x, y)
        named = ("image_features", "text_features", "logits", "labels", "logit_scale")
        return sum(loss(*(out[k] for k in named)))

    return coca


def their_steps(name, model, image, text):
    """Losses, and the gradients of the first step by tensor, with open_clip_train's groups of weight decay."""
    named = list(model.named_parameters())
    excluded = lambda n, p: (
        p.ndim < 2 or "bn" in n or "ln" in n or "bias" in n or "logit_scale" in n
    )
    groups = [
        dict(params=[p for n, p in named if excluded(n, p)], weight_decay=0.0),
        dict(params=[p for n, p in named if not excluded(n, p)], weight_decay=HYPER["weight_decay"]),
    ]  # fmt: skip
    optimizer = torch.optim.AdamW(groups, lr=LR, betas=(0.9, 0.98), eps=1e-6)
    losses, grads, loss_of = [], {}, their_loss(name, model)
    for step in range(STEPS):
        optimizer.zero_grad()
        loss = loss_of(image, text)
        loss.backward()
        if not step:
            grads = {n: p.grad.numpy().copy() for n, p in named}
        optimizer.step()
        with torch.no_grad():
            model.logit_scale.clamp_(0, np.log(100))
        losses.append(loss.item())
    return losses, grads


@pytest.mark.parametrize("name", CASES)
def test_losses_and_gradients_are_open_clips(name, tmp_path):
    """Losses agree to 1e-5 relative, each leaf's gradient to 1e-4 of its norm."""
    cfg, weights = CASES[name]
    model = originals.open_clip_model(cfg).train()
    exchanged = folders.read(originals.open_clip_folder(cfg, model, tmp_path / "theirs"))
    image, text = originals.inputs(exchanged.data["image_px"], exchanged.data["text_len"], num=6)
    tower = exchanged.model["image_tower"]
    pixels = originals.torch_image(image, tower["mean"], tower["std"])
    losses, grads = their_steps(name, model, pixels, torch.from_numpy(text).long())

    params = jax.tree.map(
        jnp.asarray, traverse_util.unflatten_dict(dict(exchanged.leaves), sep="/")
    )
    objective = OBJECTIVES[name](**weights)
    batch = {"image": jnp.asarray(image), "text": jnp.asarray(text)}
    batch["index"] = jnp.zeros((len(image), 2), jnp.uint32)
    # one-dimensional tensors do not decay, the position tables and the poolers' queries do
    rules = (
        DEFAULT_RULES[0],
        Rule(".*(/bias|norm.*/scale|/cls|logit_bias)", decay=0.0),
        Rule(".*"),
    )
    updater = make(Optim(**HYPER, clip_norm=None, rules=rules), params)
    ours = exchanged.build()

    def loss_of(params):
        return answer(
            objective, Ctx(apply=Apply(ours, params), batch=batch, seed=jax.random.key(0))
        ).loss()

    found = tree.named(jax.jit(jax.grad(loss_of))(params))
    table = open_clip_tensors.rules(exchanged.model, folders._is_custom(cfg))
    for leaf, want in tensors.read(table, grads, "gradients").items():
        error = np.linalg.norm(found[leaf] - want) / max(np.linalg.norm(want), 1e-12)
        assert error < 1e-4 or np.linalg.norm(want) < 1e-7, f"{leaf}: {error}"

    state = states.create(params, updater, {}, (), 0)
    step = jax.jit(functools.partial(train_step, model=ours, objective=objective, updater=updater,
                                     lr_at=lambda _: jnp.float32(LR), seed=0))  # fmt: skip
    got = []
    for _ in range(STEPS):
        state, metrics = step(state, batch)
        got.append(float(metrics["loss"]))
    np.testing.assert_allclose(got, losses, rtol=1e-5)
    assert len(set(np.round(losses, 3))) == STEPS, "the steps change the loss"
    print(name, "losses", losses, "relative", np.abs(np.array(got) / losses - 1).max())
