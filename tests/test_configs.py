"""Every config: smoke run, JSON, and the parameter counts that its paper gives."""

import json
import pathlib
import shutil

import flax.linen as nn
import ml_collections
import pytest

from configs import common
from helpers import runs
from helpers.everything import pairs
from vlp.core import check, tree
from vlp.core import config as configs
from vlp.objectives import OBJECTIVES
from vlp.optim import make as optimisers
from vlp.runtime import workdir
from vlp.train import stages, state, summary

FOLDER = runs.ROOT / "configs"
NAMES = sorted(p.stem for p in FOLDER.glob("*.py") if "def get_config" in p.read_text())


def load(name, arg):
    if name == "small" and "smoke" not in arg:
        pytest.skip("it needs a dataset: tests/test_small.py")
    return configs.load(f"{FOLDER / name}.py:{arg}")


def test_all_shipped_configs_are_tested():
    assert {"coca_emoji", "coca", "clip", "cap", "flip", "clipa", "align", "lit"} <= set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_every_config_trains_evaluates_and_saves_at_smoke_size(name, tmp_path):
    """Two steps, or one per stage, through `vlp train`. The config that an objective is named after is resumed as well:
    without its last checkpoint it trains to the same numbers."""
    directory = tmp_path / "run"
    argv = ["train", "--config", f"{FOLDER / name}.py:smoke", "--workdir", directory]
    argv += ["--config.save_every_steps=1"]
    assert runs.vlp(*argv, devices=2) == 0
    rows = workdir.read(directory / "metrics.jsonl")
    config = json.loads((directory / "config.json").read_text())
    num_steps = sum(stage.num_steps for stage in stages.parse(config)[1])
    assert num_steps == max(2, len(config["stages"]))
    assert [r["step"] for r in rows if r["kind"] == "train"] == list(range(1, num_steps + 1))
    assert {r["eval"] for r in rows if r["kind"] == "eval"} == set(config["evals"])
    if name not in OBJECTIVES:
        return
    *_, last = sorted((directory / "checkpoints").glob("step_?????????"))
    shutil.copytree(directory, tmp_path / "whole")
    shutil.rmtree(last)
    assert runs.vlp(*argv, devices=2) == 0
    runs.assert_same_run(tmp_path / "whole", directory)


def test_smoke_leaves_the_sizes_of_a_plugins_towers_alone():
    """Their keys are not those of a ViT. A shipped tower beside it is made tiny."""

    def towers(image, text):
        model = {"name": "two_tower", "image_tower": image, "text_tower": text}
        found = common.smoke(ml_collections.ConfigDict(runs.CLIP | {"model": model})).model
        return found.image_tower.to_dict(), found.text_tower.to_dict()

    mine = {"name": "mine", "stages": 2}
    image, text = towers(mine, {"vocab": 99, "width": 512})
    assert image == mine and text["width"] == 32
    image, text = towers({"patch": 16}, mine)
    assert image["patch"] == 8 and text == mine | {"vocab": 128}


@pytest.mark.parametrize("name", NAMES)
def test_every_config_is_json_and_builds(name):
    for arg in ("smoke", ""):
        config = load(name, arg)
        assert json.loads(json.dumps(config)) == config
        assert all(stage.num_steps > 0 for stage in stages.parse(config)[1])  # it builds


@pytest.mark.parametrize(
    ("size", "image", "decoder", "both"),
    [("base", 86, 297, 383), ("large", 303, 484, 787), ("giant", None, None, 2100)],
)
def test_coca_has_the_papers_parameter_counts(size, image, decoder, both):
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


IMPORTS = {
    "a dot": "from .common import BATCH\nfrom . import towers\n",
    "no dot": "from common import BATCH\nimport towers\n",
}


def folder(path, batch, imports, name="mine"):
    """A folder of a user's own: a config, and beside it common.py and towers.py (which imports common, too)."""
    path.mkdir(exist_ok=True)
    dot = "." if "." in imports else ""
    (path / "common.py").write_text(f"BATCH = {batch}\n")
    (path / "towers.py").write_text(f"from {dot}common import BATCH\nSTEPS = 2 * BATCH\n")
    late = "    from common import BATCH as late\n" if not dot else "    late = BATCH\n"
    text = (
        f"def get_config(arg):\n{late}    return dict(batch=BATCH, steps=towers.STEPS, late=late)\n"
    )
    (path / f"{name}.py").write_text(imports + text)
    return str(path / f"{name}.py")


@pytest.mark.parametrize("imports", IMPORTS.values(), ids=IMPORTS)
def test_each_folder_of_configs_imports_its_own_modules(tmp_path, imports):
    """Whatever was imported before: another folder's modules of the same names, and shipped ones."""
    load("clip", "")
    files = {n: folder(tmp_path / f"folder{n}", n, imports) for n in (1, 2)}
    for n in (1, 2, 1):
        assert configs.load(files[n]) == {"batch": n, "steps": 2 * n, "late": n}
    assert load("clip", "smoke")["batch"] == 8
    folder(tmp_path / "folder1", 30, imports)  # edited, while the process goes on
    assert configs.load(files[1]) == {"batch": 30, "steps": 60, "late": 30}


def test_folders_that_import_with_and_without_a_dot_do_not_mix(tmp_path):
    files = [folder(tmp_path / str(n), n, IMPORTS[k]) for n, k in enumerate(2 * [*IMPORTS])]
    for n, file in [*enumerate(files), *enumerate(files)]:
        assert configs.load(file)["steps"] == 2 * n


def test_a_config_may_load_another_folders_config_and_go_on_with_its_own_modules(tmp_path):
    other = folder(tmp_path / "other", 7, IMPORTS["no dot"])
    mine = pathlib.Path(folder(tmp_path / "mine", 1, IMPORTS["no dot"]))
    load_other = f"from vlp.core import config\n    other = config.load({other!r})\n    from common"
    text = mine.read_text().replace(
        "from common import BATCH as late", f"{load_other} import BATCH as late", 1
    )
    mine.write_text(text.replace("late=late", "late=late, other=other['late']"))
    assert configs.load(str(mine)) == {"batch": 1, "steps": 2, "late": 1, "other": 7}


def test_what_one_folder_lacks_is_not_taken_from_another(tmp_path):
    configs.load(folder(tmp_path / "one", 1, IMPORTS["no dot"]))
    (tmp_path / "two").mkdir()
    for line, name in (("import common", "common"), ("from .absent import x", "absent")):
        (tmp_path / "two" / "mine.py").write_text(f"{line}\ndef get_config(): return {{}}\n")
        with pytest.raises(check.UserError, match=f"got no module '?{name}.*line 1") as caught:
            configs.load(str(tmp_path / "two" / "mine.py"))
        assert "\n" not in str(caught.value) and "vlp_config" not in str(caught.value)


def test_a_shipped_config_can_be_copied_anywhere(tmp_path, monkeypatch):
    """Alone, it finds the shipped modules that it imports; a module of the same name beside it comes first."""
    monkeypatch.chdir(tmp_path)
    for name in NAMES:
        shutil.copy(FOLDER / f"{name}.py", tmp_path / f"my-{name}.v2.py")
        assert configs.load(f"my-{name}.v2.py:smoke") == load(name, "smoke")
    (tmp_path / "common.py").write_text(
        (FOLDER / "common.py").read_text() + "\nSMOKE_TOWER['width'] = 64\n"
    )
    assert configs.load("my-clip.v2.py:smoke")["model"]["text_tower"]["width"] == 64
    (tmp_path / "common.py").write_text("")
    with pytest.raises(check.UserError, match="cannot import name 'pretraining'") as caught:
        configs.load("my-clip.v2.py:smoke")
    assert "common.py" in str(caught.value) and "\n" not in str(caught.value)


def test_a_config_derived_from_a_shipped_one(tmp_path):
    """As docs/running.md has it: a file anywhere that changes what another one returns."""
    from vlp.core.config import load

    lines = "from .coca_emoji import get_config as base\n\n\ndef get_config(arg=None):\n"
    lines += "    c = base(arg)\n    c.optim.weight_decay = 0.1\n    return c\n"
    (tmp_path / "my.py").write_text(lines)
    found = load(f"{tmp_path / 'my.py'}:seed=3")
    assert (found["optim"]["weight_decay"], found["seed"]) == (0.1, 3)
    shipped = load("configs/coca_emoji.py:seed=3")
    assert found["model"] == shipped["model"] and shipped["optim"]["weight_decay"] == 0.2
