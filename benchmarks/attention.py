"""Memory of one self-attention and its gradients: logits made by XLA, and JAX's Splash kernel, by number of tokens.

    python benchmarks/attention.py --topology v5e:2x2 --json rows.json

Compiled for one chip of the topology (a TPU compiler, no TPU: pip install 'vlp[tpu]'); nothing runs. Bytes are the
compiler's: the peak with inputs and results, temporaries, and what moves between memory and chip.
"""

import os

import bench


def main() -> None:
    parser = bench.parser(__doc__)
    parser.add_argument("--topology", default="v5e:2x2")
    parser.add_argument("--batch", type=int, default=64, help="of the chip")
    parser.add_argument("--tokens", type=int, nargs="+", default=[196, 256, 324, 576, 1024, 1296])
    parser.add_argument("--heads", type=int, default=16)
    parser.add_argument("--head-size", type=int, default=64)
    args = bench.options(parser)
    os.environ["JAX_PLATFORMS"] = "cpu"
    from vlp.core import mesh as meshes
    from vlp.plan import compiled

    mesh = meshes.make(meshes.MeshShape(), compiled.topology(args.topology).devices[:1])
    print(
        "".join(f"{h:>11}" for h in ("tokens", "kernel", "peak MB", "temp MB", "moved MB", "ratio"))
    )
    rows = []
    for num in args.tokens:
        plain = measure(mesh, args, num, "xla")
        fused = measure(mesh, args, num, "splash")
        for row in (plain, fused):
            rows.append(row | {"ratio": row["peak_bytes"] / plain["peak_bytes"]})
            mb = [f"{row[k] / 1e6:.0f}" for k in ("peak_bytes", "temp_bytes", "moved_bytes")]
            cells = (num, row["kernel"], *mb, f"{rows[-1]['ratio']:.2f}")
            print("".join(f"{c:>11}" for c in cells), flush=True)
    bench.save(args.json, rows)


def measure(mesh, args, num: int, kernel: str) -> dict:
    """One row of the table."""
    import jax
    import jax.numpy as jnp

    from vlp.core import mesh as meshes
    from vlp.ops.attention import attend

    shape = (args.batch, num, args.heads, args.head_size)
    x = jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=meshes.replicated(mesh))
    total = lambda q, k, v: attend(q, k, v, kernel=kernel).astype(jnp.float32).sum()
    with jax.set_mesh(mesh):
        step = jax.jit(jax.grad(total, (0, 1, 2))).lower(x, x, x).compile()
    memory = step.memory_analysis()
    row = {"tokens": num, "kernel": kernel, "batch": args.batch, "heads": args.heads}
    return row | {
        "head_size": args.head_size,
        "peak_bytes": memory.peak_memory_in_bytes,
        "temp_bytes": memory.temp_size_in_bytes,
        "moved_bytes": step.cost_analysis()["bytes accessed"],
    }


if __name__ == "__main__":
    bench.run(main)
