"""`vlp train`: trains or continues a run."""

import argparse

from vlp.cli.main import compilation_cache


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    about = "train a model, or continue its run (same command)"
    parser = subparsers.add_parser("train", help=about, description=about)
    parser.add_argument(
        "--config", required=True, metavar="FILE.py[:ARG]", help="config file and its argument"
    )
    parser.add_argument("--workdir", required=True, metavar="DIR", help="where the run lives")
    parser.add_argument(
        "--profile", default="", metavar="A:B", help="trace steps A to B into DIR/profile (XProf)"
    )
    parser.epilog = "Any value can be overridden: --config.section.key=value"
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from vlp.core.config import load
    from vlp.train import loop, profile

    config = load(args.config, args.overrides)
    steps = profile.parse(args.profile) if args.profile else None
    compilation_cache()
    return loop.run(config, args.workdir, steps)
