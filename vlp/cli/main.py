"""The command line: `vlp SUBCOMMAND …`.

Exit codes: 0 done; 1 crash, machine fault or failed check; 2 user error; 75 pre-empted, after a checkpoint was saved;
76 hang; 130 Ctrl-C (vlp.core.interrupt).
"""

from __future__ import annotations

import argparse
import importlib
import logging
import os
import pathlib
import re
import sys
from collections.abc import Sequence
from typing import NoReturn

from vlp import __version__
from vlp.core import check, flags, progress

COMMANDS = ("train", "eval", "caption", "average", "plan", "data", "ckpt", "report")


class Parser(argparse.ArgumentParser):
    """Raises UserError for a wrong option, so that `main` prints one line instead of the usage."""

    def error(self, message: str) -> NoReturn:
        raise check.UserError(f"{self.prog}: {message}; see {self.prog} --help")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one subcommand and returns its exit code."""
    argv = list(sys.argv[1:] if argv is None else argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    for noisy in ("jax", "grain"):
        logging.getLogger(noisy).setLevel(logging.ERROR)
    # These log every exception that they raise, with a traceback; `main` already prints it.
    for noisy in ("absl", "orbax"):
        logging.getLogger(noisy).setLevel(logging.CRITICAL)
    if not any(isinstance(h, progress.Said) for h in logging.getLogger().handlers):
        logging.getLogger().addHandler(progress.Said())
    parser = Parser(prog="vlp", description="Vision-language pretraining in JAX.")
    parser.add_argument("--version", action="version", version=f"vlp {__version__}")
    subparsers = parser.add_subparsers(metavar="COMMAND", required=True)
    chosen = [c for c in COMMANDS if c == next((a for a in argv if not a.startswith("-")), None)]
    for name in chosen or COMMANDS:  # import only the chosen command: it starts faster
        importlib.import_module(f"vlp.cli.{name}").add_parser(subparsers)
    progress.in_log = chosen == ["train"]  # so that only errors of `train` go to standard error
    try:
        for a in (a for a in argv if a.startswith("-") and a.endswith("=--")):
            raise check.error(a.removesuffix("=--"), "'--'", "a value", "give one after the =")
        for a in argv:
            _check_text(a)
        args, rest = parser.parse_known_args(argv)
        taken = [a for a in rest if a.startswith("--config.") and hasattr(args, "config")]
        args.overrides = [a.removeprefix("--config.") for a in taken]
        for a, after in zip(rest, [*rest[1:], ""]):
            if a in taken and "=" not in a:
                value = "VALUE" if after.startswith("-") or not after else after
                raise check.error(a, "no value", f"{a}={value}", "join key and value with =")
        if wrong := [a for a in rest if a not in taken]:
            parser.error(f"unrecognized arguments: {' '.join(wrong)}")
        with progress.phase(f"vlp {chosen[0] if chosen else ''}"):
            return args.run(args)
    except Exception as e:
        if (known := check.answer(e)) is None:
            raise
        message, code = known
        print(f"vlp: {re.sub(r'^vlp:? ', '', message)}", file=sys.stderr)
        return code


def _check_text(argument: str) -> None:
    """Raises UserError for an argument that no path can have. No shell gives one, but callers of `main` may."""
    try:
        good = b"\0" not in os.fsencode(argument)
    except UnicodeEncodeError:  # half of a surrogate pair
        good = False
    if not good:
        got, do = ascii(argument), "remove the characters that are escaped here"
        raise check.error("vlp", got, "a text that paths can have", do)


def start_jax() -> None:
    """Pins the JAX flags that change numbers (`vlp.core.flags`) and turns on JAX's persistent compilation cache.

    The environment variable VLP_CACHE is the cache folder (default ~/.cache/vlp; empty: no cache).
    """
    import jax

    flags.pin()
    root = os.environ.get("VLP_CACHE", str(pathlib.Path.home() / ".cache" / "vlp"))
    if root and jax.config.jax_compilation_cache_dir is None:  # pyright: ignore  # made at run time
        jax.config.update("jax_compilation_cache_dir", os.path.join(root, "jax"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 1.0)
