"""`vlp train`: trains or continues a run."""

import argparse
import math
import time

from vlp.cli.main import start_jax

SEVERAL = (
    "Start the same command on every host. On Cloud TPU and under srun no option is needed. The environment variables "
    "JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID work too. --coordinator none: a run of one process."
)


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    about = "train a model, or continue its run (with the same command)"
    parser = subparsers.add_parser("train", help=about, description=about)
    parser.add_argument(
        "--config", required=True, metavar="FILE.py[:ARG]", help="config file and its argument"
    )
    parser.add_argument(
        "--workdir", required=True, metavar="DIR", help="folder of the run, or gs://… or s3://…"
    )
    parser.add_argument(
        "--profile", default="", metavar="A:B", help="trace steps A to B into DIR/profile (XProf)"
    )
    parser.add_argument(
        "--extend",
        action="store_true",
        help="continue with another length of the last stage",
    )
    several = parser.add_argument_group("several processes", SEVERAL)
    several.add_argument("--coordinator", default="", metavar="HOST:PORT", help="of process 0")
    several.add_argument("--processes", type=int, metavar="N", help="number of processes")
    several.add_argument("--process", type=int, metavar="I", help="index of this process, from 0")
    several.add_argument(
        "--wait-secs", type=float, metavar="S", help="seconds to wait for the others (default 40)"
    )
    parser.epilog = "Any value can be overridden: --config.section.key=value"
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    began = time.monotonic()
    from vlp.core import check, flags, paths
    from vlp.core.config import load
    from vlp.runtime import hosts, profile, restart, workdir
    from vlp.train import loop

    secs = hosts.SECS if args.wait_secs is None else args.wait_secs
    if not 0 < secs < math.inf:
        raise check.error(
            "--wait-secs", secs, "a number of seconds above 0", "give --wait-secs 40, for instance"
        )
    config = load(args.config, args.overrides)
    steps = profile.parse(args.profile) if args.profile else None
    directory = paths.parse("--workdir", args.workdir)
    start_jax()
    place = hosts.find(args.coordinator, args.processes, args.process)
    if place is None:
        return loop.run(config, directory, steps, args.extend)
    facts = {
        "config": restart.fixed(config, restart.LOCAL),
        "profile": args.profile,
        "extend": args.extend,
        "versions": workdir.code_versions(),
        "flags": flags.common(),
    }
    left = secs - (time.monotonic() - began)  # imports may take long
    with hosts.joined(place, facts, directory, max(left, 1.0)):
        return loop.run(config, directory, steps, args.extend)
