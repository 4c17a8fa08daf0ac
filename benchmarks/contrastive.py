"""Memory, work and traffic of the exact contrastive loss and its gradients: naive, local and chunked.

    naive    the loss of the global batch as one writes it; XLA's partitioner does the rest
    local    each device its own rows and columns against both sides gathered whole (open_clip's local loss,
             gather_with_grad): every logit twice
    chunked  vlp.losses.contrastive.softmax

    python benchmarks/contrastive.py --topology v5e:16x16 --batch 65536 1048576 --width 768 --json rows.json
    python benchmarks/contrastive.py --devices 8 --batch 4096 --width 256 --time
    python benchmarks/contrastive.py --topology v5e:4x4 --batch 4096 --step configs/coca.py:size=base

With --step the whole training step of a config is compiled instead, with the loss (chunked) and with a sum of the
embeddings in its place (none): what the loss adds to the peak of a run.

Compiled for the topology (a TPU compiler, no TPU: pip install 'vlp[tpu]') or for simulated CPU devices. Bytes are the
compiler's, a device; FLOPs count the matrix products of all devices, loop bodies times trips; traffic is what a device
sends, from the compiled program's collectives, times trips.
"""

import os
import re
import time

import bench

IMPLS = ("naive", "local", "chunked")
MB = bench.MB


def main() -> None:
    parser = bench.parser(__doc__)
    parser.add_argument("--topology", default="", help="as v5e:4x4; default: simulated CPU devices")
    parser.add_argument("--devices", type=int, default=8, help="CPU devices without --topology")
    parser.add_argument("--batch", type=int, nargs="+", default=[4096])
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--chunk", type=int, default=0)
    parser.add_argument("--impl", nargs="+", default=IMPLS, choices=IMPLS)
    parser.add_argument("--step", default="", metavar="CONFIG", help="the whole step of a config")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="of the config")
    parser.add_argument("--time", action="store_true", help="run it too (CPU devices)")
    args = bench.options(parser, "chunk")
    os.environ.setdefault("PJRT_NPROC", "32")
    if args.topology:
        os.environ["JAX_PLATFORMS"] = "cpu"

    from vlp.plan import compiled

    devices = compiled.target(args.topology, num_cpu=args.devices).devices
    if args.step:
        rows = [
            whole_step(devices, batch, impl, args)
            for batch in args.batch
            for impl in ("chunked", "none")
        ]
        step_table(rows)
    else:
        rows = [measure(devices, batch, impl, args) for batch in args.batch for impl in args.impl]
        table(rows)
    bench.save(args.json, rows)


def implementations():
    import jax
    import jax.numpy as jnp
    from jax.sharding import PartitionSpec as P

    from vlp.core import mesh as meshes
    from vlp.losses import contrastive

    einsum = lambda x, y: jnp.einsum("be,ce->bc", x, y, preferred_element_type=jnp.float32)

    def naive(x, y, scale, chunk):
        logits = scale * einsum(x, y)
        rows, cols = (jax.nn.logsumexp(logits, axis).mean() for axis in (1, 0))
        return rows + cols - 2 * jnp.diagonal(logits).mean()

    def local(x, y, scale, chunk):
        axes = meshes.RULES["batch"]

        def one(x, y, scale):
            first = jax.lax.axis_index(axes) * x.shape[0]
            all_x, all_y = (jax.lax.all_gather(z, axes, tiled=True) for z in (x, y))
            total = 0
            for here, every in ((x, all_y), (y, all_x)):
                logits = scale * einsum(here, every)
                own = first + jnp.arange(here.shape[0])
                own = jnp.take_along_axis(logits, own[:, None], axis=1)[:, 0]
                total += (jax.nn.logsumexp(logits, 1) - own).mean()
            return jax.lax.pmean(total, axes)

        f = jax.shard_map(one, in_specs=(P(axes), P(axes), P()), out_specs=P(), check_vma=False)
        return f(x, y, scale)

    def chunked(x, y, scale, chunk):
        loss = contrastive.softmax(x, y, scale, chunk=chunk)
        return (loss["i2t"] + loss["t2i"]).mean()

    return {"naive": naive, "local": local, "chunked": chunked}


def measure(devices, batch, impl, args) -> dict:
    """One row of the table."""
    import jax
    import jax.numpy as jnp

    from vlp.core import flops
    from vlp.core import mesh as meshes
    from vlp.plan import hlo

    mesh = meshes.make(meshes.MeshShape(), devices)
    meshes.check_batch(batch, mesh, where="--batch")
    rows, whole = meshes.batch_sharding(mesh), meshes.replicated(mesh)
    z = jax.ShapeDtypeStruct((batch, args.width), jnp.bfloat16, sharding=rows)
    s = jax.ShapeDtypeStruct((), jnp.float32, sharding=whole)
    loss = implementations()[impl]
    step = jax.value_and_grad(lambda x, y, s: loss(x, y, s, args.chunk), (0, 1, 2))
    row = {"impl": impl, "target": args.topology or "cpu", "chips": len(devices), "batch": batch}
    row |= {"width": args.width, "chunk": args.chunk or 1024}
    with jax.set_mesh(mesh):
        row["flops"] = flops.of(step, z, z, s)
        row["flops_per_b2d"] = row["flops"] / (batch**2 * args.width)
        out = (whole, (rows, rows, whole))
        began = time.monotonic()
        try:
            compiled = jax.jit(step, out_shardings=out).lower(z, z, s).compile()
        except Exception as error:  # the compiler's verdict: it does not fit
            used = re.search(r"Used ([\d.]+[MGT]) of ([\d.]+[MGT])", str(error))
            verdict = f"refused: {used.group(0) if used else str(error).splitlines()[0][:80]}"
            return row | {"temp_bytes": None, "peak_bytes": None, "verdict": verdict}
        row["compile_s"] = round(time.monotonic() - began, 1)
        memory = compiled.memory_analysis()
        row["temp_bytes"] = memory.temp_size_in_bytes
        row["peak_bytes"] = memory.peak_memory_in_bytes
        traffic = hlo.collectives(compiled.as_text(), len(devices))
        row["sent_bytes"] = round(sum(t.sent_bytes for t in traffic.values()))
        if args.time and not args.topology:
            row["step_s"] = seconds(compiled, batch, args.width, rows)
    return row | {"verdict": "compiled"}


def whole_step(devices, batch, impl, args) -> dict:
    """One row of --step: the training step with the loss, or with a sum that costs nothing instead."""
    from unittest import mock

    import jax.numpy as jnp

    from vlp.core.config import load
    from vlp.losses import contrastive
    from vlp.plan import compiled
    from vlp.train.stages import parse

    def nothing(zi_BE, zt_BE, scale, **options):
        zi_B, zt_B = (scale * z_BE.astype(jnp.float32).mean(-1) for z_BE in (zi_BE, zt_BE))
        return dict.fromkeys(("i2t", "lse_i2t", "hit_i2t"), zi_B) | dict.fromkeys(
            ("t2i", "lse_t2i", "hit_t2i", "positive"), zt_B
        )

    settings, stages = parse(load(args.step, [f"batch={batch}", *args.set]))
    target = compiled.Target(args.topology or f"{len(devices)} CPU devices", devices)
    softmax = contrastive.softmax if impl == "chunked" else nothing
    with mock.patch.object(contrastive, "softmax", softmax):
        row = compiled.measure(*compiled.prepare(stages[-1], settings, target), target)
    return {"impl": impl, "step": args.step, "settings": " ".join(args.set), **row}


def step_table(rows) -> None:
    print("".join(f"{h:>12}" for h in ("impl", "target", "batch", "peak MB", "temp MB", "TFLOP")))
    for row in rows:
        if not row["fits"]:
            print(f"{row['impl']:>12}  refused: {row['refusal']}")
            continue
        cells = [row["impl"], row["target"], row["batch"]]
        cells += [f"{row[key] / MB:.1f}" for key in ("peak_bytes", "temp_bytes")]
        cells += [f"{row['step_flops_per_example'] * row['batch'] / 1e12:.1f}"]
        print("".join(f"{c:>12}" for c in cells))
    for ours, none in zip(rows[::2], rows[1::2]):
        if ours["fits"] and none["fits"]:
            more = ours["peak_bytes"] / none["peak_bytes"] - 1
            print(f"the loss adds {more:.2%} to the peak at a batch of {ours['batch']:,}")


def seconds(compiled, batch, width, sharding) -> float:
    """Median of five runs."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    rng = np.random.default_rng(0)
    z = [rng.normal(size=(batch, width)).astype(np.float32) for _ in range(2)]
    z = [v / np.linalg.norm(v, axis=1, keepdims=True) for v in z]
    z = [jax.device_put(jnp.asarray(v, jnp.bfloat16), sharding) for v in z]
    times = []
    for _ in range(6):
        began = time.monotonic()
        jax.block_until_ready(compiled(*z, jnp.float32(14)))
        times.append(time.monotonic() - began)
    return float(np.median(times[1:]))


def table(rows) -> None:
    head = ("impl", "target", "chips", "batch", "temp MB", "peak MB", "FLOPs/B²D", "sent MB", "s")
    print("".join(f"{h:>11}" for h in head) + "  verdict")
    mb = lambda value: "–" if value is None else f"{value / MB:.2f}"
    for row in rows:
        cells = [row["impl"], row["target"], row["chips"], row["batch"]]
        cells += [mb(row.get(key)) for key in ("temp_bytes", "peak_bytes")]
        cells += [f"{row['flops_per_b2d']:.2f}", mb(row.get("sent_bytes"))]
        cells += [f"{row.get('step_s', '–'):.4}"]
        print("".join(f"{c:>11}" for c in cells) + f"  {row['verdict']}")


if __name__ == "__main__":
    bench.run(main)
