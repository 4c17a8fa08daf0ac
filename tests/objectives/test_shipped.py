"""Five objectives with five kinds of model: gradients, micro-batches, masks, layout of parameters, golden losses.

Masks, dropout and drop path are on, so equality means that they too are the same everywhere. What holds for every
objective: test_every_objective.py; MODELS need not grow.
"""

import functools

import flax.linen as nn
import jax
import numpy as np
import pytest

from helpers.everything import pairs
from vlp.core import mesh as meshes
from vlp.core import tree
from vlp.core.mesh import MeshShape
from vlp.core.types import Apply, Ctx
from vlp.models.text import Text
from vlp.models.two_tower import Decoder, Poolers, TwoTower
from vlp.models.vit import ViT
from vlp.objectives import OBJECTIVES
from vlp.optim import make as optimisers
from vlp.train import state as states

TOWER = dict(width=16, depth=1, heads=2, mlp=32, dropout=0.1)
IMAGE, TEXT = ViT(patch=4, **TOWER | {"depth": 2}), Text(vocab=24, **TOWER)
CAPTIONER = TwoTower(IMAGE, TEXT, embed=8, decoder=Decoder(1), poolers=Poolers(queries=3))
MODELS = {
    "coca": CAPTIONER,
    "cap": CAPTIONER.clone(text_tower=TEXT.clone(pool="none"), embed=0),
    "clip": TwoTower(IMAGE.clone(pool="cls", drop_path=0.1), TEXT.clone(pool="eos"), embed=8),
    "mammut": TwoTower(
        IMAGE.clone(pool="mean"), TEXT.clone(pool="norm_mean", causal=False), embed=8, decoder=Decoder(),
    ),
    "siglip": TwoTower(
        IMAGE.clone(pool="map"), TEXT.clone(pool="last"), embed=16, scale=10.0, bias=-10.0,
        project_image=False, text_bias=True,
    ),
}  # fmt: skip
GOLDEN = {
    "coca": [11.92506, 12.45645, 11.17066],
    "cap": [3.35431, 3.37678, 3.39512],
    "clip": [3.55174, 2.41555, 2.29627],
    "mammut": [6.40252, 6.00697, 6.00944],
    "siglip": [11.71268, 8.62314, 5.46414],
}


@pytest.fixture(scope="module")
def cases(training, random_params):
    return {
        name: training(
            model=model,
            objective=OBJECTIVES[name](keep_ratio=0.5),
            params=random_params(model, 16, 8),
        )
        for name, model in MODELS.items()
    }


@pytest.fixture(scope="module")
def reference(cases, make_batch):
    """Name → loss and gradients of the first batch on one device, computed when asked for."""
    return functools.cache(lambda name: cases[name].value(make_batch(), grads=True))


@pytest.mark.parametrize("name", MODELS)
def test_gradients_reach_every_parameter(name, reference):
    loss, grads = reference(name)
    assert np.isfinite(loss)
    for leaf, g in tree.named(grads).items():
        assert np.isfinite(g).all() and np.abs(g).max() > 0, leaf


@pytest.mark.parametrize("name", MODELS)
def test_golden_losses(name, cases, make_batch):
    """Right to update when the maths, the model or the random draws changed on purpose; say so in the commit."""
    case, losses = cases[name], []
    for step in range(3):
        loss, grads = case.value(make_batch(start=8 * step), grads=True)
        case = case.moved(grads, lr=0.02)
        losses.append(float(loss))
    np.testing.assert_allclose(losses, GOLDEN[name], rtol=1e-4, err_msg=f"now {losses}")


@pytest.mark.parametrize("name", MODELS)
def test_four_micro_batches_change_nothing(name, cases, reference, make_batch, error):
    loss, grads = cases[name].value(make_batch(), num_micro=4, grads=True)
    np.testing.assert_allclose(loss, reference(name)[0], rtol=1e-5)
    assert error(grads, reference(name)[1]) < 1e-5


@pytest.mark.parametrize("name", MODELS)
def test_all_captions_of_an_image(name, cases, make_batch):
    """With two captions: the mean of the contrastive losses, all tokens alike for captioning; in micro-batches too."""
    case, pairs = cases[name], make_batch()
    texts = [pairs["text"], make_batch(start=40)["text"]]

    def totals(params, batch, num_micro):
        terms = case.objective(Ctx(Apply(case.model, params), batch, num_micro=num_micro)).terms
        return {k: (t.total, t.count) for k, t in terms.items()}

    run = jax.jit(totals, static_argnums=2)
    first, second = (run(case.params, pairs | {"text": text}, 1) for text in texts)
    both = run(case.params, pairs | {"text": np.stack(texts, axis=1)}, 2)
    assert first.keys() == both.keys()
    for term, (total, count) in both.items():
        divide = 1 if term == "caption" else 2
        for got, k in ((total, 0), (count, 1)):
            want = (float(first[term][k]) + float(second[term][k])) / divide
            np.testing.assert_allclose(got, want, rtol=1e-5)


@pytest.mark.parametrize("shape", [(2, 1, 1), (4, 1, 1)], ids=str)
def test_number_of_devices_changes_nothing(shape, cases, reference, make_batch):
    loss = cases["clip"].value(make_batch(), shape)
    np.testing.assert_allclose(loss, reference("clip")[0], rtol=1e-5)


@functools.cache
def mask_program(num_micro, pass_id):
    """params, batch → which patches are kept; everything else of the tower is dead code here."""
    view = lambda c: c.student("image", c.batch["image"], keep_ratio=0.5, pass_id=pass_id)["kept"]

    def kept(params, batch):
        seed = jax.random.key(0)
        return Ctx(Apply(MODELS["clip"], params), batch, seed, num_micro=num_micro).map(view)

    return jax.jit(kept)


def masks(params, batch, shape=(1, 1, 1), num_micro=1, pass_id=0):
    mesh = meshes.make(MeshShape(*shape), jax.devices()[: int(np.prod(shape))])
    with jax.set_mesh(mesh):
        return np.asarray(mask_program(num_micro, pass_id)(params, meshes.to_global(batch, mesh)))


def test_masks_are_a_function_of_the_sample_alone(cases, make_batch):
    draws = functools.partial(masks, cases["clip"].params)
    batch = make_batch()
    want = draws(batch)
    assert want.shape == (8, 8) and len({tuple(row) for row in want}) == 8
    for shape, num_micro in [((2, 1, 1), 1), ((1, 4, 1), 2), ((2, 2, 2), 1), ((1, 1, 1), 4)]:
        got = draws(batch, shape, num_micro)
        np.testing.assert_array_equal(got, want, err_msg=f"{shape}, {num_micro} micro-batches")
    order = np.random.default_rng(0).permutation(8)
    moved = draws({k: x[order] for k, x in batch.items()})
    np.testing.assert_array_equal(moved, want[order])
    later = draws(batch | {"index": batch["index"] + np.uint32([0, 8])})
    far = draws(batch | {"index": batch["index"] + np.uint32([1, 0])})  # 2³² samples later
    again = draws(batch, pass_id=1)
    for other in (later, far, again):
        assert (other != want).any(axis=1).sum() >= 7


def test_weights_and_counts(cases, make_batch):
    """The terms' weights are the config's; the caption's count is the real tokens of the global batch."""
    case, batch = cases["coca"], make_batch()

    def evaluate(objective, params, batch):
        return objective(Ctx(Apply(case.model, params), batch))

    out = jax.jit(evaluate, static_argnums=0)(case.objective, case.params, batch)
    assert {k: t.weight for k, t in out.terms.items()} == {"contrastive": 1.0, "caption": 2.0}
    assert float(out.terms["caption"].count) == (batch["text"][:, 1:] != 0).sum()
    assert float(out.terms["contrastive"].count) == 8
    program = lambda keep_ratio: str(
        jax.make_jaxpr(functools.partial(evaluate, type(case.objective)(keep_ratio=keep_ratio)))(
            case.params, batch
        )
    )
    assert program(0.5) == program(1.0)  # evaluation sees whole images


@pytest.mark.parametrize("name", MODELS)
def test_parameters_are_made_in_their_shards(name):
    """Abstractly: an eighth of every matrix on each device; small vectors and projections' biases are whole."""
    mesh = meshes.make(MeshShape(1, 8, 1))
    boxed = jax.tree.leaves(
        states.abstract_params(MODELS[name], OBJECTIVES[name](), pairs(16, 8, 2)),
        is_leaf=lambda x: isinstance(x, nn.meta.AxisMetadata),
    )
    shares = {True: 0, False: 0}  # of matrices, of the rest
    for box in boxed:
        shape, names = nn.unbox(box).shape, getattr(box, "names", ())
        share = int(np.prod(meshes.shardings(box, mesh).shard_shape(shape)))
        matrix = "embed" in names and sum(n != "layers" for n in names) > 1
        assert share * (8 if matrix else 1) == np.prod(shape), (names, shape, share)
        shares[matrix] += share
    assert shares[False] < 0.2 * 8 * shares[True], shares


def test_the_moving_average_lies_as_the_parameters_do():
    """In float32 and in the same shards, as do AdamW's moments."""
    model = MODELS["clip"]
    mesh = meshes.make(MeshShape(2, 2, 2))
    boxed = states.abstract_params(model, OBJECTIVES["clip"](), pairs(16, 8))
    params = nn.unbox(boxed)
    updater = optimisers.make(optimisers.Optim(), params)
    create = functools.partial(
        states.create, updater=updater, teachers={"ema": params}, method_state=(), step=0
    )
    abstract = jax.eval_shape(create, params)
    layout = states.shardings(boxed, updater, abstract, mesh)
    assert layout.teachers["ema"] == layout.params == layout.opt[1].mu
    assert not all(x.is_fully_replicated for x in jax.tree.leaves(layout.params))
    assert {x.dtype for x in jax.tree.leaves(abstract.teachers)} == {np.dtype("float32")}


def mesh_of(*shape):
    return meshes.make(MeshShape(*shape), jax.devices()[: int(np.prod(shape))])


def test_initial_values_depend_on_the_seed_alone():
    model = TwoTower(
        ViT(patch=8, width=8, depth=1, heads=2, pool="mean"),
        Text(vocab=8, width=8, depth=1, heads=2, pool="eos"),
        embed=8,
    )
    one, many = (
        states.init_params(
            model,
            OBJECTIVES["clip"](),
            pairs(16, 4, 8),
            0,
            meshes.make(MeshShape(*s), jax.devices()[: int(np.prod(s))]),
        )
        for s in ((1, 1, 1), (2, 2, 2))
    )
    for name, leaf in tree.named(many).items():
        np.testing.assert_allclose(leaf, tree.named(one)[name], rtol=1e-5, atol=1e-7, err_msg=name)
    kernel = many["image_tower"]["patch"]["kernel"]
    assert {s.data.shape for s in kernel.addressable_shards} == {(192, 4)}
    assert {s.data.shape for s in many["text_tower"]["embedding"].addressable_shards} == {(4, 4)}
