"""The floors of the package: which folder may import which, and what an import must not load."""

import ast
import pathlib
import subprocess
import sys

import pytest

import vlp

ROOT = pathlib.Path(vlp.__file__).parent
# A folder imports lower floors only, and no other folder of its own floor.
FLOORS = {
    "core": 0,
    "ops": 1,
    "losses": 2,
    "models": 2,
    "data": 2,
    "optim": 2,
    "ckpt": 2,
    "objectives": 3,
    "evals": 3,
    "infer": 3,
    "runtime": 3,
    "exchange": 4,
    "train": 4,
    "report": 4,
    "plan": 5,
    "cli": 6,
}
FILES = sorted(
    p.relative_to(ROOT) for p in ROOT.rglob("*.py") if len(p.relative_to(ROOT).parts) > 1
)


def imports(path: pathlib.Path, *, module_level: bool) -> set[str]:
    """The dotted names that a file imports; `from a import b` counts as a.b."""
    tree = ast.parse((ROOT / path).read_text())
    found = set()
    for node in tree.body if module_level else ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


@pytest.mark.parametrize("folder", sorted({path.parts[0] for path in FILES}))
def test_imports_lower_floors_only(folder):
    assert folder in FLOORS, f"vlp/{folder}: give it a floor here"
    lower = {other for other, floor in FLOORS.items() if floor < FLOORS[folder]} | {folder}
    for path in (p for p in FILES if p.parts[0] == folder):
        names = imports(path, module_level=False)
        others = {n.split(".")[1] for n in names if n.startswith("vlp.")} & FLOORS.keys()
        assert others <= lower, f"vlp/{path} (floor {FLOORS[folder]}) imports {others - lower}"


@pytest.mark.parametrize(
    "folder, barred",
    [
        ("objectives", ("vlp.models", "vlp.data", "vlp.optim", "flax")),  # they get `apply`
        ("losses", ("vlp.models", "vlp.data", "vlp.optim", "flax")),
        ("models", ("vlp.losses", "optax")),
        ("data", ("jax", "flax")),  # numpy only
        ("report", ("jax", "flax", "vlp.train", "vlp.data", "vlp.models")),  # reads workdirs only
    ],
)
def test_what_a_folder_does_not_know(folder, barred):
    for path in (p for p in FILES if p.parts[0] == folder):
        names = imports(path, module_level=False)
        wrong = [n for n in names for b in barred if n == b or n.startswith(f"{b}.")]
        assert not wrong, f"vlp/{path} imports {wrong}"


@pytest.mark.parametrize("package", ["jax", "flax", "torch", "tensorflow", "grain", "orbax"])
def test_data_imports_nothing_heavy_at_the_top(package):
    for path in (p for p in FILES if p.parts[0] in ("data", "report")):
        names = imports(path, module_level=True)
        assert package not in {n.split(".")[0] for n in names}, f"vlp/{path} imports {package}"


def test_imports_stay_light():
    """In a fresh interpreter: the step needs no data code, and the data starts no backend."""
    code = """if True:
        import sys
        import vlp.data.dataset, vlp.data.emoji, vlp.report.html
        heavy = {"jax", "flax", "orbax", "torch", "tensorflow", "grain"} & sys.modules.keys()
        assert not heavy, f"the data code imports {heavy}"
        for name in [n for n in sys.modules if n.split(".")[0] in ("vlp", "array_record")]:
            del sys.modules[name]
        import vlp.train.step, vlp.models, vlp.objectives
        heavy = {"grain", "clu", "array_record", "orbax", "tensorflow"} & sys.modules.keys()
        assert not heavy, f"the training step imports {heavy}"
        from jax._src import xla_bridge
        assert not xla_bridge.backends_are_initialized(), "an import started a jax backend"
    """
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT.parent)
