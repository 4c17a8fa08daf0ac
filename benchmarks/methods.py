"""The methods side by side on the emoji data: same towers, same number of samples, one table.

    python benchmarks/methods.py --data data/emoji --workdir runs/methods --json methods.json

Each row is configs/coca_emoji.py with overrides, trained with `vlp train`'s loop in its own workdir. Finished runs are
skipped and interrupted ones resumed. Recall is on the test split (200 emoji held out with all their variants, chance
0.5 % at rank 1), skin tone on six balanced classes (chance 16.7 %). FLOPs are XLA's count of the lowered training step
(forward, backward, update), before the compiler's optimisations. Minutes are those of training;
core-minutes are minutes times busy cores, which other work on the machine changes less.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import logging
import pathlib
import re
import statistics
import sys
from collections.abc import Mapping
from typing import Any

import bench
import jax

from vlp.cli.main import start_jax
from vlp.core import check, config, mesh
from vlp.runtime import workdir
from vlp.train import build as builds
from vlp.train import loop, stages

ROOT = bench.ROOT

METRICS = ("i2t/R@1", "i2t/R@10", "t2i/R@1", "t2i/R@10", "skin_tone/accuracy")
TUNED = 1 / 15  # share of the steps that tune on whole images, as in the demo
TUNE_LR = 2e-4


@dataclasses.dataclass(frozen=True)
class Method:
    """A row: overrides of the demo's config.

    objective: of all stages. first: overrides of the first stage, which a tuning stage follows (None: one stage).
    model: replaces the demo's model section; its towers have the same sizes.
    """

    objective: Mapping[str, Any]
    first: Mapping[str, Any] | None = None
    patch: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    model: Mapping[str, Any] | None = None


TOWER = {"width": 128, "heads": 4, "scan": False}
MAMMUT = {  # its one text decoder has the depth of the demo's text tower
    "name": "two_tower",
    "image_tower": {"patch": 8, "depth": 4, "pool": "mean", **TOWER},
    "text_tower": {"vocab": 1500, "depth": 2, "pool": "norm_mean", "causal": False, **TOWER},
    "embed": 128,
    "decoder": {},
}


CLIP = {"name": "clip", "keep_ratio": 1.0}
COCA = {
    "name": "coca",
    "caption_weight": 0.5,
    "keep_ratio": 1.0,
}  # the demo's weight, not the paper's 2
METHODS = {
    "CLIP": Method(CLIP),
    # Zhai et al. 2023, §3.2: scale 10 and bias -10 at the start.
    "SigLIP": Method({"name": "siglip"}, patch={"model": {"scale": 10.0, "bias": -10.0}}),
    "CoCa": Method(COCA),
    "MaMMUT": Method({"name": "mammut"}, model=MAMMUT),
    "FLIP 50 %": Method(CLIP | {"keep_ratio": 0.5}),
    "FLIP 50 % + tuning": Method(CLIP, {"objective": {"keep_ratio": 0.5}}),
    "FLIP 75 %": Method(CLIP | {"keep_ratio": 0.25}),
    "FLIP 75 % + tuning": Method(CLIP, {"objective": {"keep_ratio": 0.25}}),
    "CLIPA": Method(CLIP, {"data": {"image_px": 32, "text_len": 8}}),
    "CoCa 50 % + tuning (demo)": Method(COCA, {"objective": {"keep_ratio": 0.5}}),
}
DEMO = list(METHODS)[-1]


def build(method: Method, data: str, seed: int, steps: int, smoke: bool = False) -> dict[str, Any]:
    """The config of one run: the demo's, with the method laid over it."""
    demo = f"{ROOT}/configs/coca_emoji.py:path={data},seed={seed},smoke={smoke}"
    base = config.load(demo)
    base["evals"] = {name: base["evals"][name] for name in ("retrieval", "skin_tone")}
    base |= {"objective": dict(method.objective), "name": "method"}
    if method.model is not None:
        base["model"] = copy.deepcopy(dict(method.model))
    base = config.overlay(base, method.patch)
    tuned = round(TUNED * steps)
    if method.first is None:
        return base | {"stages": [{"name": "whole", "steps": steps}]}
    return base | {
        "stages": [
            {"name": "first", "steps": steps - tuned, **copy.deepcopy(dict(method.first))},
            {"name": "tuned", "steps": tuned, "schedule": {"lr": TUNE_LR}},
        ]
    }


def flops(resolved: Mapping[str, Any]) -> tuple[float, int]:
    """FLOPs of the whole run, and its samples."""
    settings, built = stages.parse(resolved)
    device_mesh = mesh.make(settings.mesh, jax.devices()[:1])
    total = 0.0
    with jax.set_mesh(device_mesh):
        for stage in built:
            ready = builds.prepare(stage, settings, device_mesh)
            batch = builds.abstract_batch(stage, device_mesh)
            lowered = ready.step.lower(ready.abstract, batch)
            total += lowered.cost_analysis()["flops"] * stage.num_steps
    return total, built[-1].end_samples


def minutes(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Time of the training steps, from the logged rates: by the clock, and of the cores that were busy."""
    out, before = {"minutes": 0.0, "core_minutes": 0.0}, 0
    for row in rows:
        if row["kind"] == "train":
            took = (row["samples"] - before) / row["time/examples_per_s"] / 60
            out["minutes"] += took
            out["core_minutes"] += took * row["time/host_cores"]
            before = row["samples"]
    return out


def measure(directory: pathlib.Path) -> dict[str, float]:
    """A finished run's last evaluations, and its minutes."""
    rows = workdir.read(directory / "metrics.jsonl")
    out = minutes(rows)
    for row in rows:
        if row["kind"] == "eval":
            prefix = "" if row["eval"] == "retrieval" else f"{row['eval']}/"
            out |= {f"{prefix}{k}": v for k, v in row.items() if f"{prefix}{k}" in METRICS}
    return out


def main(argv: list[str] | None = None) -> int:
    parser = bench.parser(__doc__)
    parser.add_argument("--data", default="data/emoji", help="of `vlp data emoji`")
    parser.add_argument("--workdir", default="runs/methods", help="each run has a folder in it")
    parser.add_argument("--steps", type=int, default=600, help="of each run, of 128 samples")
    parser.add_argument("--seeds", type=int, default=1, help="runs of each method")
    parser.add_argument("--demo-seeds", type=int, default=3, help="runs of the demo's recipe")
    parser.add_argument("--only", default="", help="methods, by comma (default: all)")
    parser.add_argument("--smoke", action="store_true", help="tiny towers and made-up shapes")
    args = bench.options(parser, argv=argv)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    chosen = [m.strip() for m in args.only.split(",") if m.strip()] if args.only else list(METHODS)
    start_jax()
    try:
        for name in chosen:
            if name not in METHODS:
                raise check.unknown("--only", name, METHODS)
        if args.steps < 15:
            raise check.error("--steps", args.steps, "15 or more", "raise it")
        table = []
        for name in chosen:
            row = compare(name, args)
            table.append(row)
            print(
                line(row) if "flops" in row else f"{name:28s} left out: {row['left_out']}",
                flush=True,
            )
            bench.save(args.json, table)
    except check.UserError as error:
        print(f"methods: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 75
    print("\n" + HEAD + "\n" + "\n".join(line(row) for row in table if "flops" in row))
    return 0


def compare(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """One row of the table: FLOPs, and the mean and spread (standard deviation) of each metric over the seeds."""
    method, found = METHODS[name], []
    seeds = max(args.seeds, args.demo_seeds) if name == DEMO else args.seeds
    try:
        total, samples = flops(build(method, args.data, 0, args.steps, args.smoke))
    except check.UserError as error:
        if "config.objective.name" not in str(error):
            raise
        return {"method": name, "left_out": str(error)}  # a method that this version does not have
    for seed in range(seeds):
        slug = re.sub("[^a-z0-9]+", "_", name.lower()).strip("_")
        directory = pathlib.Path(args.workdir) / f"{slug}_steps{args.steps}_seed{seed}"
        if loop.run(build(method, args.data, seed, args.steps, args.smoke), directory):
            raise KeyboardInterrupt
        found.append(measure(directory))
    row: dict[str, Any] = {"method": name, "seeds": seeds, "samples": samples}
    row |= {"flops": total, "flops_per_sample": total / samples}
    for key in (*METRICS, "minutes", "core_minutes"):
        values = [run[key] for run in found]
        row[key] = statistics.mean(values)
        row[f"{key} spread"] = statistics.stdev(values) if seeds > 1 else None
    return row


COLUMNS = (
    "method", "i2t R@1", "i2t R@10", "t2i R@1", "t2i R@10", "skin tone", "MFLOP/sample", "TFLOP",
    "minutes", "core-minutes", "seeds",
)  # fmt: skip
HEAD = f"| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}"


def line(row: Mapping[str, Any]) -> str:
    """The row of a Markdown table: percentages, with ± where there are several seeds."""
    cells = [row["method"]]
    for key in METRICS:
        spread = row[f"{key} spread"]
        cells.append(
            f"{100 * row[key]:.1f}" + (f" ± {100 * spread:.1f}" if spread is not None else "")
        )
    cells += [f"{row['flops_per_sample'] / 1e6:.0f}", f"{row['flops'] / 1e12:.1f}"]
    cells += [f"{row['minutes']:.1f}", f"{row['core_minutes']:.1f}", str(row["seeds"])]
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    bench.run(main)
