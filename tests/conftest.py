"""Eight simulated CPU devices for every test, strict ranks, and one cache of compiled programs for the suite."""

import os
import pathlib

import jax
import pytest

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")
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
