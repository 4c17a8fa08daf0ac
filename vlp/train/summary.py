"""What a config amounts to: parameters by part of the model, and the stages in samples and steps."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

import jax

from vlp.core import mesh as meshes
from vlp.core import tree
from vlp.ops import statistics
from vlp.train.build import StagePlan, assemble, trace
from vlp.train.stages import parse


def stages(config: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One flat row per stage: name, batch, steps, samples, and parameters by group (`parameters/image` …)."""
    rows = []
    settings, built = parse(config)
    single = dataclasses.replace(settings, mesh=meshes.MeshShape())
    mesh = meshes.make(single.mesh, devices=jax.devices("cpu")[:1])
    for stage in built:
        with jax.set_mesh(mesh):
            plan = assemble(stage, single, mesh)
            trace(plan)  # refuses what training would refuse
        rows.append(row(plan))
    return rows


def row(plan: StagePlan) -> dict[str, Any]:
    """A stage's length, sizes and parameters by group, flat."""
    stage, counts = plan.stage, parameters(plan.stage.model, plan.abstract.params)
    return {
        "stage": stage.name,
        "batch": stage.batch,
        "steps": stage.num_steps,
        "samples": stage.num_steps * stage.batch,
        "image_px": stage.data.image_px,
        "text_len": stage.data.text_len,
        **{f"parameters/{k}": v for k, v in counts.items()},
    }


def parameters(model: Any, params: Any) -> dict[str, int]:
    """Parameters (arrays or shapes) of each of the model's groups (first match counts), and in all.

    A model without `groups`, and parameters that no group has, count as "other". Running statistics do not count.
    """
    groups = {**getattr(model, "groups", {}), "other": ".*"}
    counts = dict.fromkeys(groups, 0)
    leaves = {k: v for k, v in tree.named(params).items() if not statistics.is_slot(k)}
    for name, leaf in leaves.items():
        group = next(g for g, pattern in groups.items() if re.fullmatch(pattern, name))
        counts[group] += tree.size(leaf)
    if not counts["other"]:
        del counts["other"]
    if {"image", "decoder"} <= counts.keys():  # what CoCa's table 1 counts
        counts["image + decoder"] = counts["image"] + counts["decoder"]
    return counts | {"total": tree.size(leaves)}


def table(rows: list[dict[str, Any]]) -> str:
    """The plan as text."""
    lines = []
    for row in rows:
        lines.append(
            f"stage {row['stage']}: {row['samples']:,} samples = {row['steps']:,} steps of {row['batch']:,}; "
            f"{row['image_px']} px, {row['text_len']} tokens"
        )
    counts = {
        k.removeprefix("parameters/"): v for k, v in rows[-1].items() if k.startswith("parameters/")
    }
    width = max(map(len, counts))
    lines += [f"  {name:{width}s} {num:>15,d}  {num / 1e6:9.1f} M" for name, num in counts.items()]
    return "\n".join(lines)
