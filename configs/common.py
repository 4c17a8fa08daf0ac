"""Parts that several configs share. `vlp` itself does not import this file."""

from typing import Any

import ml_collections

SMOKE_TOWER = dict(width=32, depth=1, heads=2, mlp=64)
SMOKE_IMAGE = {
    "vit": dict(**SMOKE_TOWER, patch=8),
    "convnext": dict(depths=(1, 1), widths=(8, 16)),
    "resnet": dict(depths=(1, 1), width=8, heads=2, out=SMOKE_TOWER["width"]),
}


def pretraining(name: str, model: dict[str, Any], path: str) -> ml_collections.ConfigDict:
    """Returns a dual encoder's config without the paper's values: batch, objective, optimiser, schedule, length."""
    c = ml_collections.ConfigDict()
    c.name = name.replace("/", "").lower()
    c.model = model
    c.data = dict(path=path, captions="uniform", workers=8)
    c.evals = dict(retrieval=dict(split="val", every_steps=10_000, batch=1024))
    c.log_every_steps, c.save_every_steps = 100, 2_000
    return c


def smoke(c: Any) -> Any:
    """Turns any config into a run of two steps, one evaluation and one save at tiny width, on made-up shapes.

    Every stage is kept, with as few steps as that allows: a stage of several has one step.
    """
    c.batch, c.micro_batches = 8, 1
    image, text = c.model.image_tower, c.model.text_tower
    # a plugin's towers keep their sizes: their keys are not known here
    if (tower := image.get("name", "vit")) in SMOKE_IMAGE:
        image.update(SMOKE_IMAGE[tower], remat="none", dtype="float32")
    if text.get("name", "transformer") == "transformer":
        text.update(SMOKE_TOWER, remat="none", dtype="float32")
    text.vocab = 128
    if c.model.get("embed"):
        c.model.embed = SMOKE_TOWER["width"] if not c.model.get("project_image", True) else 16
    if c.model.get("decoder", {}).get("depth"):
        c.model.decoder.depth = 1
    if "poolers" in c.model:
        c.model.poolers.queries = min(c.model.poolers.get("queries", 256), 4)
    c.data = dict(source="shapes", num_records=32, image_px=16, text_len=12)
    stages = c.get("stages") or [dict()]
    for stage in stages:
        stage.pop("schedule", None)
        for key in ("samples", "batch", "data", "micro_batches"):
            stage.pop(key, None)
        stage["steps"] = 2 if len(stages) == 1 else 1
    c.stages = stages
    c.schedule = dict(lr=1e-3, shape="constant")
    c.mesh = dict(data=1, fsdp=-1)
    for evaluator in c.get("evals", {}).values():
        evaluator.update(split="test", batch=8)
        if evaluator.get("name") == "zeroshot":
            evaluator.update(
                label="shape", classes=("circle", "square"), phrases=(), extra_splits=()
            )
    c.log_every_steps = 1
    c.platform = ""
    return c
