"""What holds for every line of OBJECTIVES, with the model, teachers and data of configs/NAME.py:smoke.

A new objective is tested here without a change to this file. Dropout, drop path and patch dropping are on wherever
the model and the objective have them, so equality means that they too are the same everywhere. That a run resumed is
the run uninterrupted: tests/test_configs.py, for every config. The loss itself: tests/objectives/test_NAME.py.
"""

import dataclasses
import functools
import pathlib

import flax.linen as nn
import jax
import numpy as np
import pytest
from test_losses import CASES
from test_precision import sums_in_half

from helpers import runs
from helpers.everything import random_like, shapes
from vlp.core import tree
from vlp.core.config import load, plain
from vlp.data import leaves
from vlp.data.dataset import open_dataset
from vlp.models.interface import with_fields
from vlp.objectives import OBJECTIVES
from vlp.optim import make as optimisers
from vlp.train import build, stages
from vlp.train import state as states

HERE = pathlib.Path(__file__).parent
TODO = """
objective {name!r} of vlp/objectives/__init__.py is not tested. Add
  configs/{name}.py               get_config(arg) with objective=dict(name={name!r}); its argument `smoke` makes it tiny
                                  (`from .common import smoke`). The tests of this file and of test_configs.py run it.
  tests/objectives/test_{name}.py  its loss compared with loops or values worked by hand (as test_albef.py)
Missing: {missing}"""


@pytest.mark.parametrize("name", OBJECTIVES)
def test_each_objective_has_a_config_and_a_test_of_its_own(name):
    """A row of CASES in test_losses.py counts as a test too: it suits losses of embeddings and captions alone."""
    wanted = {f"configs/{name}.py": (runs.ROOT / "configs" / f"{name}.py").exists()}
    tested = OBJECTIVES[name] in {type(objective) for objective, _ in CASES.values()}
    wanted[f"tests/objectives/test_{name}.py"] = tested or (HERE / f"test_{name}.py").exists()
    missing = ", ".join(path for path, there in wanted.items() if not there)
    assert not missing, TODO.format(name=name, missing=missing)
    stage = smoke_stage(name)
    assert isinstance(stage.objective, OBJECTIVES[name]), f"configs/{name}.py: {stage.objective}"


def smoke_stage(name):
    """The first stage of configs/NAME.py:smoke, with all of its random parts on."""
    config = load(f"{runs.ROOT / 'configs' / name}.py:smoke")
    stage = stages.parse(plain(config))[1][0]
    objective = stage.objective
    if hasattr(objective, "keep_ratio"):
        objective = dataclasses.replace(objective, keep_ratio=0.5)
    model = with_fields(stage.model, dropout=0.1, drop_path=0.1)
    return dataclasses.replace(stage, model=model, objective=objective)


@pytest.fixture(scope="module")
def cases(training):
    """Name → the training of its smoke config, and its first batch; made when asked for."""

    @functools.cache
    def make(name):
        stage, batch, fits = smoke_stage(name), {}, {}
        for stream, part in {"": stage, **stage.streams}.items():
            data = dataclasses.replace(part.data, read_threads=0)
            dataset = open_dataset(data, reads=leaves.of_stream(stage.objective.reads, stream))
            prefix = f"{stream}/" if stream else ""
            found = dataset.batch_at(part.start_samples, part.batch, 0)
            batch |= {prefix + leaf: x for leaf, x in found.items()}
            fits[stream] = dataset.tokenizer
        stage = build.with_tokenizer(stage, fits[""])
        nets = dict.fromkeys(stage.teachers, (None, None))
        boxed = states.abstract_params(stage.model, stage.objective, shapes(batch), nets)
        params = random_like(nn.unbox(boxed))
        teachers = {
            label: (stage.model, teacher.decay, random_like(nn.unbox(boxed), seed=1 + k))
            for k, (label, teacher) in enumerate(stage.teachers.items())
        }
        case = training(
            model=stage.model, objective=stage.objective, params=params, teachers=teachers,
            layout=boxed,
        )  # fmt: skip
        return case, batch, optimisers.make(stage.optim, params)

    return make


@pytest.fixture(scope="module")
def reference(cases):
    """Name → loss and gradients of the first batch on one device."""

    @functools.cache
    def value(name):
        case, batch, _ = cases(name)
        return case.value(batch, grads=True)

    return value


@pytest.mark.parametrize("name", OBJECTIVES)
def test_gradients_reach_every_parameter(name, cases, reference):
    loss, grads = reference(name)
    assert np.isfinite(loss)
    trained = tree.named(cases(name)[2].trainable)
    for leaf, g in tree.named(grads).items():
        assert np.isfinite(g).all() and (np.abs(g).max() > 0 or not trained[leaf]), leaf


@pytest.mark.parametrize("name", OBJECTIVES)
def test_micro_batches_on_a_mesh_of_three_axes_change_nothing(name, cases, reference, error):
    """Both at once, which compiles once. A test of the method's own may try more of either."""
    case, batch, _ = cases(name)
    loss, grads = case.value(batch, (2, 2, 2), num_micro=2, grads=True)
    np.testing.assert_allclose(loss, reference(name)[0], rtol=1e-5)
    assert error(grads, reference(name)[1]) < 1e-5


@pytest.mark.parametrize("num_micro", [1, 2])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_nothing_is_summed_in_half_precision(name, num_micro, cases):
    case, batch, _ = cases(name)
    model = with_fields(case.model, dtype="bfloat16")
    teachers = {label: (model, *rest) for label, (_, *rest) in case.teachers.items()}
    half = dataclasses.replace(case, model=model, teachers=teachers)
    frozen = {label: params for label, (_, _, params) in teachers.items()}
    gradient = jax.grad(functools.partial(half.loss, num_micro=num_micro))
    program = jax.make_jaxpr(gradient)(case.params, batch, case.method_state(), frozen)
    assert list(sums_in_half(program.jaxpr)) == []
