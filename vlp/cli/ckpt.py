"""`vlp ckpt`: checkpoints of other libraries, in and out."""

import argparse

from vlp.cli import exchange


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    about = "import and export checkpoints"
    parser = subparsers.add_parser("ckpt", help=about, description=about)
    actions = parser.add_subparsers(metavar="ACTION", required=True)
    exchange.add_actions(actions)
