"""`vlp plan`: what a config will train, before anything is compiled or written."""

import argparse


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    about = "count a config's parameters and lay out its stages"
    parser = subparsers.add_parser("plan", help=about, description=about)
    parser.add_argument(
        "--config", required=True, metavar="FILE.py[:ARG]", help="config file and its argument"
    )
    parser.add_argument("--json", default="", metavar="FILE", help="write the plan as JSON")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    import pathlib

    from vlp.core import check
    from vlp.core.config import load
    from vlp.train import plan, workdir

    if args.json and not pathlib.Path(args.json).absolute().parent.is_dir():
        raise check.error("--json", repr(args.json), "a file in an existing directory", "make it")
    plans = plan.stages(load(args.config, args.overrides))
    print(plan.table(plans))
    if args.json:
        pathlib.Path(args.json).write_text(workdir.dump(plans, indent=1) + "\n")
    return 0
