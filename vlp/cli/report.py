"""`vlp report WORKDIR… [--out FILE]`: one HTML file about a run, or about several side by side."""

import argparse
from pathlib import Path

from vlp.report import html


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Adds the subcommand to the parser of `vlp`."""
    text = "write one self-contained HTML file about a run, or about several"
    parser = subparsers.add_parser("report", help=text, description=text)
    parser.add_argument("workdirs", type=Path, nargs="+", metavar="WORKDIR", help="folders of runs")
    parser.add_argument(
        "--out",
        type=Path,
        metavar="FILE",
        help="the file to write (default: WORKDIR/report.html; for several runs ./compare.html)",
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Writes the report and prints its path."""
    html.check_out(args.workdirs, args.out)
    if len(args.workdirs) == 1:
        print(html.write(args.workdirs[0], args.out))
    else:
        print(html.write_comparison(args.workdirs, args.out))
    return 0
