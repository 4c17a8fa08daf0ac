"""Checks whether a run fits its devices, and finds settings that make it fit without changing its numbers."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from vlp.core import check as checks
from vlp.core.check import UserError
from vlp.core.chips import CHIPS
from vlp.core.config import overlay, plain
from vlp.plan import compiled, estimate
from vlp.plan.compiled import Target
from vlp.train.stages import parse

SLACK = 1.03  # a candidate with an estimate above this share of the memory is not compiled
GiB = 2**30


def check(
    config: Mapping[str, Any],
    target: Target,
    stage: str = "",
    fast: bool = False,
    alone: bool = False,
) -> list[dict[str, Any]]:
    """Measures the stages of a config on a target.

    Args:
        config: of the run.
        target: the devices.
        stage: name of the only stage to check; "": all.
        fast: estimate, do not compile.
        alone: also measure the loss and an evaluation batch alone.

    Returns:
        A flat row per stage, by `compiled.measure` or `estimate.measure`. A stage that does not fit also has
        `would_fit`: flags that make it fit, "" if none was found.

    Raises:
        UserError: the stage is unknown, or the config does not fit the mesh.
    """
    data: dict[str, Any] = plain(config)
    names = [s.name for s in parse(data)[1]]
    if stage and stage not in names:
        raise checks.unknown("--stage", stage, names)
    rows = []
    for index, name in enumerate(names):
        if not stage or name == stage:
            row = _one(data, index, target, fast, alone)
            if row["fits"] is False:
                row |= _search(data, index, target, fast)
            rows.append(row)
    return rows


def _one(
    config: dict[str, Any], index: int, target: Target, fast: bool, alone: bool = False
) -> dict[str, Any]:
    settings, stages = parse(config)
    plan, mesh = compiled.prepare(stages[index], settings, target)
    times = {"stage": stages[index].name, "samples": stages[index].num_steps * stages[index].batch}
    if not fast:
        row = times | {"how": "compiled"} | compiled.measure(plan, mesh, target)
        return row | (compiled.measure_parts(plan, mesh) if alone and row["fits"] else {})
    return times | {"how": "estimated"} | estimate.measure(plan, mesh, target)


def _search(config: dict[str, Any], index: int, target: Target, fast: bool) -> dict[str, Any]:
    """Tries candidates, cheapest first; returns the flags of the first that fits, with its peak and FLOPs."""
    limit = compiled.usable_bytes(target)
    tried = 0
    for patch, flags in candidates(config, index):
        changed = overlay(config, patch)
        settings, stages = parse(changed)
        try:
            plan, mesh = compiled.prepare(stages[index], settings, target)
        except UserError:
            continue  # for instance, a batch that does not divide
        guess = estimate.peak(plan, mesh).peak_bytes
        if guess > (limit if fast else SLACK * limit):
            continue
        row, tried = _one(changed, index, target, fast), tried + 1
        if row["fits"]:
            keys = ("peak_bytes", "step_flops_per_example", "flops_per_example")
            return {"would_fit": flags, **{f"would_fit/{k}": row[k] for k in keys}}
        if tried == 4:
            break
    return {"would_fit": ""}


def candidates(config: dict[str, Any], index: int) -> Iterator[tuple[dict[str, Any], str]]:
    """Yields patches of a config and their flags, cheapest in FLOPs first. They change memory and time only."""
    stage = parse(config)[1][index]
    towers = [
        f.name
        for f in dataclasses.fields(stage.model)
        if hasattr(getattr(stage.model, f.name), "remat")
    ]
    order: list[dict[str, Any]] = [dict(remat="full")]
    order += [dict(remat="full", micro_batches=k, micro_remat="blocks") for k in (2, 4, 8)]
    order += [dict(remat="full", micro_batches=k, micro_remat="full") for k in (2, 4, 8, 16, 32)]
    for choice in order:
        remat = choice.pop("remat")
        patch: dict[str, Any] = dict(choice)
        patch["model"] = {name: dict(remat=remat) for name in towers}
        at = ""
        if "stages" in config:  # in this stage alone: its own settings override the base
            at = f"stages.{index}."
            patch = {
                "stages": [
                    overlay(s, patch) if i == index else s for i, s in enumerate(config["stages"])
                ]
            }
        flags = [f"--config.{at}model.{name}.remat={remat}" for name in towers]
        flags += [f"--config.{at}{k}={v}" for k, v in choice.items()]
        yield patch, " ".join(flags)


def report(rows: Sequence[Mapping[str, Any]], mfu: float) -> str:
    """Returns the rows as text, with times at the given model FLOPs utilization."""
    return "\n".join(line for row in rows for line in _lines(row, mfu))


def _lines(row: Mapping[str, Any], mfu: float) -> Iterator[str]:
    how = "the compiler's verdict" if row["how"] == "compiled" else "an estimate, nothing compiled"
    yield (
        f"stage {row['stage']} on {row['target']} ({row['chips']} × {row['device']}, {row['mesh']}), batch "
        f"{row['batch']:,}, remat {row['remat']}, micro-batches {row['micro_batches']}: {how}"
    )
    gb = lambda key: f"{row[key] / GiB:10.3f}"
    for key, label in (
        ("param_bytes", "parameters"),
        ("opt_bytes", "optimiser and averages"),
        ("batch_bytes", "batch"),
        ("kept_bytes", "activations kept"),
        ("working_bytes", "working memory"),
        ("peak_bytes", "peak"),
    ):
        if key in row:
            yield f"  {label:24s} {gb(key)} GiB per device"
    limit = row.get("hbm_bytes")
    verdict = {True: "fits", False: "does NOT fit", None: "memory of this device is not known"}
    told = row.get("refusal") or (f"of {limit / GiB:.2f} GiB" if limit else "")
    yield f"  {verdict[row['fits']]}: {told}" if told else f"  {verdict[row['fits']]}"
    if "would_fit" in row:
        yield (
            f"  would fit at {row['would_fit/peak_bytes'] / GiB:.2f} GiB, "
            f"{row['would_fit/step_flops_per_example'] / row['would_fit/flops_per_example']:.2f} × the FLOPs: "
            f"{row['would_fit']}"
            if row["would_fit"]
            else "  no setting that was tried fits: use more chips, a smaller batch or a smaller model"
        )
    for name in ("loss", "eval"):
        if f"{name}_peak_bytes" in row:
            what = {"loss": "the loss alone", "eval": "an evaluation batch"}[name]
            yield f"  {what:24s} {gb(f'{name}_peak_bytes')} GiB"
    model, step, whole = (row[f"{k}flops_per_example"] for k in ("", "step_", "unmasked_"))
    yield (
        f"  FLOPs per example {model / 1e9:,.1f} G (unmasked {whole / 1e9:,.1f} G, ×{model / whole:.2f}); "
        f"with rematerialisation {step / 1e9:,.1f} G (×{step / model:.2f})"
    )
    for key, sent in row.items():
        if key.startswith("sent_bytes/"):
            kind = key.split("/")[1]
            yield f"  {kind}: {row[f'collectives/{kind}']:,} per step, {sent / 1e9:.3f} GB sent per device"
    if row["device"] in CHIPS:
        rate = mfu * CHIPS[row["device"]].flops * row["chips"] / model
        hours = row["samples"] / rate / 3600
        yield (
            f"  at {mfu:.0%} MFU: {rate:,.0f} examples/s, {hours:,.1f} hours, "
            f"{hours * row['chips']:,.0f} chip-hours for {row['samples']:,} samples"
        )
    if "compile_s" in row:
        yield f"  compiled in {row['compile_s']:.0f} s"
