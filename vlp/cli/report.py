"""`vlp report WORKDIR [--out FILE]`: one HTML file about a run."""

import argparse
from pathlib import Path

from vlp.report import html


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Adds the subcommand to the parser of `vlp`."""
    text = "write one self-contained HTML file about a run"
    parser = subparsers.add_parser("report", help=text, description=text)
    parser.add_argument("workdir", type=Path, metavar="WORKDIR", help="the folder of the run")
    parser.add_argument(
        "--out", type=Path, metavar="FILE", help="the file to write (WORKDIR/report.html)"
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Writes the report and prints its path."""
    print(html.write(args.workdir, args.out))
    return 0
