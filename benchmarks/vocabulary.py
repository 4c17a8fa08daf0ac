"""Memory and work of the captioning loss and its gradients, the logits held and not held (CoCa base's head).

    python benchmarks/vocabulary.py --topology v5e:4x4 --json rows.json

Compiled for the topology (a TPU compiler, no TPU: pip install 'vlp[tpu]') or for simulated CPU devices. Bytes are the
compiler's, a device; FLOPs count the matrix products of all devices, loop bodies times trips.
"""

import os
import re

import bench


def main() -> None:
    parser = bench.parser(__doc__)
    parser.add_argument("--topology", default="", help="as v5e:4x4; default: 8 CPU devices")
    parser.add_argument("--batch", type=int, default=16_384)
    parser.add_argument("--text-len", type=int, default=64)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--vocab", type=int, default=64_000)
    args = bench.options(parser)
    if args.topology:
        os.environ["JAX_PLATFORMS"] = "cpu"

    from vlp.plan import compiled

    devices = compiled.target(args.topology, num_cpu=8).devices
    rows = [
        measure(devices, args, impl, chunk) for impl, chunk in (("plain", 0), ("chunked", 1024))
    ]
    print("".join(f"{h:>14}" for h in ("impl", "temp MB", "peak MB", "TFLOPs")) + "  verdict")
    for row in rows:
        mb = lambda value: "–" if value is None else f"{value / bench.MB:.1f}"
        cells = (row["impl"], mb(row["temp_bytes"]), mb(row["peak_bytes"]))
        print("".join(f"{c:>14}" for c in cells) + f"{row['flops'] / 1e12:14.1f}  {row['verdict']}")
    bench.save(args.json, rows)


def measure(devices, args, impl: str, chunk: int) -> dict:
    """One row of the table."""
    import jax
    import jax.numpy as jnp
    from jax.sharding import NamedSharding

    from vlp.core import flops
    from vlp.core import mesh as meshes
    from vlp.losses import caption

    mesh = meshes.make(meshes.MeshShape(), devices)
    meshes.check_batch(args.batch, mesh, where="--batch")
    rows = meshes.batch_sharding(mesh)
    kernel = (args.width, args.vocab)
    table = NamedSharding(mesh, meshes.spec(("embed", "vocab"), kernel, mesh))
    hidden = (args.batch, args.text_len, args.width)
    hidden = jax.ShapeDtypeStruct(hidden, jnp.bfloat16, sharding=rows)
    unembed = jax.ShapeDtypeStruct(kernel, jnp.float32, sharding=table)
    text = jax.ShapeDtypeStruct((args.batch, args.text_len), jnp.int32, sharding=rows)
    loss = lambda h, u, t: caption.nll(h, u, t, chunk=chunk)["total"].sum()
    step = jax.value_and_grad(loss, (0, 1))
    row = {"impl": impl, "target": args.topology or "cpu", "chips": len(devices)}
    row |= {"batch": args.batch, "vocab": args.vocab, "width": args.width}
    out = (meshes.replicated(mesh), (rows, table))
    with jax.set_mesh(mesh):
        row["flops"] = flops.of(step, hidden, unembed, text)
        lowered = jax.jit(step, out_shardings=out).lower(hidden, unembed, text)
        try:
            memory = lowered.compile().memory_analysis()
        except Exception as error:  # the compiler's verdict: it does not fit
            used = re.search(r"temporaries \(([\d.]+)G\)", str(error))
            size = None if used is None else int(float(used.group(1)) * 2**30)
            return row | {"temp_bytes": size, "peak_bytes": None, "verdict": "refused"}
    row |= {"temp_bytes": memory.temp_size_in_bytes, "peak_bytes": memory.peak_memory_in_bytes}
    return row | {"verdict": "compiled"}


if __name__ == "__main__":
    bench.run(main)
