"""All GPU checks in one command: kernels and losses against float32, training speed against open_clip, input.

    python benchmarks/gpu.py --json gpu.json          # on a GPU; under 8 minutes on an H100
    python benchmarks/gpu.py --smoke                  # on a CPU: tiny shapes, without open_clip, to test the script

attention   each kernel of vlp.ops.attention, values and gradients, against float32 at the highest precision; its time
loss        the exact contrastive and sigmoid losses and their gradients against the plain ones in float32
loss_cost   time and temporary memory of the contrastive loss and its gradients, compared with the plain one
input       images/s of the training loader, decoding JPEGs of 500 px
train       steps in bfloat16 compared with open_clip's, compiled: examples/s, FLOP/s, MFU and peak memory

Each part runs in its own process with a time limit, and prints its rows as it makes them. A failed part gives a row
with its error; the others continue, and the exit code is 1. A missing kernel or package gives a row with the reason.
Needed: vlp's JAX packages (jax, flax, optax, orbax, jaxtyping, msgpack); torch, timm and open_clip for their rows; the
data packages for the input rate.
"""

from __future__ import annotations

import functools
import pathlib
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import bench
import train_step

from vlp.core import check

NEEDS = ("jax", "flax", "optax", "jaxtyping", "numpy", "msgpack")
# What the rows need beyond that: part → module → wheel.
EXTRAS = {
    "open_clip": {
        "torch": "torch", "torchvision": "torchvision", "timm": "timm", "ftfy": "ftfy", "regex": "regex",
        "open_clip": "open_clip_torch",
    },
    "input": {
        "grain": "grain", "ml_collections": "ml_collections", "clu": "clu", "simplejpeg": "simplejpeg",
        "sentencepiece": "sentencepiece", "array_record": "array_record", "pyarrow": "pyarrow",
        "fsspec": "fsspec", "PIL": "pillow", "tqdm": "tqdm", "absl": "absl-py",
    },
}  # fmt: skip
# Model, batch that fits 80 GB, time limit per side in seconds, which includes compilation.
TRAIN = (
    ("coca-L/14", 64, 90),
    ("clip-L/14", 64, 75),
    ("coca-B/16", 128, 75),
    ("clip-B/16", 128, 60),
)
LIMIT_SECS = {"device": 60, "attention": 90, "loss": 45, "loss_cost": 45, "input": 40}
ATTENTION = {  # name: batch, queries, keys, heads, head size, causal, masked
    "ViT-L/14": (16, 257, 257, 16, 64, False, False),
    "text": (16, 77, 77, 12, 64, True, False),
    "text, padded": (16, 77, 77, 12, 64, True, True),
    "pooler": (16, 256, 257, 8, 96, False, False),
    "B/16 at 384 px": (8, 576, 576, 12, 64, False, False),
}
# Largest relative error (norm of the difference over the norm). A bfloat16 has 8 bits: 2⁻⁹ per rounding, and
# attention rounds a few times. GPUs multiply float32 as TensorFloat-32 (10 bits) by default.
LIMITS = {"bfloat16": 0.02, "float32": 0.005}
COLUMNS = {
    "attention": {
        "what": ("shape", ""), "kernel": ("kernel", ""), "dtype": ("type", ""),
        "error": ("error", ".1e"), "grad_error": ("of gradients", ".1e"), "limit": ("limit", ".0e"),
        "ms": ("ms", ".3f"), "verdict": ("verdict", ""),
    },
    "loss": {
        "what": ("loss", ""), "batch": ("batch", ","), "dtype": ("type", ""), "error": ("error", ".1e"),
        "grad_error": ("of gradients", ".1e"), "limit": ("limit", ".0e"), "verdict": ("verdict", ""),
    },
    "loss_cost": {
        "what": ("loss", ""), "batch": ("batch", ","), "ms": ("ms", ".2f"), "temp_mb": ("temp MB", ",.1f"),
        "verdict": ("verdict", ""),
    },
    "input": {
        "what": ("loader", ""), "cores": ("cores", ""), "images_per_s": ("images/s", ".0f"),
        "images_per_s_per_core": ("a busy core", ".0f"), "verdict": ("verdict", ""),
    },
    "train": {
        "model": ("model", ""), "impl": ("impl", ""), "attention": ("attention", ""), "batch": ("batch", ""),
        "step_s": ("s/step", ".4f"), "examples_per_s": ("ex/s", ".1f"), "tflops_per_s": ("TFLOP/s", ".2f"),
        "mfu": ("MFU", ".3f"), "peak_gb": ("peak GB", ".1f"), "build_s": ("build s", ".0f"),
        "verdict": ("verdict", ""),
    },
}  # fmt: skip


def main() -> int:
    parser = bench.parser(__doc__)
    parser.add_argument("--smoke", action="store_true", help="tiny shapes on any device")
    parser.add_argument("--only", nargs="+", default=list(COLUMNS), choices=COLUMNS, metavar="PART")
    parser.add_argument("--budget-secs", type=int, default=470, help="for all of it")
    parser.add_argument("--no-compile", action="store_true", help="open_clip without torch.compile")
    parser.add_argument("--serve", default="", help=bench.HIDDEN)
    args = bench.options(parser, needs=NEEDS)
    if args.serve:
        bench.serve(functools.partial(answer, args.serve, args.smoke))
        return 0
    absent = missing()
    if wheels := [wheel for part in absent.values() for wheel in part]:
        print(f"bring the wheels of {', '.join(wheels)}: not installed, for {', '.join(absent)}")
    budget = Budget(args.budget_secs)
    device = ask("device", args.smoke, budget)[0]
    if device["verdict"] != "ok":
        raise check.error("JAX", device["verdict"], "a working JAX", "mend the installation")
    if device["platform"] not in ("gpu", "cuda", "rocm") and not args.smoke:
        do = "pip install 'vlp[cuda]', or write --smoke"
        raise check.error("JAX", f"only {device['device']}", "a GPU", do)
    print(f"device: {device['device']}, {device['versions']}", flush=True)
    rows: list[bench.Row] = []
    for part in args.only:
        print(f"\n{part}")
        show = bench.Lines(COLUMNS[part])
        for row in rows_of(part, args, budget, absent):
            rows.append({"part": part, "device": device["device"], **row})
            show(row)
            bench.save(args.json, rows)
    bad = [row for row in rows if row["verdict"].startswith("failed")]
    print(f"\n{len(rows)} rows, {len(bad)} failed, {budget.spent():.0f} s")
    return 1 if bad else 0


class Budget:
    """Seconds for all parts; a part gets its own limit or what is left."""

    def __init__(self, secs: float):
        self._began, self._secs = time.monotonic(), secs

    def spent(self) -> float:
        return time.monotonic() - self._began

    def limit(self, secs: float) -> float:
        return min(secs, self._secs - self.spent())


def missing() -> dict[str, list[str]]:
    """Part → wheels that it lacks."""
    lacks = {part: bench.missing(modules) for part, modules in EXTRAS.items()}
    return {part: [EXTRAS[part][m] for m in modules] for part, modules in lacks.items() if modules}


def rows_of(
    part: str, args: Any, budget: Budget, absent: Mapping[str, list[str]]
) -> Iterator[bench.Row]:
    """A part's rows, each with a verdict: "ok", "skipped: why" or "failed: why"."""
    if part == "train":
        yield from train(args, budget, absent)
    elif part in absent:
        yield {"what": part, "verdict": f"skipped: without {', '.join(absent[part])}"}
    else:
        yield from ask(part, args.smoke, budget)


def ask(part: str, smoke: bool, budget: Budget) -> list[bench.Row]:
    """Runs a part in its own process and yields its rows."""
    limit = budget.limit(LIMIT_SECS[part] * (3 if smoke else 1))
    if limit <= 0:
        return [{"what": part, "verdict": "skipped: the budget is spent"}]
    worker = bench.Worker(__file__, "--serve", part, *(["--smoke"] if smoke else []))
    ends, rows = time.monotonic() + limit, []
    try:
        while row := worker.ask(max(ends - time.monotonic(), 1)):
            rows.append({"verdict": "ok", **row})
    except bench.Failed as error:
        rows.append({"what": part, "verdict": f"failed: {error}"})
    finally:
        worker.close()
    return rows


_rows: list[Iterator[bench.Row]] = []


def answer(part: str, smoke: bool) -> bench.Row:
    """The next row of a part, in its process; {} after the last."""
    if not _rows:
        _rows.append(iter(PARTS[part](smoke)))
    return next(_rows[0], {})


def device(smoke: bool) -> Iterator[bench.Row]:
    """What JAX runs on."""
    import jax

    one = jax.devices()[0]
    yield {
        "what": "device", "platform": one.platform, "device": one.device_kind,
        "versions": f"jax {jax.__version__}",
    }  # fmt: skip


def attention(smoke: bool) -> Iterator[bench.Row]:
    """Kernels against float32."""
    import jax
    import jax.numpy as jnp

    from vlp.ops.attention import attend

    shapes = {k: (2, *v[1:3], 2, 16, *v[5:]) for k, v in ATTENTION.items()} if smoke else ATTENTION
    if smoke:
        shapes = dict(list(shapes.items())[:3])
    for what, (batch, num_q, num_k, heads, size, causal, masked) in shapes.items():
        mask = None
        if masked:  # the last third is padding
            mask = jnp.broadcast_to(jnp.arange(num_k) < 2 * num_k // 3, (batch, num_q, num_k))
        for dtype in ("bfloat16", "float32"):
            lengths = (num_q, num_k, num_k, num_q)
            keys = jax.random.split(jax.random.key(0), 4)
            draws = [
                jax.random.normal(key, (batch, n, heads, size)).astype(dtype)
                for key, n in zip(keys, lengths)
            ]
            args, weight = tuple(draws[:3]), draws[3]
            plain = functools.partial(plain_attention, mask=mask, causal=causal)
            with jax.default_matmul_precision("highest"):
                want = value_and_grads(plain, weight, jnp.float32)(*args)
            for kernel in ("auto", "xla", "cudnn") if dtype == "bfloat16" else ("auto",):
                row = {"what": what, "kernel": kernel, "dtype": dtype, "limit": LIMITS[dtype]}
                fused = functools.partial(attend, mask_BTS=mask, causal=causal, kernel=kernel)
                yield row | against(want, value_and_grads(fused, weight), args, LIMITS[dtype])


def plain_attention(q_BTHK: Any, k_BSHK: Any, v_BSHK: Any, mask: Any, causal: bool) -> Any:
    """Reference attention, computed in the dtype of its arguments."""
    import jax
    import jax.numpy as jnp

    logits_BHTS = jnp.einsum("bthk,bshk->bhts", q_BTHK, k_BSHK) * q_BTHK.shape[-1] ** -0.5
    if mask is not None:
        logits_BHTS = jnp.where(mask[:, None], logits_BHTS, -jnp.inf)
    if causal:
        below = jnp.tril(jnp.ones(logits_BHTS.shape[2:], bool))[None, None]
        logits_BHTS = jnp.where(below, logits_BHTS, -jnp.inf)
    return jnp.einsum("bhts,bshk->bthk", jax.nn.softmax(logits_BHTS), v_BSHK)


def value_and_grads(f: Callable, weight: Any, dtype: Any = None) -> Callable:
    """The function's value and its gradients for the cotangent `weight`, compiled; computed in `dtype`, if given."""
    import jax

    def both(*args: Any) -> Any:
        as_told = [a if dtype is None else a.astype(dtype) for a in args]
        out, back = jax.vjp(f, *as_told)
        return out, back(jax.tree.map(lambda w, o: w.astype(o.dtype), weight, out))

    return jax.jit(both)


def against(want: Any, f: Callable, args: tuple, limit: float) -> bench.Row:
    """Relative errors of a function's value and gradients, and its time; a mistake that it raises is a skip."""
    try:
        got = f(*args)
    except check.UserError as mistake:  # such a kernel is not for this device, type or mask
        return {"verdict": f"skipped: {mistake}"}
    except Exception as error:  # the library's or the compiler's: the others go on
        return {"verdict": f"failed: {type(error).__name__}: {str(error).splitlines()[0][:200]}"}
    errors = [distance(g, w) for g, w in zip(got, want, strict=True)]
    good = all(error <= limit for error in errors)  # a NaN is not
    row = {"error": errors[0], "grad_error": errors[1], "ms": 1e3 * seconds(f, args)}
    return row | {"verdict": "ok" if good else f"failed: an error above {limit:g}"}


def distance(got: Any, want: Any) -> float:
    """The largest relative error among the leaves."""
    import jax
    import numpy as np

    def one(g: Any, w: Any) -> float:
        g, w = np.asarray(g, np.float64), np.asarray(w, np.float64)
        return float(np.linalg.norm(g - w) / max(np.linalg.norm(w), 1e-30))

    found = jax.tree.leaves(jax.tree.map(one, got, want))
    return float(np.max(found))  # NaN if there is one


def seconds(f: Callable, args: tuple, repeats: int = 5) -> float:
    """The best of some runs."""
    import jax

    taken = []
    for _ in range(repeats):
        began = time.perf_counter()
        jax.block_until_ready(f(*args))
        taken.append(time.perf_counter() - began)
    return min(taken)


def losses() -> dict[str, tuple[Callable, Callable]]:
    """Name → ours and the plain one: functions of images, texts and scale; the mean over the batch."""
    import jax
    import jax.numpy as jnp

    from vlp.losses import contrastive

    def softmax(zi: Any, zt: Any, scale: Any) -> Any:
        loss = contrastive.softmax(zi, zt, scale)
        return (loss["i2t"] + loss["t2i"]).mean()

    def plain_softmax(zi: Any, zt: Any, scale: Any) -> Any:
        logits = scale * jnp.einsum("be,ce->bc", zi, zt, preferred_element_type=jnp.float32)
        both = [jax.nn.logsumexp(logits, axis).mean() for axis in (0, 1)]
        return sum(both) - 2 * jnp.diagonal(logits).mean()

    def sigmoid(zi: Any, zt: Any, scale: Any) -> Any:
        return contrastive.sigmoid(zi, zt, scale, jnp.float32(-10))["loss"].mean()

    def plain_sigmoid(zi: Any, zt: Any, scale: Any) -> Any:
        logits = scale * jnp.einsum("be,ce->bc", zi, zt, preferred_element_type=jnp.float32) - 10
        signs = 2 * jnp.eye(zi.shape[0]) - 1
        return -jax.nn.log_sigmoid(signs * logits).sum(1).mean()

    return {"softmax": (softmax, plain_softmax), "sigmoid": (sigmoid, plain_sigmoid)}


def embeddings(batch: int, width: int, dtype: str) -> tuple:
    """Returns unit vectors of pairs with some similarity, and CLIP's largest scale."""
    import jax
    import jax.numpy as jnp

    zi, noise = (jax.random.normal(jax.random.key(i), (batch, width)) for i in range(2))
    unit = lambda z: (z / jnp.linalg.norm(z, axis=1, keepdims=True)).astype(dtype)
    return unit(zi), unit(0.3 * zi + noise), jnp.float32(100 if dtype == "float32" else 50)


def loss(smoke: bool) -> Iterator[bench.Row]:
    """The exact losses against the plain ones."""
    import jax
    import jax.numpy as jnp

    batch, width = (96, 32) if smoke else (8192, 768)
    for dtype in ("bfloat16", "float32"):
        args = embeddings(batch, width, dtype)
        for what, (ours, plain) in losses().items():
            with jax.default_matmul_precision("highest"):
                want = value_and_grads(plain, jnp.ones(()), jnp.float32)(*args)
            row = {"what": what, "batch": batch, "dtype": dtype, "limit": LIMITS[dtype]}
            yield row | against(want, value_and_grads(ours, jnp.ones(())), args, LIMITS[dtype])


def loss_cost(smoke: bool) -> Iterator[bench.Row]:
    """Time and memory of the contrastive loss and its gradients."""
    import jax

    for batch in (128,) if smoke else (8192, 16_384, 32_768, 65_536):
        args = embeddings(batch, 32 if smoke else 768, "bfloat16")
        for what, f in zip(("exact", "plain"), losses()["softmax"], strict=True):
            row = {"what": what, "batch": batch}
            try:
                step = jax.jit(jax.value_and_grad(f, (0, 1, 2))).lower(*args).compile()
                temp = step.memory_analysis().temp_size_in_bytes / bench.MB
                yield row | {"ms": 1e3 * seconds(step, args), "temp_mb": temp}
            except Exception as error:  # out of memory, as the plain one must be some time
                why = str(error).splitlines()[0][:120]
                yield row | {"verdict": f"{'skipped' if what == 'plain' else 'failed'}: {why}"}


def feed(smoke: bool) -> Iterator[bench.Row]:
    """The training loader's rate."""
    import os

    import input as loaders

    num = loaders.BATCH * (2 if smoke else 20)
    cores = len(os.sched_getaffinity(0))
    with tempfile.TemporaryDirectory() as directory:
        loaders.make(pathlib.Path(directory), 500, num)
        next(next(loaders.vlp_epochs(directory, num)))  # not counted: what is imported
        for what, threads in (("one thread", 0), ("all cores", cores)):
            wall, cpu = time.perf_counter(), time.process_time()
            batches = next(loaders.vlp_epochs(directory, num, threads))
            images = sum(len(batch["image"]) for batch in batches)
            wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
            row = {"what": what, "cores": threads or 1, "images": images}
            yield row | {"images_per_s": images / wall, "images_per_s_per_core": images / cpu}


def train(args: Any, budget: Budget, absent: Mapping[str, list[str]]) -> Iterator[bench.Row]:
    """Times training steps: each side of each model in its own process, then ours with cuDNN's attention."""
    models = TRAIN[-2:] if args.smoke else TRAIN
    jobs = [(side, "auto", *one) for one in models for side in ("vlp", "open_clip")]
    jobs += [("vlp", "cudnn", *TRAIN[0])]
    for side, kernel, model, batch, secs in jobs:
        job = dict(
            model=model, mask=0.0, batch=2 if args.smoke else batch, dtype="bfloat16", depth=0
        )
        job |= dict(smoke=args.smoke, scan=True, remat="none", attention=kernel)
        job |= dict(compile=side == "open_clip" and not args.no_compile)
        row = {"impl": side, "model": model, "attention": kernel, "batch": job["batch"]}
        limit = budget.limit(secs * (2 if args.smoke else 1))
        if args.smoke and (side, kernel) != ("vlp", "auto"):
            yield row | {"verdict": "skipped: needs a card"}
        elif side in absent:
            yield row | {"verdict": f"skipped: without {', '.join(absent[side])}"}
        elif limit <= 0:
            yield row | {"verdict": "skipped: the budget is spent"}
        else:
            try:
                found = train_step.measure([side], job, 1 if args.smoke else 3, secs=limit)
                yield found[0] | {"verdict": "ok"}
            except bench.Failed as error:
                yield row | {"verdict": f"failed: {error}"}


PARTS: dict[str, Callable[[bool], Iterator[bench.Row]]] = {
    "device": device, "attention": attention, "loss": loss, "loss_cost": loss_cost, "input": feed,
}  # fmt: skip


if __name__ == "__main__":
    bench.run(main)
