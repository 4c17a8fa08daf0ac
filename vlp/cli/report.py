"""`vlp report WORKDIR… [--out FILE]`: writes one HTML file about one run, or one that compares several."""

import argparse
import functools

from vlp.core import paths
from vlp.report import html


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Adds the subcommand to the parser of `vlp`."""
    text = "write one self-contained HTML file about a run, or a comparison of several"
    parser = subparsers.add_parser("report", help=text, description=text)
    parser.add_argument("workdirs", nargs="+", metavar="WORKDIR", help="work directories of runs")
    parser.add_argument(
        "--out",
        metavar="FILE",
        help="the file to write (default: WORKDIR/report.html; for several runs ./compare.html)",
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Writes the report and prints its path."""
    parse = functools.partial(paths.parse, absolute=False)
    workdirs = [parse("report.workdir", text) for text in args.workdirs]
    out = parse("report.out", args.out) if args.out else None
    html.check_out(workdirs, out)
    print(
        html.write(workdirs[0], out) if len(workdirs) == 1 else html.write_comparison(workdirs, out)
    )
    return 0
