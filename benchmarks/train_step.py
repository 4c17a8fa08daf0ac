"""Training steps per second beside open_clip's, on this machine: same shapes, same type, same work, in turn.

    python benchmarks/train_step.py --models coca --batch 16 --json rows.json          # CPU, float32
    python benchmarks/train_step.py --models coca-L/14 clip-B/16 --dtype bfloat16 --compile --batch 256   # a GPU

A step is forward, loss, backward and AdamW without clipping, on made-up batches that are already in memory. Both run
in one process, one step each in turn; the ratio is the median of the ratios of neighbouring steps. open_clip's AdamW is
torch's fused one; --compile is torch.compile, --mask FLIP's (patch dropout there). FLOPs: matrix products of the
forward pass × 3, attention counted full, nothing for recomputation; MFU where the device's peak is known
(vlp.core.chips).
"coca" is the paper's: one MLP in a layer of the multimodal decoder. open_clip's has two; "coca-2mlp" gives ours one of
twice the width, which is the same work.

Where XLA:CPU loses to torch (jaxlib 0.10.2, 2 cores with AVX2, CoCa cut to 2 layers a stack, profiled op by op
on a busy machine, single runs):
 * Page faults. A step's temporaries are one allocation that is new in every step: 65,536 faults and 0.2 s of system
   time for each 256 MB. A C library that keeps what is freed (mallopt) has none, at the price of a resident size that
   stays at its peak; it is not set here, nor by `vlp train`.
 * Kernel gradients. JAX asks for (dy · x)ᵀ, which XLA multiplies with Eigen at 20-29 GFLOP/s a core for layers that
   widen; x · dy ran at 49-75. For layers that narrow it was the other way about, so JAX's form stays.
 * The scan over layers: unrolled (scan=False, used here) a stack took 10 % less; compiling takes longer.
 * The pooler's queries were projected once per example (mended).
"""

from __future__ import annotations

import argparse
import functools
import json
import pathlib
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from vlp.core import check


def tower(width: int, depth: int, heads: int, **more: Any) -> dict[str, Any]:
    return dict(width=width, depth=depth, heads=heads, **more)


def coca(image: dict[str, Any], text: dict[str, Any], embed: int, mlp: int = 0) -> dict[str, Any]:
    image |= dict(pre_norm=True, patch_bias=False)
    text |= dict(vocab=49_408)
    upper = dict(depth=12, mlp=mlp)
    return dict(name="captioner", image_tower=image, text_tower=text, multimodal=upper, embed=embed)


def clip(image: dict[str, Any], text: dict[str, Any]) -> dict[str, Any]:
    image |= dict(pool="cls", pre_norm=True, patch_bias=False)
    text |= dict(vocab=49_408, pool="eos", eos_id=49_407)
    return dict(name="dual", image_tower=image, text_tower=text, embed=text["width"])


def siglip() -> dict[str, Any]:
    text = tower(768, 12, 12, vocab=32_000, pool="last", causal=False, see_pads=True)
    image = tower(768, 12, 12, patch=16, pool="map")
    joint = dict(embed=768, scale=10.0, bias=-10.0, project_image=False, text_bias=True)
    return dict(name="dual", image_tower=image, text_tower=text) | joint


# Name: open_clip's model, our model's section, our objective's, tokens of a text.
MODELS: dict[str, tuple[str, dict[str, Any], dict[str, Any], int]] = {
    "coca": (
        "coca_ViT-B-32",
        coca(tower(768, 12, 12, patch=32), tower(512, 12, 8), 512),
        dict(name="coca", contrastive_weight=0.5),
        76,
    ),
    "coca-2mlp": (
        "coca_ViT-B-32",
        coca(tower(768, 12, 12, patch=32), tower(512, 12, 8), 512, mlp=4096),
        dict(name="coca", contrastive_weight=0.5),
        76,
    ),
    "coca-L/14": (
        "coca_ViT-L-14",
        coca(tower(1024, 24, 16, patch=14), tower(768, 12, 12), 768),
        dict(name="coca", contrastive_weight=0.5),
        76,
    ),
    "clip": (
        "ViT-B-32",
        clip(tower(768, 12, 12, patch=32), tower(512, 12, 8)),
        dict(name="clip"),
        77,
    ),
    "clip-B/16": (
        "ViT-B-16",
        clip(tower(768, 12, 12, patch=16), tower(512, 12, 8)),
        dict(name="clip"),
        77,
    ),
    "siglip": ("ViT-B-16-SigLIP", siglip(), dict(name="siglip"), 64),
}
IMAGE_PX = 224


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--models", nargs="+", default=["coca"], choices=MODELS)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--mask", type=float, nargs="+", default=[0.0], help="patches dropped")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--depth", type=int, default=0, help="layers of every stack, for a trial")
    parser.add_argument("--scan", action="store_true", help="layers scanned, not unrolled")
    parser.add_argument("--remat", default="none")
    parser.add_argument("--compile", action="store_true", help="torch.compile")
    parser.add_argument("--alone", action="store_true", help="without open_clip")
    parser.add_argument("--json", default="", metavar="FILE")
    args = parser.parse_args()
    check.output_file("--json", args.json)
    check.counts(vars(args), "depth")
    rows = [row for name in args.models for mask in args.mask for row in measure(name, mask, args)]
    table(rows)
    if args.json:
        pathlib.Path(args.json).write_text(json.dumps(rows, indent=1) + "\n")


def measure(name: str, mask: float, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Two rows: ours, open_clip's."""
    sides = {"vlp": ours(name, mask, args)}
    if not args.alone:
        sides["open_clip"] = theirs(name, mask, args)
    seconds: dict[str, list[float]] = {side: [] for side in sides}
    for turn in range(args.repeats + 2):  # the first two are not counted
        for side, (step, *_) in sides.items():
            began = time.monotonic()
            step()
            if turn >= 2:
                seconds[side].append(time.monotonic() - began)
    rows = []
    for side, (_, flops, device) in sides.items():
        median = statistics.median(seconds[side])
        row = dict(model=name, impl=side, device=device, batch=args.batch, dtype=args.dtype)
        row |= dict(mask=mask, step_s=median, min_s=min(seconds[side]))
        row |= dict(examples_per_s=args.batch / median, gflops_per_example=flops / 1e9)
        row["tflops_per_s"] = flops * args.batch / median / 1e12
        row["mfu"] = mfu(1e12 * row["tflops_per_s"], device) if args.dtype == "bfloat16" else None
        row["ratio"] = None
        rows.append(row)
    if len(sides) == 2:
        pairs = zip(seconds["open_clip"], seconds["vlp"], strict=True)
        rows[0]["ratio"] = statistics.median(them / us for them, us in pairs)
    return rows


def mfu(flops_per_s: float, device: str) -> float | None:
    if device == "cpu":
        return None
    from vlp.core import chips

    return chips.mfu(flops_per_s, device)


def ours(
    name: str, mask: float, args: argparse.Namespace
) -> tuple[Callable[[], float], float, str]:
    """One step of vlp.train.step as a call, FLOPs of an example, the device's name."""
    import flax.linen as nn
    import jax

    from vlp.core import config
    from vlp.core import flops as counts
    from vlp.core.types import Apply, Ctx
    from vlp.models import MODELS as KINDS
    from vlp.objectives import OBJECTIVES
    from vlp.optim import make as optimisers
    from vlp.optim.schedules import Schedule
    from vlp.train import state as states
    from vlp.train.step import train_step

    _, section, objective, length = MODELS[name]
    compute = dict(dtype=args.dtype, activation="gelu_exact", scan=args.scan, remat=args.remat)
    compute |= dict(depth=args.depth) if args.depth else {}
    section = config.overlay(section, dict(image_tower=compute, text_tower=compute))
    if args.depth and "multimodal" in section:
        section = config.overlay(section, dict(multimodal=dict(depth=args.depth)))
    model = config.build_named(KINDS, section, "model")
    loss = config.build_named(OBJECTIVES, dict(keep=1 - mask, **objective), "objective")
    init = lambda key: nn.unbox(model.init(key, *states._inputs(IMAGE_PX, length))["params"])
    params = jax.jit(init)(jax.random.key(0))
    updater = optimisers.make(optimisers.Optim(clip_norm=None), params)
    start = functools.partial(states.create, updater=updater, teachers={}, extra=(), step=0)
    state = jax.jit(start)(params)
    rng = np.random.default_rng(0)
    text = rng.integers(3, model.text_tower.vocab - 1, (args.batch, length))
    text[:, -1] = model.text_tower.eos_id
    index = np.stack([np.zeros(args.batch), np.arange(args.batch)], axis=1)
    batch = jax.device_put({
        "image": rng.integers(0, 256, (args.batch, IMAGE_PX, IMAGE_PX, 3)).astype(np.uint8),
        "text": text.astype(np.int32),
        "index": index.astype(np.uint32),
    })  # fmt: skip

    def forward(params: Any) -> Any:
        return loss(Ctx(Apply(model, params), batch, seed=jax.random.key(0)))

    flops = 3 * counts.of(forward, params) / args.batch
    step = functools.partial(
        train_step,
        model=model,
        objective=loss,
        updater=updater,
        lr_at=Schedule(lr=1e-3).at(args.batch, 1000),
        seed=0,
    )
    compiled = jax.jit(step, donate_argnums=0).lower(state, batch).compile()

    def run() -> float:
        nonlocal state
        state, metrics = compiled(state, batch)
        return float(metrics["loss"])

    return run, flops, jax.devices()[0].device_kind


def theirs(
    name: str, mask: float, args: argparse.Namespace
) -> tuple[Callable[[], float], float, str]:
    """The same of open_clip."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    try:
        import torchvision  # noqa: F401
    except (ImportError, RuntimeError):  # built for another torch: open_clip needs two names of it
        sys.modules.pop("torchvision", None)
        library = torch.library.Library("torchvision", "DEF")
        for op in ("nms", "qnms"):
            library.define(f"{op}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    import open_clip
    from open_clip import factory
    from open_clip.loss import ClipLoss, CoCaLoss, SigLipLoss

    theirs_name, section, _, length = MODELS[name]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if args.depth:
        patch = {"vision_cfg": {"layers": args.depth}, "text_cfg": {"layers": args.depth}}
        if name.startswith("coca"):
            patch["multimodal_cfg"] = {"layers": args.depth}
        whole = factory.get_model_config(theirs_name)
        cut = {k: v | patch.get(k, {}) if isinstance(v, dict) else v for k, v in whole.items()}
        factory._MODEL_CONFIGS["trial"], theirs_name = cut, "trial"
    drop = mask or None
    model = open_clip.create_model(theirs_name, device=device, force_patch_dropout=drop)
    model.train()
    adamw = dict(lr=1e-3, betas=(0.9, 0.95), weight_decay=0.2, fused=True)
    optimizer = torch.optim.AdamW(model.parameters(), **adamw)
    images = torch.randn(args.batch, 3, IMAGE_PX, IMAGE_PX, device=device)
    vocab = section["text_tower"]["vocab"]
    text = torch.randint(3, vocab - 1, (args.batch, length), device=device)
    text[:, -1] = vocab - 1
    coca_loss, clip_loss, siglip_loss = CoCaLoss(2.0, 1.0), ClipLoss(), SigLipLoss()
    call = torch.compile(model) if args.compile else model
    half = functools.partial(
        torch.autocast, device, torch.bfloat16, enabled=args.dtype == "bfloat16"
    )

    def forward(call: Any) -> Any:
        with half():
            out = call(images, text)
            if isinstance(out, dict):
                zi, zt = out["image_features"], out["text_features"]
                both = coca_loss(zi, zt, out["logits"], out["labels"], out["logit_scale"])
                return both[0] + both[1]
            zi, zt, scale, *bias = out
            return siglip_loss(zi, zt, scale, *bias) if bias else clip_loss(zi, zt, scale)

    with FlopCounterMode(display=False) as counter:
        forward(model)
    flops = 3 * counter.get_total_flops() / args.batch

    def run() -> float:
        optimizer.zero_grad()
        loss = forward(call)
        loss.backward()
        optimizer.step()
        return loss.item()

    kind = torch.cuda.get_device_name() if device == "cuda" else "cpu"
    return run, flops, kind


def table(rows: list[dict[str, Any]]) -> None:
    head = "model impl mask batch s/step min_s ex/s GFLOP/ex TFLOP/s MFU ratio"
    print("".join(f"{h:>11}" for h in head.split()))
    for row in rows:
        cells = [row["model"], row["impl"], row["mask"], row["batch"]]
        keys = ("step_s", "min_s", "examples_per_s", "gflops_per_example", "tflops_per_s")
        cells += [f"{row[key]:.3g}" if row[key] < 100 else f"{row[key]:.1f}" for key in keys]
        cells += ["–" if row[k] is None else f"{row[k]:.3f}" for k in ("mfu", "ratio")]
        print("".join(f"{c:>11}" for c in cells))


if __name__ == "__main__":
    check.run(main)
