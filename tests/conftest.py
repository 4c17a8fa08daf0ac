"""Eight simulated CPU devices for every test, strict ranks, and one cache of compiled programs for the suite."""

import importlib.metadata
import os
import pathlib

# Before JAX starts: a third of the time to compile. Later versions of jaxlib lack the switch and refuse unknown ones.
if importlib.metadata.version("jaxlib").startswith("0.10."):
    _flags = "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_flags}".strip()

import jax
import pytest

# Eight devices on few cores: with as many threads as cores, two collectives of one program can wait for each other.
os.environ.setdefault("PJRT_NPROC", "32")
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")
# Tiny models spend their time in the compiler; tests, and the commands they start, ask it for less (3 × faster).
jax.config.update("jax_disable_most_optimizations", True)
os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"
_cache = os.environ.get(
    "VLP_TEST_CACHE", str(pathlib.Path(__file__).parents[1] / ".cache" / "jax-tests")
)
jax.config.update("jax_compilation_cache_dir", _cache)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
os.environ.setdefault(
    "VLP_CACHE", str(pathlib.Path(_cache).parent)
)  # for the commands that tests start


@pytest.fixture(autouse=True)
def _no_mesh_left_behind():
    yield
    assert jax.sharding.get_abstract_mesh().empty


@pytest.fixture(scope="session")
def random_params():
    """The function (model, image_px, text_len, seed=0, heads=()) → parameters (`everything.random_like`).

    heads: name and input width of each of the model's heads that is wanted.
    """
    import flax.linen as nn

    from helpers.everything import abstract, random_like

    def draw(model, image_px: int, text_len: int, seed: int = 0, heads=()):
        return random_like(nn.unbox(abstract(model, image_px, text_len, heads)), seed)

    return draw


@pytest.fixture(scope="session")
def error():
    """The function (ours, reference) → relative norm of the difference of two trees of arrays."""
    import numpy as np

    def relative(ours, reference) -> float:
        a, b = (
            np.concatenate([np.asarray(x, np.float64).ravel() for x in jax.tree.leaves(t)])
            for t in (ours, reference)
        )
        assert a.shape == b.shape
        return float(np.linalg.norm(a - b) / np.linalg.norm(b))

    return relative


@pytest.fixture(scope="session")
def coca_run(tmp_path_factory):
    """The workdir of a finished two-stage run (`runs.COCA`). Read only: copy it to change it."""
    from helpers import runs

    directory = tmp_path_factory.mktemp("coca") / "run"
    assert runs.train(runs.COCA, directory) == 0
    return directory


@pytest.fixture(scope="session")
def clip_run(tmp_path_factory):
    """The workdir of a finished run of one stage (`runs.CLIP`). Read only: copy it to change it."""
    from helpers import runs

    directory = tmp_path_factory.mktemp("clip") / "run"
    assert runs.train(runs.CLIP, directory) == 0
    return directory


@pytest.fixture
def toy(monkeypatch):
    """Registers the model and the objective "toy" (`runs.TOY`), which compile in no time."""
    from helpers import runs
    from vlp.models import MODELS
    from vlp.objectives import OBJECTIVES

    monkeypatch.setitem(MODELS, "toy", runs.Toy)
    monkeypatch.setitem(OBJECTIVES, "toy", runs.ToyObjective)
