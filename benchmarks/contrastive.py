"""Memory, work and traffic of the exact contrastive loss and its gradients: naive, local and chunked.

    naive    the loss of the global batch as one writes it; XLA's partitioner does the rest
    local    each device its own rows and columns against both sides gathered whole (open_clip's local loss,
             gather_with_grad): every logit twice
    chunked  vlp.losses.contrastive.softmax

    python benchmarks/contrastive.py --topology v5e:16x16 --batch 65536 1048576 --width 768 --json rows.json
    python benchmarks/contrastive.py --devices 8 --batch 4096 --width 256 --time

Compiled for the topology (a TPU compiler, no TPU: pip install 'vlp[tpu]') or for simulated CPU devices. Bytes are the
compiler's, a device; FLOPs count the matrix products of all devices, loop bodies times trips; traffic is what a device
sends, from the compiled program's collectives, times trips.
"""

import argparse
import json
import math
import os
import re
import time

IMPLS = ("naive", "local", "chunked")
TYPES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "f32": 4, "s32": 4, "u32": 4, "f64": 8}
MB = 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--topology", default="", help="as v5e:4x4; default: simulated CPU devices")
    parser.add_argument("--devices", type=int, default=8, help="CPU devices without --topology")
    parser.add_argument("--batch", type=int, nargs="+", default=[4096])
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--chunk", type=int, default=0)
    parser.add_argument("--impl", nargs="+", default=IMPLS, choices=IMPLS)
    parser.add_argument("--time", action="store_true", help="run it too (CPU devices)")
    parser.add_argument("--json", default="", metavar="FILE")
    args = parser.parse_args()
    os.environ.setdefault("PJRT_NPROC", "32")
    if args.topology:
        os.environ |= {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1"}
    import jax

    if args.topology:
        from jax.experimental import topologies

        devices = topologies.get_topology_desc(platform="tpu", topology_name=args.topology).devices
    else:
        jax.config.update("jax_num_cpu_devices", args.devices)
        devices = jax.devices()
    rows = [measure(devices, batch, impl, args) for batch in args.batch for impl in args.impl]
    table(rows)
    if args.json:
        with open(args.json, "w") as file:
            json.dump(rows, file, indent=1)


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

    from vlp.core import mesh as meshes

    mesh = meshes.make(meshes.MeshShape(), devices)
    rows, whole = meshes.batch_sharding(mesh), meshes.replicated(mesh)
    z = jax.ShapeDtypeStruct((batch, args.width), jnp.bfloat16, sharding=rows)
    s = jax.ShapeDtypeStruct((), jnp.float32, sharding=whole)
    loss = implementations()[impl]
    step = jax.value_and_grad(lambda x, y, s: loss(x, y, s, args.chunk), (0, 1, 2))
    row = {"impl": impl, "target": args.topology or "cpu", "chips": len(devices), "batch": batch}
    row |= {"width": args.width, "chunk": args.chunk or 1024}
    with jax.set_mesh(mesh):
        row["flops"] = matmul_flops(jax.make_jaxpr(step)(z, z, s).jaxpr)
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
        row["sent_bytes"] = sent_bytes(compiled.as_text(), len(devices))
        if args.time and not args.topology:
            row["step_s"] = seconds(compiled, batch, args.width, rows)
    return row | {"verdict": "compiled"}


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


def matmul_flops(jaxpr) -> int:
    """FLOPs of a jaxpr's matrix products over all devices, loop bodies times trips."""
    total = 0
    for eqn in jaxpr.eqns:
        name, params = eqn.primitive.name, eqn.params
        if name == "dot_general":
            (contracted, _), _ = params["dimension_numbers"]
            inner = math.prod(eqn.invars[0].aval.shape[d] for d in contracted)
            total += 2 * inner * math.prod(eqn.outvars[0].aval.shape)
            continue
        times = 1
        if name == "scan":
            times = params["length"]
        elif name == "shard_map":
            times = params["mesh"].size  # every axis is manual here
        for value in params.values():
            for inner in value if isinstance(value, tuple | list) else (value,):
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    total += times * matmul_flops(inner)
    return total


def sent_bytes(hlo: str, chips: int) -> int:
    """Bytes that a device sends in the collectives of a compiled program, loops times their trips."""
    bodies = {}
    for block in re.split(r"\n(?=\S)", hlo):
        head = re.match(r"(?:ENTRY )?%?([\w.\-]+) ", block)
        if head:
            bodies[head.group(1)] = block
    factor = {"all-gather": 1, "reduce-scatter": 1, "all-reduce": 2, "all-to-all": 1}
    part = (chips - 1) / chips

    def size(shapes: str) -> int:
        return sum(
            TYPES[t] * math.prod(int(n) for n in dims.split(",") if n)
            for t, dims in re.findall(r"(\w+)\[([\d,]*)\]", shapes)
            if t in TYPES
        )

    def trips(line: str) -> int:
        known = re.search(r"known_trip_count[\"':{ ]+n[\"': ]+(\d+)", line)
        if known:
            return int(known.group(1))
        test = bodies[re.search(r"condition=%?([\w.\-]+)", line).group(1)]
        return int(re.findall(r"constant\((\d+)\)", test)[-1])

    found: dict[tuple[str, str], tuple[int, float]] = {}

    def visit(name: str, times: int) -> None:
        """Notes the collectives of one computation that runs `times` times."""
        for line in bodies[name].splitlines()[1:]:
            match = re.search(r"= (.*?) ([a-z][\w\-]*)\(", line)
            if not match:
                continue
            shapes, op = match.groups()
            kind = op.removesuffix("-start")
            if kind in factor or kind == "collective-permute":
                # a start op lists its operands beside its results
                share = size(shapes) / (2 if op.endswith("-start") else 1)
                share *= chips if kind == "reduce-scatter" else 1
                share *= factor[kind] * part if kind in factor else 1
                # one that is fused with compute is written once per piece, also inside of inner loops
                key = (re.search(r"channel_id=(\d+)", line).group(1), kind)
                found[key] = min(found.get(key, (times, share)), (times, share))
            elif op == "while":
                body = re.search(r"body=%?([\w.\-]+)", line).group(1)
                visit(body, times * trips(line))
            elif op in ("call", "fusion", "conditional", "async-start"):
                for inner in re.findall(r"(?:to_apply|calls)=%?([\w.\-]+)", line):
                    if inner in bodies:
                        visit(inner, times)

    visit(re.search(r"\nENTRY %?([\w.\-]+) ", hlo).group(1), 1)
    return round(sum(times * share for times, share in found.values()))


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
    main()
