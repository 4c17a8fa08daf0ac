"""What a method may ask of the trainer, each by a toy method of the present literature's shape.

Each trains some steps of `train_step` in micro-batches; its loss is that of one micro-batch, and of mesh 2·2·2.
"""

import dataclasses
import functools
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vlp.core import mesh as meshes
from vlp.core.check import UserError
from vlp.core.types import Apply, Ctx, Out, Term, answer
from vlp.losses import contrastive
from vlp.models import heads
from vlp.models.text import Text
from vlp.models.two_tower import Decoder, Poolers, TwoTower
from vlp.models.vit import ViT
from vlp.optim import make as optimisers
from vlp.train import state as states
from vlp.train.step import train_step

TOWER = dict(width=8, depth=1, heads=2, mlp=16, dropout=0.1)
STUDENT = TwoTower(
    ViT(patch=4, pool="mean", **TOWER),
    Text(vocab=24, pool="eos", **TOWER),
    embed=8,
    heads=heads.build({"match": {"name": "mlp", "width_out": 1}}),
)
HEADS = (("match", 8),)
DECAY = 0.4
EVERYTHING = (optimisers.Rule(".*"),)


@dataclasses.dataclass(frozen=True)
class Views:
    """Two views, each with a mask of its own; a moving-average teacher; a queue of its past embeddings."""

    reads: ClassVar[frozenset[str]] = frozenset({"image"})
    queue: int = 12

    def init_method_state(self, key: jax.Array, model: Any) -> Any:
        return {
            "queue": jax.random.normal(key, (self.queue, 8)),
            "kept": jnp.zeros((8, 2, 8), jnp.int32),
        }

    def __call__(self, ctx: Ctx) -> Out:
        zs_B2E, zt_B2E, kept_B2M = ctx.map(self.encode)
        queue_QE = ctx.method_state["queue"]
        positive_B = (zs_B2E[:, 0] * zt_B2E[:, 1]).sum(-1)
        logits_BQ = jnp.concatenate([positive_B[:, None], zs_B2E[:, 0] @ queue_QE.T], axis=1)
        nll_B = jax.nn.logsumexp(logits_BQ, axis=1) - logits_BQ[:, 0]
        queue_QE = jnp.concatenate([zt_B2E[:, 1], queue_QE])[: self.queue]
        method_state = {"queue": queue_QE, "kept": kept_B2M}
        return Out({"views": Term(nll_B.sum(), nll_B.size)}, method_state=method_state)

    def encode(self, ctx: Ctx) -> Any:
        views = [ctx.batch["image"][:, t] for t in range(2)]
        ours = [ctx.student("image", x, keep_ratio=0.5, pass_id=t) for t, x in enumerate(views)]
        theirs = [ctx.teacher("ema").student("image", x)["embed"] for x in views]
        stack = lambda name: jnp.stack([out[name] for out in ours], axis=1)
        return stack("embed"), jnp.stack(theirs, axis=1), stack("kept")


@dataclasses.dataclass(frozen=True)
class Captions:
    """Several captions per image, a weight per example, and targets that say which examples are alike."""

    reads: ClassVar[frozenset[str]] = frozenset({"image", "text", "weight", "group"})

    def __call__(self, ctx: Ctx) -> Out:
        zi_BE, zt_BKE = ctx.map(self.encode)
        scale, _ = ctx.student("scale_bias")
        weight_B, group_B = ctx.batch["weight"], ctx.batch["group"]
        alike_BB = (group_B[:, None] == group_B[None, :]).astype(jnp.float32)
        terms, num = {}, zt_BKE.shape[1]
        for k in range(num):
            loss = contrastive.softmax(zi_BE, zt_BKE[:, k], scale, targets=alike_BB)
            nll_B = weight_B * (loss["i2t"] + loss["t2i"])
            terms[f"caption{k}"] = Term(nll_B.sum(), weight_B.sum(), 1 / num)
        return Out(terms)

    def encode(self, ctx: Ctx) -> Any:
        zt_BKE = ctx.captions(lambda c: c.student("text", c.batch["text"])["embed"])
        return ctx.student("image", ctx.batch["image"])["embed"], zt_BKE


@dataclasses.dataclass(frozen=True)
class HardNegatives:
    """Maps twice: embeds the batch, then matches each image with its text and with the nearest other one."""

    reads: ClassVar[frozenset[str]] = frozenset({"image", "text"})

    def __call__(self, ctx: Ctx) -> Out:
        zi_BE, zt_BE = ctx.map(self.encode)
        scale, _ = ctx.student("scale_bias")
        loss = contrastive.softmax(zi_BE, zt_BE, scale)
        own_BB = jnp.eye(zi_BE.shape[0])
        hard_B = jax.lax.stop_gradient(zi_BE @ zt_BE.T - 9 * own_BB).argmax(axis=1)
        right_B, wrong_B = ctx.map(self.match, zi_BE, {"text": ctx.batch["text"][hard_B]})
        nll_B = jax.nn.softplus(-right_B) + jax.nn.softplus(wrong_B)
        return Out(
            {
                "contrastive": Term(loss["i2t"].sum(), loss["i2t"].size),
                "match": Term(nll_B.sum(), nll_B.size, weight=0.5),
            }
        )

    def encode(self, ctx: Ctx) -> Any:
        image = ctx.student("image", ctx.batch["image"], keep_ratio=0.5)
        return image["embed"], ctx.student("text", ctx.batch["text"])["embed"]

    def match(self, ctx: Ctx, zi_BE: jax.Array, negative: dict[str, jax.Array]) -> Any:
        def score(text: jax.Array, pass_id: int) -> jax.Array:
            zt_BE = ctx.student("text", text, pass_id=pass_id)["embed"]
            return ctx.head("match", zi_BE * zt_BE, pass_id=pass_id)[:, 0]

        return score(ctx.batch["text"], 1), score(negative["text"], 2)


@dataclasses.dataclass(frozen=True)
class Distil:
    """A frozen teacher of another architecture, and a second stream of texts alone, of another size."""

    reads: ClassVar[frozenset[str]] = frozenset({"image", "text", "words/text"})

    def __call__(self, ctx: Ctx) -> Out:
        far_B = ctx.map(self.image)
        words_b = ctx.stream("words").map(self.text)
        assert far_B.shape == (8,) and words_b.shape == (4,)
        return Out(
            {"image": Term(far_B.sum(), far_B.size), "words": Term(words_b.sum(), words_b.size)}
        )

    def image(self, ctx: Ctx) -> jax.Array:
        both = [c.student("image", ctx.batch["image"])["embed"] for c in (ctx, ctx.teacher("big"))]
        return jnp.square(both[0] - both[1]).sum(axis=1)

    def text(self, ctx: Ctx) -> jax.Array:
        assert set(ctx.batch) == {"text", "index"}
        both = [c.student("text", ctx.batch["text"])["embed"] for c in (ctx, ctx.teacher("big"))]
        return jnp.square(both[0] - both[1]).sum(axis=1)


@pytest.fixture(scope="module")
def batches(make_batch):
    """Name of a toy → batch: what the loader would give it."""
    rng = np.random.default_rng(0)
    pairs, other = make_batch(), make_batch(start=40)
    words = {f"words/{k}": v for k, v in make_batch(4, start=80).items() if k != "image"}
    return {
        "Views": pairs | {"image": np.stack([pairs["image"], other["image"]], axis=1)},
        "Captions": pairs
        | {
            "text": np.stack([pairs["text"], other["text"]], axis=1),
            "weight": rng.uniform(0.5, 2, 8).astype(np.float32),
            "group": np.int32([0, 1, 1, 3, 4, 3, 6, 7]),
        },
        "HardNegatives": pairs,
        "Distil": pairs | words,
    }


@pytest.fixture(scope="module")
def toys(training, random_params):
    params = random_params(STUDENT, 16, 8, heads=HEADS)
    big = STUDENT.clone(image_tower=STUDENT.image_tower.clone(width=16), heads=None)
    tower = TOWER | {"dropout": 0.0}
    captioner = TwoTower(
        ViT(patch=4, **tower),
        Text(vocab=24, **tower),
        embed=8,
        decoder=Decoder(1),
        poolers=Poolers(queries=0, cascade=False),
    )
    student = functools.partial(training, model=STUDENT, params=params, lr=1e-2, heads=HEADS)
    return {
        "Views": student(objective=Views(), teachers={"ema": (STUDENT, DECAY, params)}),
        "Captions": student(objective=Captions()),
        "HardNegatives": student(objective=HardNegatives()),
        "Distil": training(
            model=captioner,
            objective=Distil(),
            params=random_params(captioner, 16, 8),
            teachers={"big": (big, None, random_params(big, 16, 8, seed=5))},
            lr=1e-2,
        ),
    }


TOYS = ("Views", "Captions", "HardNegatives", "Distil")


@pytest.fixture(scope="module")
def trained(toys, batches):
    """Name → states and metrics of six steps on one batch, in two micro-batches."""
    return functools.cache(lambda name: toys[name].steps([batches[name]] * 6, num_micro=2))


@pytest.mark.parametrize("name", TOYS)
def test_it_trains_in_micro_batches(name, trained):
    run, metrics = trained(name)
    losses = [float(m["loss"]) for m in metrics]
    assert np.isfinite(losses).all() and metrics[0]["grad_norm"] > 0
    assert int(run[-1].step) == 6
    if name != "Views":  # whose queue and teacher move
        assert losses[-1] < losses[0], losses


@pytest.mark.parametrize("name", TOYS)
def test_one_micro_batch_and_eight_devices_give_the_same_loss(name, toys, batches, trained):
    want = trained(name)[1][0]["loss"]
    np.testing.assert_allclose(toys[name].value(batches[name]), want, rtol=1e-5)
    if name != "Views":  # see below
        np.testing.assert_allclose(toys[name].value(batches[name], (2, 2, 2)), want, rtol=1e-5)


def test_training_on_a_cube_is_training_on_one_device(toys, batches, trained, error):
    """Whole steps on mesh 2·2·2, with teacher, queue and optimiser laid out as in training."""
    run, metrics = trained("Views")
    run_8, metrics_8 = toys["Views"].steps([batches["Views"]] * 2, (2, 2, 2), num_micro=2)
    for ours, theirs in zip(metrics_8, metrics):
        assert ours.keys() == theirs.keys()
        for key in ours:
            np.testing.assert_allclose(ours[key], theirs[key], rtol=1e-4, atol=1e-5, err_msg=key)
    assert error(run_8[1].opt[1].mu, run[1].opt[1].mu) < 1e-5
    assert error(run_8[1].method_state["queue"], run[1].method_state["queue"]) < 1e-5
    np.testing.assert_array_equal(run_8[2].method_state["kept"], run[2].method_state["kept"])


def test_views_draw_their_own_masks_which_are_kept_in_extra(trained):
    run, _ = trained("Views")
    kept_B2M = run[1].method_state["kept"]
    assert (kept_B2M[:, 0] != kept_B2M[:, 1]).any(axis=1).sum() >= 7
    np.testing.assert_array_equal(run[2].method_state["kept"], kept_B2M)  # the same samples again


def test_the_queue_is_carried_and_changed_by_each_step(trained, batches):
    run, _ = trained("Views")
    start, first, second = (run[i].method_state["queue"] for i in range(3))
    embed = jax.jit(lambda p, x: Apply(STUDENT, p)("image", x)["embed"])
    for before, after, old in ((run[0], first, start), (run[1], second, first)):
        want = embed(before.teachers["ema"], batches["Views"]["image"][:, 1])
        np.testing.assert_allclose(after[:8], want, atol=1e-5)
        np.testing.assert_array_equal(after[8:], old[:4])


def test_the_moving_average_has_its_closed_form(trained):
    run, _ = trained("Views")
    decays = [DECAY] * 6
    weights = [np.prod(decays)] + [(1 - d) * np.prod(decays[k + 1 :]) for k, d in enumerate(decays)]

    def check(average, *params):
        want = sum(w * np.float64(p) for w, p in zip(weights, params, strict=True))
        np.testing.assert_allclose(average, want, rtol=1e-5, atol=1e-6)

    jax.tree.map(check, run[6].teachers["ema"], *(s.params for s in run))


def test_weights_are_per_example(toys, batches):
    batch, case = batches["Captions"], toys["Captions"]
    loss = lambda *w: float(case.value(batch | {"weight": np.float32(w)}))
    first, last = loss(1, 0, 0, 0, 0, 0, 0, 0), loss(0, 0, 0, 0, 0, 0, 0, 1)
    assert abs(first - last) > 1e-3
    np.testing.assert_allclose(loss(3, 0, 0, 0, 0, 0, 0, 1), (3 * first + last) / 4, rtol=1e-5)


def test_targets_say_who_belongs_together(toys, batches):
    batch, case = batches["Captions"], toys["Captions"]
    loss = lambda *g: float(case.value(batch | {"group": np.int32(g)}))
    want = loss(0, 1, 1, 3, 4, 3, 6, 7)
    np.testing.assert_allclose(loss(9, 8, 8, 2, 0, 2, 1, 3), want, rtol=1e-6)  # names do not matter
    assert abs(loss(0, 1, 2, 3, 4, 5, 6, 7) - want) > 1e-3


def test_a_teacher_of_another_architecture_stays_as_it_is(trained, toys, batches):
    run, _ = trained("Distil")
    teacher = run[0].teachers["big"]
    assert teacher["image_tower"]["patch"]["kernel"].shape == (48, 16)  # the student's: 8
    jax.tree.map(np.testing.assert_array_equal, run[6].teachers["big"], teacher)


@pytest.mark.parametrize("name, teacher", [("Distil", "big"), ("Views", "ema")])
def test_no_gradient_flows_into_a_teacher(name, teacher, toys, batches):
    case = toys[name]
    _, batch = case.on((1, 1, 1), batches[name])
    frozen = {teacher: jax.tree.map(jnp.asarray, case.teachers[teacher][2])}
    loss = functools.partial(case.loss, num_micro=1)
    grads = jax.jit(jax.grad(loss, 3))(case.params, batch, case.method_state(), frozen)
    assert all((g == 0).all() for g in jax.tree.leaves(grads))


def shapes_of(case, batch, num_micro=1):
    frozen = {name: t[2] for name, t in case.teachers.items()}
    loss = functools.partial(case.loss, num_micro=num_micro)
    return jax.eval_shape(loss, case.params, batch, case.method_state(), frozen)


def test_asking_for_what_is_not_there(toys, batches):
    """Before anything compiles, and in one line."""
    without = dataclasses.replace(toys["Views"], teachers={})
    misnamed = dataclasses.replace(toys["Distil"], teachers={"bag": toys["Distil"].teachers["big"]})
    plain = {k: v for k, v in batches["Distil"].items() if "/" not in k}
    renamed = plain | {"texts/text": plain["text"], "texts/index": plain["index"]}
    cases = [
        (without, batches["Views"], 1, "config.teachers: got none, expected 'ema', which"),
        (
            misnamed,
            batches["Distil"],
            1,
            "config.teachers: got 'big', expected one of ['bag']; did you mean 'bag'?",
        ),
        (
            toys["Distil"],
            plain,
            1,
            "got stream 'words', expected one of []; add config.streams.words",
        ),
        (toys["Distil"], renamed, 1, "got stream 'words', expected one of ['texts']"),
        (
            toys["Captions"],
            batches["Captions"],
            3,
            "batch: got 8, expected a multiple of micro_batches = 3",
        ),
    ]
    for case, batch, num_micro, message in cases:
        with pytest.raises(UserError) as caught:
            shapes_of(case, batch, num_micro)
        assert message in str(caught.value) and "\n" not in str(caught.value)


@dataclasses.dataclass(frozen=True)
class Line:
    """No forward pass at all: reads the parameters themselves."""

    reads: ClassVar[frozenset[str]] = frozenset()

    def __call__(self, ctx: Ctx) -> Out:
        w = ctx.apply.params
        return Out({"line": Term(w["a"].sum() + 2 * w["b"].sum(), 1, weight=3.0)})


def step_line(step, stage_step, rules=EVERYTHING):
    """A step of train_step from counts in the middle of a run. Returns the states around it, and metrics."""
    params = {"a": jnp.ones(2), "b": jnp.ones(3)}
    updater = optimisers.make(optimisers.Optim(rules=rules, weight_decay=0.0), params)
    state = states.create(params, updater, {"ema": jax.tree.map(jnp.zeros_like, params)}, (), step)
    state = state.replace(stage_step=jnp.int32(stage_step))
    run = functools.partial(
        train_step,
        model=None,
        objective=Line(),
        updater=updater,
        lr_at=lambda step: 0.1 * (1 + step),
        seed=0,
        teachers={"ema": (None, 0.9)},
    )
    return state, *jax.jit(run)(state, {})


def test_counts_and_the_schedule_of_a_later_stage():
    before, after, metrics = step_line(step=500, stage_step=3)
    assert int(after.step) == 501 and int(after.stage_step) == 4
    np.testing.assert_allclose(metrics["lr"], 0.4)
    np.testing.assert_allclose(after.params["a"], before.params["a"] - 0.4, rtol=1e-5)
    np.testing.assert_allclose(metrics["loss"], 3 * (2 + 6))
    np.testing.assert_allclose(metrics["line"], 2 + 6)  # terms are logged without their weight
    np.testing.assert_allclose(metrics["grad_norm"], np.sqrt(2 * 9 + 3 * 36), rtol=1e-6)


def test_a_new_stage_does_not_forget_the_moving_average():
    """The decay's rise at the start is the run's, not the stage's."""
    _, after, _ = step_line(step=500, stage_step=0)
    np.testing.assert_allclose(after.teachers["ema"]["a"], 0.1 * after.params["a"], rtol=1e-5)


def test_frozen_parameters_in_a_step():
    rules = (optimisers.Rule("b", freeze=True), optimisers.Rule(".*"))
    before, after, metrics = step_line(0, 0, rules)
    np.testing.assert_array_equal(after.params["b"], before.params["b"])
    assert not np.array_equal(after.params["a"], before.params["a"])
    assert after.opt[1].mu["b"] is None
    np.testing.assert_allclose(metrics["grad_norm"], np.sqrt(2 * 9), rtol=1e-6)
    np.testing.assert_allclose(metrics["loss"], 3 * (2 + 6))


def test_micro_batches_keep_the_order_of_rows():
    """What `map` returns is in the order of the batch, for arrays of any rank, with extra arrays split alike."""
    batch = {"x": jnp.arange(24.0).reshape(12, 2), "other/y": jnp.zeros(5)}
    extra = {"a": jnp.arange(12), "b": jnp.arange(12 * 6).reshape(12, 3, 2)}

    def f(ctx, arrays):
        assert set(ctx.batch) == {"x"} and ctx.num_micro == 1
        return ctx.batch["x"] * 2, {"same": arrays, "sum": arrays["a"] + ctx.batch["x"][:, 0]}

    whole = f(Ctx(Apply(None, {}), {"x": batch["x"]}), extra)
    for num_micro in (2, 3, 6, 12):
        parts = Ctx(Apply(None, {}), batch, num_micro=num_micro).map(f, extra)
        jax.tree.map(np.testing.assert_array_equal, parts, whole)


def test_micro_batches_keep_the_layout_of_the_batch():
    """Rows j::k: no row moves to another device."""
    mesh = meshes.make(meshes.MeshShape(4, 2, 1))
    batch = meshes.to_global({"x": np.arange(32.0).reshape(16, 2)}, mesh)

    def run(batch):
        return Ctx(Apply(None, {}), batch, num_micro=2).map(lambda ctx: ctx.batch["x"] + 1)

    with jax.set_mesh(mesh):
        compiled = jax.jit(run).lower(batch).compile()
        out = compiled(batch)
    np.testing.assert_array_equal(out, np.arange(32.0).reshape(16, 2) + 1)
    assert out.sharding.is_equivalent_to(batch["x"].sharding, 2)
    text = compiled.as_text()
    for moving in ("all-gather", "all-to-all", "collective-permute"):
        assert moving not in text, moving


def bare(x):
    """An array for a Term, which the type checker of these tests would refuse, and users have none."""
    out = Out({})
    out.terms["a"] = x.sum()
    return out


@pytest.mark.parametrize(
    ("returned", "said"),
    [
        (lambda x: x.sum(), "objective Returns: got a ArrayImpl, expected an Out"),
        (bare, "objective Returns: a: got a ArrayImpl, expected a Term"),
        (lambda x: Out({"a": Term(x, 2)}), r"got shapes \(2,\) and \(\), expected scalars"),
    ],
)
def test_an_answer_of_another_kind_is_refused_in_words(returned, said):
    class Returns:
        def __call__(self, x):
            return returned(x)

    with pytest.raises(UserError, match=said):
        answer(Returns(), jnp.ones(2))
