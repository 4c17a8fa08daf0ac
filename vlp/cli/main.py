"""The command line: `vlp SUBCOMMAND …`.

Exit codes: 0 done; 1 crash, fault of the machine or failed check; 2 mistake of the user; 75 pre-empted and saved;
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
from typing import Any, NoReturn

from vlp import __version__
from vlp.core import check, progress

COMMANDS = ("train", "eval", "caption", "average", "plan", "data", "report")


class Parser(argparse.ArgumentParser):
    """Reports mistakes in one line."""

    def error(self, message: str) -> NoReturn:
        raise check.UserError(f"{self.prog}: {message}; see {self.prog} --help")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one subcommand; returns its exit code."""
    argv = list(sys.argv[1:] if argv is None else argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    for noisy in ("jax", "grain"):
        logging.getLogger(noisy).setLevel(logging.ERROR)
    # `vlp` reports what these raise; they would log it too, with its traceback.
    for noisy in ("absl", "orbax"):
        logging.getLogger(noisy).setLevel(logging.CRITICAL)
    sys.excepthook = _excepthook
    if not any(isinstance(h, progress.Said) for h in logging.getLogger().handlers):
        logging.getLogger().addHandler(progress.Said())
    parser = Parser(prog="vlp", description="Vision-language pretraining in JAX.")
    parser.add_argument("--version", action="version", version=f"vlp {__version__}")
    subparsers = parser.add_subparsers(metavar="COMMAND", required=True)
    chosen = [c for c in COMMANDS if c == next((a for a in argv if not a.startswith("-")), None)]
    for name in chosen or COMMANDS:  # one command does not import the others
        importlib.import_module(f"vlp.cli.{name}").add_parser(subparsers)
    progress.in_log = chosen == ["train"]  # standard error holds only the mistakes of `train`
    try:
        for a in (a for a in argv if a.startswith("-") and a.endswith("=--")):
            raise check.error(a.removesuffix("=--"), "'--'", "a value", "give one after the =")
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
        if (told := check.answer(e)) is None:
            raise
        print(f"vlp: {re.sub(r'^vlp:? ', '', told[0])}", file=sys.stderr)
        return told[1]


def _excepthook(kind: type[BaseException], e: BaseException, trace: Any) -> None:
    """Prints an uncaught error, except those of TensorStore's threads that call back into a save that has failed."""
    if not (kind is RuntimeError and str(e) == "Event loop is closed"):
        sys.__excepthook__(kind, e, trace)


# Flags of JAX that numbers depend on. They override the shell and a JAX configuration.
PINNED = {
    "jax_enable_x64": False,
    "jax_default_matmul_precision": None,
    "jax_default_prng_impl": "threefry2x32",
    "jax_threefry_partitionable": True,
    "jax_random_seed_offset": 0,
    "jax_numpy_dtype_promotion": "standard",
    "jax_softmax_custom_jvp": False,
}
_FAST = r"--xla_\w*fast_(math|min_max)(=(true|1))?(?=\s|$)"


def start_jax() -> None:
    """Pins the flags that numbers depend on, and lets runs share compiled programs.

    The environment variable VLP_CACHE names the folder of compiled programs (default ~/.cache/vlp; empty: none).
    """
    import jax

    pin_flags()
    root = os.environ.get("VLP_CACHE", str(pathlib.Path.home() / ".cache" / "vlp"))
    if root and jax.config.jax_compilation_cache_dir is None:  # pyright: ignore  # made at run time
        jax.config.update("jax_compilation_cache_dir", os.path.join(root, "jax"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 1.0)


def pin_flags() -> None:
    """Sets JAX's flags as in `PINNED`, and warns of those that had other values.

    Raises:
        UserError: XLA_FLAGS allows fast math, which may ignore NaN and reorder sums.
    """
    import jax

    log = logging.getLogger(__name__)
    for name, value in PINNED.items():
        found = getattr(jax.config, name, value)
        if found != value:
            text = "%s=%s is ignored (it stays %s): the numbers of a run depend on its config alone"
            log.warning(text, name.upper(), found, value)
            jax.config.update(name, value)
    if fast := re.search(_FAST, os.environ.get("XLA_FLAGS", "")):
        raise check.error("XLA_FLAGS", fast.group(), "no fast math", "remove it from XLA_FLAGS")
