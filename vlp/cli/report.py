"""`vlp report WORKDIR… [--out FILE]`: writes one HTML file about one run, or one that compares several."""

import argparse
from pathlib import Path

from vlp.report import html


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Adds the subcommand to the parser of `vlp`."""
    text = "write one self-contained HTML file about a run, or a comparison of several"
    parser = subparsers.add_parser("report", help=text, description=text)
    parser.add_argument(
        "workdirs", type=Path, nargs="+", metavar="WORKDIR", help="work directories of runs"
    )
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
