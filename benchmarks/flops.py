"""FLOPs of a training step compared with the papers' tables: FLIP's masking, CoCa's captioning, CLIPA's short inputs.

    python benchmarks/flops.py [--json FILE]

XLA's cost analysis counts the whole step (forward, backward, optimiser), with unrolled layers and without
rematerialisation. It reads the lowered program, before optimisation, so nothing is compiled and a full-size model takes
seconds on a laptop. tests/benchmarks/test_flops.py compares it with the compiled program at a small size. At full size
(FLIP L/16, 24 unrolled layers, XLA for CPUs, one minute each) compiled programs have 0.5-0.6 % more FLOPs and the same
ratios (0.517 and 0.281 at batch 16). A multiply-add counts as 2. The batch is 256: the similarities, which grow with
its square, and the optimiser, which does not grow with it, are below 0.1 % of the step.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import bench
import flax.linen as nn
import jax
import jax.numpy as jnp

from vlp.core import config as configs
from vlp.optim import make as optimisers
from vlp.train import stages, state
from vlp.train.step import train_step

CONFIGS = bench.ROOT / "configs"
BATCH = 256
LAION_400M = 400e6  # samples per epoch, the count of FLIP and CLIPA


def load(spec: str, **overrides: Any) -> dict[str, Any]:
    """Returns the config NAME or NAME:ARGUMENT with sections overridden."""
    name, _, arg = spec.partition(":")
    return configs.overlay(configs.load(f"{CONFIGS / name}.py:{arg}"), overrides)


def lower(stage: stages.Stage, batch: int) -> Any:
    """Lowers a stage's training step on abstract arrays, with unrolled layers and without rematerialisation."""
    towers = {
        name: getattr(stage.model, name).clone(scan=False, remat="none")
        for name in ("image_tower", "text_tower")
    }
    model = stage.model.clone(**towers)
    px, length = stage.data.image_px, stage.data.text_len
    shape = jax.ShapeDtypeStruct
    rows = {
        "image": shape((batch, px, px, 3), jnp.uint8),
        "text": shape((batch, length), jnp.int32),
        "mask": shape((batch,), jnp.bool_),
        "index": shape((batch, 2), jnp.uint32),
        "record": shape((batch, 2), jnp.uint32),
    }
    params = nn.unbox(state.abstract_params(model, stage.objective, rows))
    updater = optimisers.make(stage.optim, params)
    start = functools.partial(state.create, updater=updater, teachers={}, method_state=(), step=0)
    step = functools.partial(
        train_step,
        model=model,
        objective=stage.objective,
        updater=updater,
        lr_at=stage.schedule.at(stage.batch, stage.num_steps),
        seed=0,
        num_micro=1,
        teachers={},
    )
    return jax.jit(step).lower(jax.eval_shape(start, params), rows)


def of_stage(stage: stages.Stage, batch: int = BATCH) -> float:
    """Returns the FLOPs per sample of a stage's training step."""
    return lower(stage, batch).cost_analysis()["flops"] / batch


def of_config(config: Mapping[str, Any]) -> list[tuple[stages.Stage, float]]:
    """Returns each stage of a config with its FLOPs per sample."""
    return [(stage, of_stage(stage)) for stage in stages.parse(config)[1]]


def flip() -> list[dict[str, Any]]:
    """FLIP's table 1 (L/16, 224 px, 32 tokens): FLOPs per sample relative to the unmasked step."""
    load_flip = lambda ratio: load(f"flip:keep_ratio={ratio},tune=False")
    flops = {ratio: of_config(load_flip(ratio))[0][1] for ratio in (1, 0.5, 0.25)}

    paper = {1: 1.0, 0.5: 0.52, 0.25: 0.28}
    return [
        row(
            "FLIP L/16",
            f"{1 - keep_ratio:.0%} masked",
            f,
            ratio=f / flops[1],
            paper=paper[keep_ratio],
        )
        for keep_ratio, f in flops.items()
    ]


def coca() -> list[dict[str, Any]]:
    """CoCa's table 8a: base image encoder, 6 + 6 decoder layers.

    The paper does not state the text length (here 64 and 32), nor whether the contrastive-only model has 12 text layers
    or 6 (here both). Its ratio of 1.18 lies between our ratios for 64 and 32 tokens with 12 layers; no ratio with 6
    layers is near, so 12 is more likely. The paper's column is TPU time, which FLOPs predict only roughly: the product
    with the vocabulary, a tenth of the step, runs closer to peak speed than the rest.
    """
    base = load("coca:size=base", model=dict(text_tower=dict(depth=6), decoder=dict(depth=6)))
    contrastive_only = dict(name="clip", keep_ratio=1.0)
    no_captions = dict(queries=0, cascade=False)
    variants = {
        "contrastive only, 12 text layers": dict(
            model=dict(text_tower=dict(depth=12), poolers=no_captions), objective=contrastive_only
        ),
        "contrastive only, 6 text layers": dict(
            model=dict(poolers=no_captions), objective=contrastive_only
        ),
        "captioning only": dict(
            model=dict(embed=0, text_tower=dict(pool="none")),
            objective=dict(name="cap", keep_ratio=1.0),
            evals=dict(retrieval=dict(name="captions")),
        ),
        "CoCa": {},
    }
    paper = {"contrastive only, 12 text layers": 1.0, "captioning only": 1.17, "CoCa": 1.18}
    out = []
    for length in (64, 32):
        flops = {
            name: of_config(configs.overlay(base, patch | dict(data=dict(text_len=length))))[0][1]
            for name, patch in variants.items()
        }
        base_flops = flops["contrastive only, 12 text layers"]
        out += [
            row(f"CoCa base, {length} tokens", name, f, ratio=f / base_flops, paper=paper.get(name))
            for name, f in flops.items()
        ]
    return out


def clipa() -> list[dict[str, Any]]:
    """CLIPA's stages: FLOPs relative to the same samples at 224 px and 32 tokens, and the papers' A100 hours.

    v1 (arXiv:2305.07017): 6.4 epochs of LAION-400M with short inputs, 0.36 epochs at full size. v2 (arXiv:2306.15658):
    12.8 B samples at 84 px and 8 tokens, then 512 M at 224 px with 30 % masked, then 128 M at 336 px with 40 % masked.
    TFLOP/s per device = total FLOPs / hours. If rows have a similar value, the papers' hours follow the FLOPs.
    """
    v1 = [
        dict(samples=round(6.4 * LAION_400M)),
        dict(samples=round(0.36 * LAION_400M), objective=dict(keep_ratio=1.0)),
    ]
    runs = [  # label, config argument, overrides of each stage, hours
        ("v1 B/16, I50 T16", "size=B/16,image_px=112,text_len=16", v1, 444),
        ("v1 L/16, I17 T16", "size=L/16,image_px=64,text_len=16", v1, 628),
        ("v1 L/16, I37 T8", "size=L/16,image_px=96,text_len=8", v1, 826),
        ("v2 L/14", "size=L/14", [], 4_008),
        ("v2 L/14 + 336 px", "size=L/14,high", [], 4_520),
        ("v2 H/14", "size=H/14", [], 7_776),
        ("v2 H/14 + 336 px", "size=H/14,high", [], 8_640),
        ("v2 G/14", "size=G/14", [], 21_998),
        ("v2 G/14 + 336 px", "size=G/14,high", [], 23_742),
    ]
    out = []
    for label, arg, patches, hours in runs:
        config = load(f"clipa:{arg}")
        for section, patch in zip(config["stages"], patches):
            section.update(patch)
        found = of_config(config)
        full = of_stage(
            dataclasses.replace(
                found[1][0], objective=dataclasses.replace(found[1][0].objective, keep_ratio=1.0)
            )
        )
        total = sum(f * stage.samples for stage, f in found)
        for stage, f in found:
            share = f * stage.samples / total
            what = f"{stage.name}: {stage.data.image_px} px, {stage.data.text_len} tokens"
            out.append(row(f"CLIPA {label}", what, f, ratio=f / full, share=share))
        samples = sum(stage.samples for stage, _ in found)
        out.append(
            row(
                f"CLIPA {label}",
                "all stages",
                total / samples,
                ratio=total / samples / full,
                total_flops=total,
                paper_hours=hours,
                tflops_per_sec=total / hours / 3600 / 1e12,
            )
        )
    return out


def row(model: str, what: str, flops: float, **more: float | None) -> dict[str, Any]:
    return dict(model=model, what=what, gflops_per_sample=flops / 1e9, **more)


def table(rows: list[dict[str, Any]]) -> str:
    columns = {
        "gflops_per_sample": ("GFLOP/sample", "{:.1f}"),
        "ratio": ("ratio", "{:.3f}"),
        "paper": ("paper", "{:.2f}"),
        "share": ("share", "{:.2f}"),
        "total_flops": ("total FLOP", "{:.2e}"),
        "paper_hours": ("paper, h", "{:,.0f}"),
        "tflops_per_sec": ("TFLOP/s", "{:.0f}"),
    }
    lines = ["| model | what | " + " | ".join(head for head, _ in columns.values()) + " |"]
    lines.append("|" + "---|" * (2 + len(columns)))
    for r in rows:
        cells = [
            "" if r.get(key) is None else form.format(r[key]) for key, (_, form) in columns.items()
        ]
        lines.append(f"| {r['model']} | {r['what']} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    args = bench.options(bench.parser(__doc__))
    rows = flip() + coca() + clipa()
    print(table(rows))
    bench.save(args.json, rows)


if __name__ == "__main__":
    bench.run(main)
