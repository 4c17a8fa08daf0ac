"""Scripts of benchmarks/ import bench.py by its name; some are tested where packages are missing."""

import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[2]
sys.path.append(str(ROOT / "benchmarks"))


@pytest.fixture
def script(tmp_path):
    """Runs a script of benchmarks/; absent: modules that neither it nor its workers can import."""

    def run(name, *options, absent=()):
        lines = ["import sys", *(f"sys.modules[{module!r}] = None" for module in absent)]
        (tmp_path / "sitecustomize.py").write_text("\n".join(lines))
        cache = os.environ.get("VLP_TEST_CACHE", str(ROOT / ".cache" / "jax-tests"))
        path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
        environ = os.environ | {"PYTHONPATH": path, "JAX_COMPILATION_CACHE_DIR": cache}
        command = [sys.executable, f"benchmarks/{name}.py", *map(str, options)]
        return subprocess.run(command, cwd=ROOT, env=environ, capture_output=True, text=True)

    return run
