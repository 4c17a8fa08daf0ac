"""Every config: smoke run, JSON, and the parameter counts that its paper gives."""

import json

import flax.linen as nn
import pytest
import runs
from everything import pairs

from vlp.core import config as configs
from vlp.core import tree
from vlp.optim import make as optimisers
from vlp.runtime import workdir
from vlp.train import stages, state, summary

FOLDER = runs.ROOT / "configs"
NAMES = sorted(p.stem for p in FOLDER.glob("*.py") if "def get_config" in p.read_text())


def load(name, arg):
    if name == "small" and "smoke" not in arg:
        pytest.skip("it needs a dataset: tests/test_small.py")
    return configs.load(f"{FOLDER / name}.py:{arg}")


def test_there_are_configs():
    assert {"coca_emoji", "coca", "clip", "cap", "flip", "clipa", "align", "lit"} <= set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_smoke(name, tmp_path):
    """Two steps, or one per stage; an evaluation; a save: through the command that users type."""
    directory = tmp_path / "run"
    argv = ["train", "--config", f"{FOLDER / name}.py:smoke", "--workdir", directory]
    assert runs.vlp(*argv, devices=2) == 0
    rows = workdir.read(directory / "metrics.jsonl")
    config = json.loads((directory / "config.json").read_text())
    num_steps = sum(stage.num_steps for stage in stages.parse(config)[1])
    assert num_steps == max(2, len(config["stages"]))
    assert [r["step"] for r in rows if r["kind"] == "train"] == list(range(1, num_steps + 1))
    assert {r["eval"] for r in rows if r["kind"] == "eval"} == set(config["evals"])
    assert list((directory / "checkpoints").glob("step_*"))


@pytest.mark.parametrize("name", NAMES)
def test_json(name):
    for arg in ("smoke", ""):
        config = load(name, arg)
        assert json.loads(json.dumps(config)) == config
        assert all(stage.num_steps > 0 for stage in stages.parse(config)[1])  # it builds


@pytest.mark.parametrize(
    ("size", "image", "decoder", "both"),
    [("base", 86, 297, 383), ("large", 303, 484, 787), ("giant", None, None, 2100)],
)
def test_coca_parameters(size, image, decoder, both):
    """CoCa's table 1 in millions: base and large count both embeddings, giant one (tied)."""
    (row,) = summary.stages(load("coca", f"size={size}"))
    counts = {k.removeprefix("parameters/"): v / 1e6 for k, v in row.items() if "/" in k}
    assert counts["image + decoder"] == pytest.approx(both, rel=0.005)
    if image:
        assert counts["image"] == pytest.approx(image, rel=0.005)
        assert counts["decoder"] == pytest.approx(decoder, rel=0.005)
    assert (row["image_px"], row["text_len"]) == (288, 64)
    parts = [v for k, v in counts.items() if k not in ("total", "image + decoder")]
    assert sum(parts) == pytest.approx(counts["total"])


def test_lit_locks_the_image_tower_alone():
    (stage,) = stages.parse(load("lit", ""))[1]
    params = nn.unbox(state.abstract_params(stage.model, stage.objective, pairs(224, 16)))
    trainable = tree.named(optimisers.make(stage.optim, params).trainable)
    assert {name.split("/")[0] for name, yes in trainable.items() if not yes} == {"image_tower"}
    assert {name.split("/")[0] for name, yes in trainable.items() if yes} == {
        "text_tower", "joint_text", "temperature",
    }  # fmt: skip
    assert stage.init_match == "image_tower/.*"


def test_plan_prints_the_counts(capsys, tmp_path):
    file = tmp_path / "plan.json"
    argv = ["plan", "--config", f"{FOLDER / 'clip'}.py:size=B/16", "--json", file]
    assert runs.vlp(*argv) == 0
    assert "projections and heads" in capsys.readouterr().out
    assert json.loads(file.read_text())[0]["parameters/total"] == pytest.approx(150e6, rel=0.01)


def test_a_config_may_import_its_neighbours(tmp_path):
    (tmp_path / "shared_bits.py").write_text("BATCH = 3\n")
    text = "from shared_bits import BATCH\ndef get_config(arg):\n    return dict(batch=BATCH)\n"
    (tmp_path / "mine.py").write_text(text)
    assert configs.load(str(tmp_path / "mine.py")) == {"batch": 3}
