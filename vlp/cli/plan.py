"""`vlp plan`: what a config trains; with a target, whether it fits and how long it may take."""

import argparse
import os


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    about = "count a config's parameters; compile its step for devices that need not be here"
    parser = subparsers.add_parser("plan", help=about, description=about)
    parser.add_argument(
        "--config", required=True, metavar="FILE.py[:ARG]", help="config file and its argument"
    )
    target = parser.add_mutually_exclusive_group()
    target.add_argument(
        "--topology",
        default="",
        metavar="GEN:GRID",
        help="a TPU pod, such as v5e:16x16 (needs vlp[tpu])",
    )
    target.add_argument("--devices", type=int, metavar="N", help="N simulated CPU devices")
    target.add_argument(
        "--gpu",
        nargs="?",
        const="",
        metavar="KIND:N",
        help="this machine's GPUs, or an estimate for others (H100:8)",
    )
    parser.add_argument(
        "--slices", type=int, default=1, metavar="N", help="number of slices of the topology"
    )
    parser.add_argument(
        "--fast", action="store_true", help="estimate memory from the trace without compiling"
    )
    parser.add_argument("--stage", default="", metavar="NAME", help="plan this stage only")
    parser.add_argument(
        "--mfu", type=float, default=0.4, help="MFU that times are computed for (default 0.4)"
    )
    parser.add_argument(
        "--alone",
        action="store_true",
        help="also measure the loss and an evaluation batch separately",
    )
    parser.add_argument("--json", default="", metavar="FILE", help="write the plan as JSON")
    parser.epilog = "Exit code 1: the step does not fit; the output says which settings would."
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    import gc

    _check(args)
    if args.gpu != "":  # plan on the CPU, whatever this machine has
        os.environ["JAX_PLATFORMS"] = "cpu"
        os.environ.setdefault("PJRT_NPROC", "32")
    from vlp.core import flags

    flags.pin()
    gc.disable()  # traces keep millions of small objects, and collecting takes a quarter of the time
    try:
        return _plan(args)
    finally:
        gc.enable()


def _check(args: argparse.Namespace) -> None:
    """Raises UserError for values out of range, and for options that exclude each other."""
    from vlp.core import check
    from vlp.core.chips import MAX_SIMULATED

    target = args.topology or args.devices or args.gpu is not None
    check.output_file("--json", args.json)
    if args.devices is not None and not 1 <= args.devices <= MAX_SIMULATED:
        do = f"give --devices {min(max(args.devices, 1), MAX_SIMULATED)}"
        raise check.error("--devices", args.devices, f"1 to {MAX_SIMULATED}", do)
    if args.slices != 1 and not args.topology:
        raise check.error(
            "--slices", args.slices, "a --topology too", "add --topology v5e:16x16, for instance"
        )
    do = "add --topology v5e:16x16, --devices 8 or --gpu"
    if (args.stage or args.alone) and not target:
        raise check.error("--stage, --alone", "no target", "devices to plan for", do)
    if args.fast and not target:
        raise check.error("--fast", "no target", "devices to estimate for", do)
    if args.alone and (args.fast or args.gpu):
        got = "--fast" if args.fast else f"--gpu {args.gpu}, which is estimated"
        raise check.error(
            "--alone",
            got,
            "a compilation",
            f"leave out --alone or {'--fast' if args.fast else '--gpu'}",
        )
    if not 0 < args.mfu <= 1:
        raise check.error(
            "--mfu", args.mfu, "a share of the peak in (0, 1]", "give --mfu 0.4, for instance"
        )


def _plan(args: argparse.Namespace) -> int:
    import pathlib

    from vlp.core.config import load
    from vlp.plan import compiled, memory_search
    from vlp.runtime import workdir
    from vlp.train import summary

    config = load(args.config, args.overrides)
    target = None  # must be known before a trace starts JAX
    if args.topology or args.devices or args.gpu is not None:
        target = compiled.target(args.topology, args.slices, args.devices or 0, args.gpu)
    plans = summary.stages(config)
    print(summary.table(plans))
    fits = True
    if target:
        fast = args.fast or bool(target.stands_for)
        found = memory_search.check(config, target, args.stage, fast=fast, alone=args.alone)
        print(memory_search.report(found, args.mfu))
        fits = all(row["fits"] is not False for row in found)
        plans = [row | more for row, more in zip(plans, found)] if not args.stage else found
    if args.json:
        pathlib.Path(args.json).write_text(workdir.dump(plans, indent=1) + "\n")
    return 0 if fits else 1
