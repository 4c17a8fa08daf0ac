"""Memory and FLOPs per chip of a training step, for sweeps of chips, batch, micro-batches and model.

    python benchmarks/scaling.py --topology v5e:4x4 v5e:8x8 v5e:16x16 --batch 256 512 --micro 1 2 4 8 --json rows.json
    python benchmarks/scaling.py --config configs/coca.py:size=base,smoke --devices 1 2 4 8 --batch 8 16 --micro 1 2 4

The first value of each list is the base point; each list is swept with the others at their first value. `--batch` is
per chip, so the work per chip is the same for any number of chips. The real step (vlp.train.step) is compiled for the
TPU topology (no TPU needed: pip install 'vlp[tpu]') or for simulated CPU devices. For a step that does not fit, the row
holds the compiler's message. `estimate` is the peak that `vlp plan --fast` estimates, divided by the
compiled peak. In the JSON rows, `working_bytes` is the peak without parameters, optimiser state, batch and saved
activations.
"""

import argparse
import os

import bench

MB = bench.MB
COLUMNS = {
    "peak MB": lambda r: r["peak_bytes"] / MB,
    "estimate": lambda r: r["estimate_bytes"] / r["peak_bytes"],
    "param MB": lambda r: r["param_bytes"] / MB,
    "opt MB": lambda r: r["opt_bytes"] / MB,
    "temp MB": lambda r: r["temp_bytes"] / MB,
    "TFLOP/chip": lambda r: r["flops_per_chip"] / 1e12,
    "sent MB": lambda r: sum(v for k, v in r.items() if k.startswith("sent_bytes/")) / MB,
    "compile s": lambda r: r["compile_s"],
}


def main() -> None:
    parser = bench.parser(__doc__)
    parser.add_argument("--config", nargs="+", default=["configs/coca.py:size=base"])
    parser.add_argument("--topology", nargs="+", default=[], help="for instance v5e:4x4 v5e:16x16")
    parser.add_argument(
        "--devices",
        type=int,
        nargs="+",
        default=[8],
        help="simulated CPU devices",
    )
    parser.add_argument("--batch", type=int, nargs="+", default=[256], help="examples per chip")
    parser.add_argument(
        "--micro", type=int, nargs="+", default=[1], help="numbers of micro-batches"
    )
    parser.add_argument(
        "--mesh", default="data=1,fsdp=-1", help="for instance data=-1,fsdp=8,tensor=2"
    )
    parser.add_argument(
        "--set", nargs="*", default=[], metavar="KEY=VALUE", help="override values of the config"
    )
    args = bench.options(parser)
    os.environ.setdefault("PJRT_NPROC", "32")
    if args.topology:
        os.environ["JAX_PLATFORMS"] = "cpu"
    import jax

    if not args.topology:
        jax.config.update("jax_num_cpu_devices", max(args.devices))
    print(f"{'sweep':7}{'value':26}{'chips':>6}{'batch':>9}" + "".join(f"{c:>12}" for c in COLUMNS))
    rows, known = [], {}
    lists = {
        "chips": args.topology or args.devices,
        "batch": args.batch,
        "micro": args.micro,
        "model": args.config,
    }
    for sweep, values in lists.items():
        for value in values:
            point = {k: v[0] for k, v in lists.items()} | {sweep: value}
            key = tuple(point.values())
            if key not in known:
                known[key] = measure(point, args)
            rows.append({"sweep": sweep, "value": str(value), **known[key]})
            show(rows[-1])
    bench.save(args.json, rows)


def measure(point: dict, args: argparse.Namespace) -> dict:
    """Compiles the last stage's step at one point of the sweep and returns its row."""
    import jax

    from vlp.core.config import load
    from vlp.plan import compiled, estimate
    from vlp.train.stages import parse

    if args.topology:
        target = compiled.topology(point["chips"])
    else:
        target = compiled.Target(f"{point['chips']} CPU devices", jax.devices()[: point["chips"]])
    chips = len(target.devices)
    mesh = [f"mesh.{part}" for part in args.mesh.split(",")]
    changes = [f"batch={point['batch'] * chips}", f"micro_batches={point['micro']}", *mesh]
    settings, stages = parse(load(point["model"], [*changes, *args.set]))
    parts, on = compiled.prepare(stages[-1], settings, target)
    row = {"estimate_bytes": estimate.peak(parts, on).peak_bytes}
    row |= compiled.measure(parts, on, target)
    row["flops_per_chip"] = row["step_flops_per_example"] * row["batch"] / chips
    return {"model": point["model"], **row}


def show(row: dict) -> None:
    head = f"{row['sweep']:7}{row['value'][-25:]:26}{row['chips']:6}{row['batch']:9,}"
    if not row["fits"]:
        print(f"{head}  does not fit: {row['refusal']}", flush=True)
        return
    print(
        head
        + "".join(f"{f(row):12,.{2 if name == 'estimate' else 1}f}" for name, f in COLUMNS.items()),
        flush=True,
    )


if __name__ == "__main__":
    bench.run(main)
