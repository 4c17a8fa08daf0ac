"""The command line: `vlp SUBCOMMAND …`.

Exit codes: 0 done, 1 crash or a check that does not hold, 2 user error, 75 pre-empted and saved, 76 hang.
"""

from __future__ import annotations

import argparse
import importlib
import logging
import os
import pathlib
import sys
from collections.abc import Sequence
from typing import NoReturn

from vlp import __version__
from vlp.core import check
from vlp.core.check import UserError

COMMANDS = ("train", "eval", "caption", "average", "plan", "data", "report")


class Parser(argparse.ArgumentParser):
    """Answers mistakes in one line."""

    def error(self, message: str) -> NoReturn:
        raise check.UserError(f"{self.prog}: {message}; see {self.prog} --help")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one subcommand; returns its exit code."""
    argv = list(sys.argv[1:] if argv is None else argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    for noisy in ("absl", "orbax", "jax", "grain"):
        logging.getLogger(noisy).setLevel(logging.ERROR)
    parser = Parser(prog="vlp", description="Vision-language pretraining in JAX.")
    parser.add_argument("--version", action="version", version=f"vlp {__version__}")
    subparsers = parser.add_subparsers(metavar="COMMAND", required=True)
    chosen = [c for c in COMMANDS if c == next((a for a in argv if not a.startswith("-")), None)]
    for name in chosen or COMMANDS:  # one command does not import the others
        importlib.import_module(f"vlp.cli.{name}").add_parser(subparsers)
    try:
        args, rest = parser.parse_known_args(argv)
        taken = [a for a in rest if a.startswith("--config.") and hasattr(args, "config")]
        args.overrides = [a.removeprefix("--config.") for a in taken]
        for a, after in zip(rest, [*rest[1:], ""]):
            if a in taken and "=" not in a:
                value = "VALUE" if after.startswith("-") or not after else after
                raise check.error(a, "no value", f"{a}={value}", "write it with =")
        if wrong := [a for a in rest if a not in taken]:
            parser.error(f"unrecognized arguments: {' '.join(wrong)}")
        return args.run(args)
    except UserError as error:
        print(f"vlp: {error}", file=sys.stderr)
        return 2


def compilation_cache() -> None:
    """Keeps compiled programs between runs (VLP_CACHE, default ~/.cache/vlp; empty: off)."""
    import jax

    root = os.environ.get("VLP_CACHE", str(pathlib.Path.home() / ".cache" / "vlp"))
    if root and jax.config.jax_compilation_cache_dir is None:  # pyright: ignore  # made at run time
        jax.config.update("jax_compilation_cache_dir", os.path.join(root, "jax"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 1.0)
