"""Anything outside of the config that could change the numbers is refused, fixed or logged before the first step."""

import dataclasses
import json
import logging
from typing import ClassVar
from unittest import mock

import jax
import jax.numpy as jnp
import pytest

from helpers import runs
from vlp.core import check, flags
from vlp.core.types import Out, Term
from vlp.data.config import Data
from vlp.evals.retrieval import Retrieval
from vlp.infer.load import load
from vlp.objectives import OBJECTIVES
from vlp.train import loop, stages


@dataclasses.dataclass(frozen=True)
class Queue:
    """Keeps a queue, in one of several wrong ways."""

    reads: ClassVar = frozenset({"image", "text"})
    how: str = "right"

    def init_method_state(self, key, model):
        return {"queue": jnp.zeros((6, 4)), "turns": jnp.int32(0)}

    def __call__(self, ctx):
        z_BE = ctx.map(lambda part: part.student("image", part.batch["image"])["embed"])
        queue, turns = ctx.method_state["queue"], ctx.method_state["turns"] + 1
        method_state = {
            "right": {"queue": queue + 1, "turns": turns},
            "longer": {"queue": jnp.concatenate([queue, z_BE]), "turns": turns},
            "another type": {"queue": queue.astype(jnp.bfloat16), "turns": turns},
            "a float": {"queue": queue, "turns": turns.astype(jnp.float32)},
            "part of it": {"queue": queue},
            "nothing": (),
            "more": {"queue": queue, "turns": turns, "new": turns},
        }[self.how]
        return Out({"x": Term(jnp.square(z_BE).sum(), z_BE.shape[0])}, method_state)


WRONG = {
    "longer": "method_state['queue']: got float32[14, 4], expected float32[6, 4]",
    "another type": "method_state['queue']: got bfloat16[6, 4], expected float32[6, 4]",
    "a float": "method_state['turns']: got float32[], expected int32[]",
    "part of it": "method_state['turns']: got none after a step, expected int32[]",
    "nothing": "method_state['queue']: got none after a step, expected float32[6, 4]",
    "more": "method_state['new']: got int32[], expected none, as before it",
}


@pytest.mark.parametrize("how", WRONG)
def test_an_objective_whose_arrays_change(toy, tmp_path, monkeypatch, capsys, how):
    """Its checkpoints could not be resumed, so it is refused before the first step."""
    monkeypatch.setitem(OBJECTIVES, "queue", Queue)
    config = runs.changed(runs.TOY, objective={"name": "queue", "how": how})
    assert runs.train(config, tmp_path / "run") == 2
    line = capsys.readouterr().err.strip()
    assert f"objective Queue: {WRONG[how]}" in line and "\n" not in line
    assert not (tmp_path / "run").exists()


def test_an_objective_whose_arrays_stay(toy, tmp_path, monkeypatch):
    monkeypatch.setitem(OBJECTIVES, "queue", Queue)
    config = runs.changed(runs.TOY, objective={"name": "queue"}, steps=2)
    assert runs.train(config, tmp_path / "run") == 0


TOO_LARGE = {
    "seed": ({"seed": 2**32}, "config.seed: got 4294967296, expected 0"),
    "negative seed": ({"seed": -1}, "config.seed: got -1, expected 0"),
    "steps": ({"steps": 2**31}, "fewer than 2^31 steps"),
    "samples": ({"steps": 0, "samples": 2**40}, "fewer than 2^31 steps"),
    "float32": ({"schedule.lr": 1e39}, "config.schedule.lr: got 1e+39, expected a number that"),
    "53 bits": ({"save_every_steps": 2**53}, "config.save_every_steps: got 9007199254740992"),
    "a float": ({"schedule.lr": 10**400}, "config.schedule.lr: got 1000"),
    "a part": (
        {"data.mixture": [{"name": "a", "num_records": 2**60}]},
        "num_records: got 1152921504606846976",
    ),
}


@pytest.mark.parametrize("what", TOO_LARGE)
def test_numbers_of_too_many_bits(what):
    """Seeds, counts and ids that some part would round are refused."""
    changes, message = TOO_LARGE[what]
    with pytest.raises(check.UserError) as refused:
        stages.parse(runs.changed(runs.CLIP, **changes))
    assert message in str(refused.value)


def test_the_largest_seeds_differ():
    keys = {tuple(jax.random.key_data(jax.random.key(s)).tolist()) for s in (2**32 - 1, 2**31, 0)}
    assert len(keys) == 3
    assert stages.parse(runs.changed(runs.CLIP, seed=2**32 - 1))[0].seed == 2**32 - 1


SHELL = {
    "JAX_ENABLE_X64": "1", "JAX_DEFAULT_MATMUL_PRECISION": "bfloat16", "JAX_RANDOM_SEED_OFFSET": "3",
    "JAX_DEFAULT_PRNG_IMPL": "rbg", "JAX_NUMPY_DTYPE_PROMOTION": "strict", "JAX_THREEFRY_PARTITIONABLE": "0",
    "JAX_HIGH_DYNAMIC_RANGE_GUMBEL": "1", "JAX_ALLOW_F16_REDUCTIONS": "0", "JAX_DISABLE_JIT": "1",
    "JAX_DEBUG_NANS": "1", "JAX_DEBUG_INFS": "1", "JAX_NO_EXECUTION": "1",
}  # fmt: skip


def test_flags_of_the_shell_change_no_number_and_are_recorded(toy, tmp_path):
    """They are logged, too."""
    config = runs.changed(runs.TOY, steps=2)
    with mock.patch.dict(runs.os.environ, SHELL):
        process = runs.command(*runs.arguments(config, tmp_path / "shell"))
    out, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    for name, value in SHELL.items():
        shown = {"0": "False", "1": "True"}.get(value, value)
        assert f"{name}={shown} is ignored" in out
    assert (
        json.loads((tmp_path / "shell" / "versions.json").read_text())["flags"].items()
        >= SHELL.items()
    )
    assert runs.train(config, tmp_path / "plain") == 0
    runs.assert_same_run(tmp_path / "shell", tmp_path / "plain")


def test_flags_that_a_plugin_sets_are_set_back(toy, tmp_path, monkeypatch, caplog):
    """Also where the run is started from Python, without the command line."""
    plugin = tmp_path / "wide.py"
    text = "import dataclasses\nimport jax\njax.config.update('jax_enable_x64', True)\n"
    plugin.write_text(f"{text}OBJECTIVES = {{}}\n")
    config = runs.changed(runs.TOY, steps=1, plugins=[str(plugin)], **{"model.name": "none"})
    try:
        with pytest.raises(check.UserError, match="got 'none', expected one of"):
            stages.parse(config)
        assert not jax.config.jax_enable_x64 and "JAX_ENABLE_X64=True is ignored" in caplog.text
        jax.config.update("jax_numpy_dtype_promotion", "strict")
        assert loop.run(runs.changed(runs.TOY, steps=1), tmp_path / "run") == 0
        assert jax.config.jax_numpy_dtype_promotion == "standard"
    finally:
        jax.config.update("jax_enable_x64", False)
        jax.config.update("jax_numpy_dtype_promotion", "standard")


def test_hosts_must_share_the_flags_that_change_programs(monkeypatch):
    """Not what differs between processes, what is pinned, nor where XLA writes its dumps."""
    for name in [k for k in runs.os.environ if k.startswith("JAX_") or k == "XLA_FLAGS"]:
        monkeypatch.delenv(name)
    own = {"JAX_PROCESS_ID": "3", "JAX_ENABLE_X64": "1", "JAX_COMPILATION_CACHE_DIR": "/tmp/3"}
    ours = {
        "XLA_FLAGS": "--xla_dump_to=/tmp/3 --xla_allow_excess_precision=false",
        "JAX_OPTIMIZATION_LEVEL": "O1",
    }
    with mock.patch.dict(runs.os.environ, own | ours):
        found = flags.common()
    assert found == ours | {"XLA_FLAGS": "--xla_allow_excess_precision=false"}


@pytest.mark.parametrize("flag", ["--xla_cpu_enable_fast_math=true", "--xla_cpu_enable_fast_math"])
def test_fast_math_is_refused(monkeypatch, tmp_path, capsys, flag):
    monkeypatch.setenv("XLA_FLAGS", f"--xla_dump_to=/tmp {flag}")
    assert runs.train(runs.TOY, tmp_path / "run") == 2
    assert f"XLA_FLAGS: got {flag}, expected" in capsys.readouterr().err
    monkeypatch.setenv("XLA_FLAGS", "--xla_cpu_enable_fast_math=false")
    from vlp.cli import main

    main.start_jax()


def evaluation_fails(monkeypatch, at):
    """Retrieval raises when it is called for the `at`-th time."""
    calls, function = iter(range(1, 100)), Retrieval.__call__

    def call(*args):
        if next(calls) == at:
            raise RuntimeError("no memory left")
        return function(*args)

    monkeypatch.setattr(Retrieval, "__call__", call)


@pytest.mark.parametrize("at", [1, 2, 3])
def test_evaluations_that_failed_are_made_up_for(toy, tmp_path, monkeypatch, caplog, at):
    """Failed evaluations of step 1, of a stage's end and of the run's end are repeated at a restart."""
    evals = {
        "retrieval": {"every_steps": 1, "batch": 8},
        "again": {"name": "retrieval", "batch": 8},
    }
    config = runs.changed(runs.TOY, steps=0, evals={"a": {"name": "retrieval", "batch": 8}})
    config["stages"] = [{"name": "x", "steps": 2, "evals": evals}, {"name": "y", "steps": 1}]
    assert runs.train(config, tmp_path / "whole") == 0
    with monkeypatch.context() as patch:
        evaluation_fails(patch, at)
        with pytest.raises(RuntimeError, match="no memory left"):
            runs.train(config, tmp_path / "run")
    with caplog.at_level(logging.INFO):
        assert runs.train(config, tmp_path / "run") == 0
    assert "was due when the run stopped; made up for now" in caplog.text
    runs.assert_same_run(tmp_path / "run", tmp_path / "whole")


MIXED = {
    "mixture": [{"name": "a", "num_records": 9}, {"name": "b", "weight": 2.0, "split": "train"}],
    "reweight": [{"samples": 16, "weights": [1.0, 1.0]}],
    "caption_sources": [{"name": "template"}],
    "captions": "all", "num_captions": 2,
}  # fmt: skip


def test_a_mixture_is_of_use_again(toy, tmp_path):
    """It can be evaluated, averaged, loaded and started from. Evaluations use one of several captions."""
    run = tmp_path / "run"
    config = runs.changed(runs.TOY, evals={"retrieval": {"batch": 8}}, steps=2)
    config["data"] = {**runs.DATA, **MIXED, "caption_sources": []}
    config["objective"] = {"name": "first"}
    with mock.patch.dict(OBJECTIVES, first=First):
        assert runs.train(config, run) == 0
        last = runs.rows(run)[-1]
        assert last["kind"] == "eval" and last["num"] == 9 + 21
        assert runs.vlp("eval", "--workdir", run, "--json", tmp_path / "out.json") == 0
        found = {r["metric"]: r["value"] for r in json.loads((tmp_path / "out.json").read_text())}
        assert found == {k: last[k] for k in found}
        assert runs.vlp("average", run, run, "--out", tmp_path / "average") == 0
        assert load(tmp_path / "average").data.mixture[1].name == "b"
        assert runs.train(config | {"init": str(run)}, tmp_path / "next") == 0
    assert isinstance(load(run).data, Data)


@dataclasses.dataclass(frozen=True)
class First(runs.ToyObjective):
    """A model that reads the first of several captions."""

    def encode(self, ctx):
        image = ctx.student("image", ctx.batch["image"])
        return image["embed"], ctx.student("text", ctx.batch["text"][:, 0])["embed"]
