"""What several configs share. Plain data; nothing here is read by `vlp` itself."""

from typing import Any

SMOKE_TOWER = dict(width=32, depth=1, heads=2, mlp=64)


def smoke(c: Any) -> Any:
    """Turns any config into a run of two steps, one evaluation and one save at tiny width, on made-up shapes.

    Every stage is kept, with as few steps as that allows: a stage of several has one step.
    """
    c.batch, c.micro_batches = 8, 1
    for tower in ("image_tower", "text_tower"):
        c.model[tower].update(SMOKE_TOWER)
        c.model[tower].update(remat="none", dtype="float32")
    c.model.image_tower.patch = 8
    c.model.text_tower.vocab = 128
    c.model.embed = 16
    if "multimodal" in c.model:
        c.model.multimodal.depth = 1
        c.model.queries = min(c.model.get("queries", 256), 4)
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
    c.log_every_steps = 1
    c.platform = ""
    return c
