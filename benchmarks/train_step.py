"""Training steps per second compared with open_clip's, alternating on this machine, with equal shapes and dtype.

    python benchmarks/train_step.py --models coca --batch 16 --json rows.json          # CPU, float32
    python benchmarks/train_step.py --models coca-L/14 clip-B/16 --dtype bfloat16 --compile --batch 256   # a GPU
    python benchmarks/train_step.py --rival-python DIR/bin/python   # after benchmarks/input.py --make-env DIR

A step is forward, loss, backward and AdamW without clipping, on synthetic batches in memory. Each side runs in its own
process. On a CPU they alternate, step by step, so that other work on the machine affects both equally, and each waits
until the other's threads sleep. On a GPU one side runs after the other, since both would not fit.
The ratio is the median of the ratios of neighbouring steps. open_clip's AdamW is torch's fused one; --compile is
torch.compile, --mask FLIP's (patch dropout there). FLOPs: matrix products of the forward pass × 3, attention counted
full, nothing for recomputation; MFU where the device's peak is known (vlp.core.chips).
"coca" is the paper's: one MLP in a layer of the multimodal decoder. open_clip's has two; "coca-2mlp" gives ours one of
twice the width, which is the same work.

Where XLA:CPU loses to torch (jaxlib 0.10.2; one core with AVX-512 of a busy machine, in turn, in core-seconds; models
cut to 2 layers a stack, 4 pairs: ratio 0.77 for clip-B/16, 0.80 for coca-2mlp, 0.71 for clip):
 * Matrix products are equal, 85-107 GFLOP/s on either side, but for kernel gradients of wide layers: 0.84 (768 to 3072,
   1,576 tokens) and 0.7 (512 to 49,408). JAX asks for (dy · x)ᵀ there. Those are XLA's.
 * Attention took twice torch's time, as keys and values were transposed number by number; heads now come first
   (vlp.ops.attention), which takes 0.6-0.9 of what it did, forward and backward.
 * The norms of gradients, changes and parameters, which are logged, cost more than AdamW: 148 ms for 25 million
   parameters, 24 ms without them. XLA squares into a new array and copies what it updates in place.
 * Page faults. A step's temporaries are one allocation that is new in every step: 14,500 faults are a third of an
   attention's 100 ms. GLIBC_TUNABLES=glibc.malloc.hugetlb=1 (glibc 2.35 and newer) takes pages of 2 MB: 200 faults.
   torch gains more by it (ratios fell to 0.66, 0.65 and 0.44). A C library that keeps what is freed (mallopt) has none,
   at the price of a resident size that stays at its peak. Neither is set here, nor by `vlp train`.
 * The scan over layers: unrolled (scan=False, used here) a stack took 10 % less; compiling takes longer.
"""

from __future__ import annotations

import argparse
import copy
import functools
import resource
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import bench
import numpy as np

from vlp.core import check


def tower(width: int, depth: int, heads: int, **more: Any) -> dict[str, Any]:
    return dict(width=width, depth=depth, heads=heads, **more)


def coca(image: dict[str, Any], text: dict[str, Any], embed: int, mlp: int = 0) -> dict[str, Any]:
    image |= dict(pre_norm=True, patch_bias=False)
    text |= dict(vocab=49_408)
    upper = dict(depth=12, mlp=mlp)
    parts = dict(embed=embed, decoder=upper, poolers=dict(queries=256))
    return dict(name="two_tower", image_tower=image, text_tower=text, **parts)


def clip(image: dict[str, Any], text: dict[str, Any]) -> dict[str, Any]:
    image |= dict(pool="cls", pre_norm=True, patch_bias=False)
    text |= dict(vocab=49_408, pool="eos", eos_id=49_407)
    return dict(name="two_tower", image_tower=image, text_tower=text, embed=text["width"])


def siglip() -> dict[str, Any]:
    text = tower(768, 12, 12, vocab=32_000, pool="last", causal=False, attend_padding=True)
    image = tower(768, 12, 12, patch=16, pool="map")
    joint = dict(embed=768, scale=10.0, bias=-10.0, project_image=False, text_bias=True)
    return dict(name="two_tower", image_tower=image, text_tower=text) | joint


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
    "coca-B/16": (
        "coca_ViT-B-32",  # of open_clip, with the patches of the name
        coca(tower(768, 12, 12, patch=16), tower(512, 12, 8), 512),
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
    "clip-L/14": (
        "ViT-L-14",
        clip(tower(1024, 24, 16, patch=14), tower(768, 12, 12)),
        dict(name="clip"),
        77,
    ),
    "siglip": ("ViT-B-16-SigLIP", siglip(), dict(name="siglip"), 64),
}
IMAGE_PX = 224


def main() -> None:
    parser = bench.parser(__doc__)
    parser.add_argument("--models", nargs="+", default=["coca"], choices=MODELS)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--mask", type=float, nargs="+", default=[0.0], help="patches dropped")
    parser.add_argument("--repeats", type=int, default=5, help="turns of each side")
    parser.add_argument("--steps", type=int, default=0, help="of a turn (default: 1; 10 on a card)")
    parser.add_argument("--depth", type=int, default=0, help="layers of every stack, for a trial")
    parser.add_argument("--smoke", action="store_true", help="only ours, at tiny size, for a test")
    parser.add_argument("--scan", action="store_true", help="layers scanned, not unrolled")
    parser.add_argument("--remat", default="none")
    parser.add_argument("--attention", default="auto", help="kernel of our image tower")
    parser.add_argument("--compile", action="store_true", help="torch.compile")
    parser.add_argument("--alone", action="store_true", help="without open_clip")
    parser.add_argument("--rival-python", default=sys.executable, metavar="FILE", help=RIVAL)
    parser.add_argument("--serve", default="", help=argparse.SUPPRESS)
    args = bench.options(parser, "depth", "steps")
    if args.serve:
        return Side(args.serve).serve()
    if not all(0 <= mask < 1 for mask in args.mask):
        raise check.error("--mask", args.mask, "shares of 0 or more, below 1", "change it")
    sides = ["vlp"] if args.alone or args.smoke else ["vlp", "open_clip"]
    if "open_clip" in sides:
        check_rival(args.rival_python)
        if args.depth and "siglip" in args.models:
            raise check.error(
                "--depth", "siglip, whose tower timm makes", "another", "leave it out"
            )
    rows = []
    for model in args.models:
        for mask in args.mask:
            keys = ("batch", "dtype", "depth", "smoke", "scan", "remat", "attention", "compile")
            job = {"model": model, "mask": mask} | {key: getattr(args, key) for key in keys}
            rows += measure(sides, job, args.repeats, args.steps, args.rival_python)
            print(bench.table(rows[-len(sides) :], COLUMNS), flush=True)
    if len(rows) > len(sides):
        print("\n" + bench.table(rows, COLUMNS))
    bench.save(args.json, rows)


RIVAL = "of an environment with torch, open_clip_torch and timm (default: this one)"
COLUMNS = {
    "model": ("model", ""), "impl": ("impl", ""), "mask": ("mask", ""), "batch": ("batch", ""),
    "step_s": ("s/step", ".4f"), "min_s": ("best", ".4f"), "examples_per_s": ("ex/s", ".1f"),
    "gflops_per_example": ("GFLOP/ex", ".1f"), "tflops_per_s": ("TFLOP/s", ".3f"),
    "mfu": ("MFU", ".3f"), "peak_gb": ("peak GB", ".2f"), "cpu_s": ("core-s", ".4f"),
    "ratio": ("ratio", ".3f"), "cpu_ratio": ("of core-s", ".3f"),
}  # fmt: skip


def check_rival(python: str) -> None:
    """Raises UserError unless the interpreter has open_clip."""
    if lacks := ", ".join(bench.missing_in(python, ("torch", "open_clip", "timm"))):
        got = f"{python} without {lacks}"
        do = "python benchmarks/input.py --make-env DIR and name DIR/bin/python, or write --alone"
        raise check.error("--rival-python", got, "torch, open_clip and timm", do)


def measure(
    sides: list[str],
    job: dict[str, Any],
    repeats: int,
    steps: int = 0,
    rival: str = sys.executable,
    secs: float = 3600,
) -> list[bench.Row]:
    """A row for each side; with two, the first's ratio. Raises bench.Failed, also if it takes longer than `secs`."""
    ends = time.monotonic() + secs
    found: dict[str, dict[str, Any]] = {}
    workers: dict[str, bench.Worker] = {}
    try:
        for side in sides:
            python = rival if side == "open_clip" else sys.executable
            workers[side] = bench.Worker(__file__, "--serve", side, python=python)
            found[side] = workers[side].ask(max(ends - time.monotonic(), 1), job=job)
            if found[side]["device"] != "cpu":
                found[side] |= turns(workers, [side], repeats, steps or 10, ends)[side]
                found[side] |= workers[side].ask()
                workers.pop(side).close()
        for side, taken in turns(workers, list(workers), repeats, steps or 1, ends).items():
            found[side] |= taken | workers[side].ask()
    finally:
        for worker in workers.values():
            worker.close()
    return [row(job, side, sides, found) for side in sides]


def turns(
    workers: dict[str, bench.Worker], sides: list[str], repeats: int, steps: int, ends: float
) -> dict[str, dict[str, Any]]:
    """Seconds of a step in each turn of each side, by the clock and of its cores, but for the first two."""
    taken: dict[str, dict[str, Any]] = {side: {"secs": [], "cpu_secs": []} for side in sides}
    for turn in range(repeats + 2 if sides else 0):
        for side in sides:
            time.sleep(REST_SECS if len(sides) > 1 else 0)
            found = workers[side].ask(max(ends - time.monotonic(), 1), steps=steps if turn else 1)
            for key, values in taken[side].items():
                values += [found[key]] if turn >= 2 else []
    return taken


REST_SECS = 0.3  # OpenMP's threads spin for 0.2 s after their last work


def row(job: dict[str, Any], side: str, sides: list[str], found: dict[str, Any]) -> bench.Row:
    """A row of the table and of the file."""
    this = found[side]
    median = statistics.median(this["secs"])
    rate = this["flops"] * job["batch"] / median
    out = {"impl": side, **job, "device": this["device"], "versions": this["versions"]}
    out |= {"step_s": median, "min_s": min(this["secs"])}
    out |= {"cpu_s": statistics.median(this["cpu_secs"]), "examples_per_s": job["batch"] / median}
    out |= {"gflops_per_example": this["flops"] / 1e9, "tflops_per_s": rate / 1e12}
    out |= {"mfu": mfu(rate, this["device"]) if job["dtype"] == "bfloat16" else None}
    out |= {"peak_gb": this.get("peak_gb"), "build_s": this["build_s"]}
    for key, times in (("ratio", "secs"), ("cpu_ratio", "cpu_secs")):
        first = side == sides[0] and len(sides) == 2
        pairs = zip(found[sides[-1]][times], this[times], strict=True)
        out[key] = statistics.median(them / us for them, us in pairs) if first else None
    return out


class Side:
    """Runs one side in its own process: builds the model, runs steps, reports its memory."""

    def __init__(self, name: str):
        self._build = {"vlp": ours, "open_clip": theirs}[name]

    def serve(self) -> None:
        bench.serve(self.answer)

    def answer(self, job: dict[str, Any] | None = None, steps: int = 0) -> dict[str, Any]:
        if job is not None:
            began = time.monotonic()
            self._step, self._memory, about = self._build(argparse.Namespace(**job))
            return about | {"build_s": round(time.monotonic() - began, 1)}
        if steps:
            wall, cpu = time.perf_counter(), time.process_time()
            loss = float([self._step() for _ in range(steps)][-1])  # waits for the device
            wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
            return {"secs": wall / steps, "cpu_secs": cpu / steps, "loss": loss}
        return {"peak_gb": self._memory()}


def mfu(flops_per_s: float, device: str) -> float | None:
    if device == "cpu":
        return None
    from vlp.core import chips

    return chips.mfu(flops_per_s, device)


Built = tuple[Callable[[], Any], Callable[[], float | None], dict[str, Any]]


def ours(job: argparse.Namespace) -> Built:
    """One step of vlp.train.step, its peak memory in GB, and about it: FLOPs of an example, device, versions."""
    import jax
    import jax.numpy as jnp

    from vlp.core import config
    from vlp.core import flops as counts
    from vlp.core import mesh as meshes
    from vlp.core.types import Apply, Ctx
    from vlp.models import MODELS as KINDS
    from vlp.objectives import OBJECTIVES
    from vlp.optim import make as optimisers
    from vlp.optim.schedules import Schedule
    from vlp.train import state as states
    from vlp.train.step import train_step

    _, section, objective, length = MODELS[job.model]
    compute = dict(dtype=job.dtype, activation="gelu_exact", scan=job.scan, remat=job.remat)
    compute |= dict(depth=job.depth) if job.depth else {}
    compute |= dict(width=32, depth=1, heads=2, mlp=64) if job.smoke else {}
    section = config.overlay(section, dict(image_tower=compute, text_tower=compute))
    if job.smoke:
        small = dict(vocab=512) | (dict(eos_id=511) if "eos_id" in section["text_tower"] else {})
        section = config.overlay(section, dict(text_tower=small))
    depth = 1 if job.smoke else job.depth
    image_px = 4 * section["image_tower"]["patch"] if job.smoke else IMAGE_PX
    section = config.overlay(section, dict(image_tower=dict(attention=job.attention)))
    if depth and "decoder" in section:
        section = config.overlay(section, dict(decoder=dict(depth=depth)))
    model = config.build_named(KINDS, section, "model")
    loss = config.build_named(OBJECTIVES, dict(keep_ratio=1 - job.mask, **objective), "objective")
    shapes = {
        "image": jax.ShapeDtypeStruct((job.batch, image_px, image_px, 3), jnp.uint8),
        "text": jax.ShapeDtypeStruct((job.batch, length), jnp.int32),
        "index": jax.ShapeDtypeStruct((job.batch, 2), jnp.uint32),
    }
    mesh = meshes.make(meshes.MeshShape(), jax.devices()[:1])
    params = states.init_params(model, loss, shapes, 0, mesh)
    updater = optimisers.make(optimisers.Optim(clip_norm=None), params)
    start = functools.partial(states.create, updater=updater, teachers={}, method_state=(), step=0)
    state = jax.jit(start)(params)
    rng = np.random.default_rng(0)
    text = rng.integers(3, model.text_tower.vocab - 1, (job.batch, length))
    text[:, -1] = model.text_tower.eos_id
    index = np.stack([np.zeros(job.batch), np.arange(job.batch)], axis=1)
    batch = jax.device_put({
        "image": rng.integers(0, 256, (job.batch, image_px, image_px, 3)).astype(np.uint8),
        "text": text.astype(np.int32),
        "index": index.astype(np.uint32),
    })  # fmt: skip

    def forward(params: Any) -> Any:
        return loss(Ctx(Apply(model, params), batch, seed=jax.random.key(0)))

    flops = 3 * counts.of(forward, params) / job.batch
    step = functools.partial(
        train_step,
        model=model,
        objective=loss,
        updater=updater,
        lr_at=Schedule(lr=1e-3).at(job.batch, 1000),
        seed=0,
    )
    compiled = jax.jit(step, donate_argnums=0).lower(state, batch).compile()

    def run() -> jax.Array:
        nonlocal state
        state, metrics = compiled(state, batch)
        return metrics["loss"]

    def memory() -> float | None:
        stats = jax.devices()[0].memory_stats() or {}
        return resident_gb() if cpu else stats.get("peak_bytes_in_use", 0) / 1e9 or None

    cpu = jax.default_backend() == "cpu"
    about = {"flops": flops, "device": jax.devices()[0].device_kind}
    return run, memory, about | {"versions": f"jax {jax.__version__}"}


def resident_gb() -> float:
    """The most memory that this process had."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def theirs(job: argparse.Namespace) -> Built:
    """The same of open_clip."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    bench.allow_any_torchvision()
    import open_clip
    from open_clip import factory
    from open_clip.loss import ClipLoss, CoCaLoss, SigLipLoss

    theirs_name, section, _, length = MODELS[job.model]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    whole = copy.deepcopy(factory.get_model_config(theirs_name))
    if "patch_size" in whole["vision_cfg"]:
        whole["vision_cfg"]["patch_size"] = section["image_tower"]["patch"]
    for part in ("vision_cfg", "text_cfg", "multimodal_cfg"):
        if job.depth and part in whole:
            whole[part]["layers"] = job.depth
    factory._MODEL_CONFIGS["trial"] = whole
    drop = job.mask or None
    model = open_clip.create_model("trial", device=device, force_patch_dropout=drop)
    model.train()
    adamw = dict(lr=1e-3, betas=(0.9, 0.95), weight_decay=0.2, fused=True)
    optimizer = torch.optim.AdamW(model.parameters(), **adamw)
    images = torch.randn(job.batch, 3, IMAGE_PX, IMAGE_PX, device=device)
    vocab = section["text_tower"]["vocab"]
    text = torch.randint(3, vocab - 1, (job.batch, length), device=device)
    text[:, -1] = vocab - 1
    coca_loss, clip_loss, siglip_loss = CoCaLoss(2.0, 1.0), ClipLoss(), SigLipLoss()
    call = torch.compile(model) if job.compile else model
    half = functools.partial(
        torch.autocast, device, torch.bfloat16, enabled=job.dtype == "bfloat16"
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
    flops = 3 * counter.get_total_flops() / job.batch

    def run() -> Any:
        optimizer.zero_grad()
        loss = forward(call)
        loss.backward()
        optimizer.step()
        return loss.detach()

    cuda = device == "cuda"
    memory = lambda: torch.cuda.max_memory_allocated() / 1e9 if cuda else resident_gb()
    about = {"flops": flops, "device": torch.cuda.get_device_name() if cuda else "cpu"}
    versions = f"torch {torch.__version__}, open_clip {open_clip.__version__}"
    return run, memory, about | {"versions": versions}


if __name__ == "__main__":
    bench.run(main)
