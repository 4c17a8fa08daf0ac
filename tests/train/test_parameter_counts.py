"""What the log says of a model's size."""

import pathlib
import re
from unittest import mock

import jax

from configs.common import SMOKE_IMAGE
from helpers import runs
from vlp.core import mesh as meshes
from vlp.core import tree
from vlp.train import build, session, stages


def test_the_log_counts_parameters_once(caplog):
    """The table's total and the line below it: running statistics count in neither."""
    config = runs.changed(
        runs.CLIP, **{"model.image_tower": {"name": "resnet", **SMOKE_IMAGE["resnet"]}}
    )
    settings, (stage, *_) = stages.parse(config)
    mesh = meshes.make(settings.mesh, devices=jax.devices()[:1])
    with jax.set_mesh(mesh):
        plan = build.prepare(stage, settings, mesh)
    device = {"devices": 1, "device": "cpu"}
    run = mock.Mock(
        spec=session.Session, versions=device, config=config, workdir=pathlib.Path("run")
    )
    caplog.set_level("INFO")
    session.say_model(run, [plan])
    (total,) = re.findall(r"total\s+([\d,]+)", caplog.text)
    assert f"tiny: {total} parameters on 1" in caplog.text
    assert total != f"{tree.size(plan.abstract.params):,}"
