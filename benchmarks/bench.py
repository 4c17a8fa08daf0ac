"""Shared parts of the benchmarks: options, environment, tables, rows as JSON, and alternating worker processes.

Every script prints a table, writes its rows with --json FILE (a flat list; every row names its environment), and
reports a mistake in one line with exit code 2. It runs from a clone without installing `vlp`.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib.metadata
import importlib.util
import json
import os
import pathlib
import platform
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NoReturn

ROOT = pathlib.Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from vlp.core import check, chips  # noqa: E402  # of this clone

Row = dict[str, Any]
HIDDEN = argparse.SUPPRESS  # the help of options for workers
MB = 2**20


def parser(doc: str | None) -> argparse.ArgumentParser:
    """Returns a parser with --json, described by the first line of a docstring."""
    out = argparse.ArgumentParser(description=(doc or "").split("\n")[0])
    out.add_argument("--json", default="", metavar="FILE", help="also write the rows there")
    return out


def run(main: Callable[[], int | None]) -> NoReturn:
    """Runs a script and exits: code 2 and one line for a user error, code 1 and one line for a failed worker."""

    def guarded() -> int | None:
        try:
            return main()
        except Failed as error:
            print(error, file=sys.stderr)
            return 1

    check.run(guarded)


def options(
    parser: argparse.ArgumentParser,
    *may_be_zero: str,
    argv: Sequence[str] | None = None,
    needs: Sequence[str] = ("jax", "flax", "optax", "jaxtyping"),
) -> argparse.Namespace:
    """The script's options, checked: a file that can be written, counts of 1 or more. Prints the environment.

    may_be_zero: names of the counts for which 0 has a meaning. needs: modules. A parser with a hidden --serve is a
    worker's: its parent has checked and printed. Raises UserError.
    """
    args = parser.parse_args(argv)
    check.output_file("--json", args.json)
    check.counts(vars(args), *may_be_zero)
    if not getattr(args, "serve", None):
        if lacks := missing(needs):
            got = f"{sys.executable} without {', '.join(lacks)}"
            raise check.error("environment", got, "all that vlp needs", f"pip install {ROOT}")
        print(f"environment: {environment()}", flush=True)
    return args


@functools.cache
def environment() -> str:
    """One line: the commit, Python, JAX, processor, GPUs and XLA flags. Starts no JAX backend."""
    parts = [f"vlp {version('vlp') or '(not installed)'}"]
    parts[0] += (
        f" at {commit}"
        if (commit := output("git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"))
        else ""
    )
    parts += [f"{name} {found}" for name in ("jax", "jaxlib") if (found := version(name))]
    parts += [f"Python {platform.python_version()}", f"{platform.system()} {platform.machine()}"]
    parts += [f"{len(os.sched_getaffinity(0))} × {processor()}"]
    cards = output("nvidia-smi", "--query-gpu=name", "--format=csv,noheader").splitlines()
    parts += [f"{cards.count(card)} × {card}" for card in sorted(set(cards))]
    parts += [f"{k}={os.environ[k]}" for k in ("XLA_FLAGS",) if os.environ.get(k)]
    return ", ".join(parts)


def version(package: str) -> str | None:
    """Of an installed package; None if it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def output(*command: str) -> str:
    """What a command prints; "" if it cannot be run or fails."""
    if shutil.which(command[0]) is None:
        return ""
    found = subprocess.run(command, capture_output=True, text=True)
    return found.stdout.strip() if found.returncode == 0 else ""


def processor() -> str:
    """The processor's name, and its widest vectors."""
    name, flags = chips.processor()
    return f"{name} {next((v for flag, v in VECTORS.items() if flag in flags), '')}".strip()


VECTORS = {"amx_bf16": "AMX", "avx512f": "AVX-512", "avx2": "AVX2"}


def save(file: str | pathlib.Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Writes the rows as JSON, each with its environment; no file is named by ""."""
    if file:
        named = [{"environment": environment(), **row} for row in rows]
        part = pathlib.Path(f"{file}.part")  # a file that is there stays whole until the new one is
        part.write_text(json.dumps(named, indent=1) + "\n")
        part.replace(file)


def load(file: str | pathlib.Path) -> list[Row]:
    """Returns the rows of an earlier run ([] without one). Raises UserError for another kind of file."""
    if not file or not pathlib.Path(file).exists():
        return []
    with contextlib.suppress(ValueError):
        rows = json.loads(pathlib.Path(file).read_text())
        if isinstance(rows, list) and all(isinstance(row, dict) for row in rows):
            return rows
    raise check.error(
        "--json", repr(str(file)), "rows of an earlier run, or no file", "move it away"
    )


Columns = Mapping[str, tuple[str, str]]  # key of a row → heading, format ("" for text)


def table(rows: Sequence[Mapping[str, Any]], columns: Columns) -> str:
    """The rows in aligned columns; no value: "–"."""
    lines = [[head for head, _ in columns.values()], *(cells(row, columns) for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines)]
    texts = [isinstance(next((r.get(k) for r in rows), None), str) for k in columns]
    return "\n".join(aligned(line, widths, texts) for line in lines)


class Lines:
    """The same where rows take a while: prints each when it is called with it, columns as wide as `width` or wider."""

    def __init__(self, columns: Columns, width: int = 9):
        self._columns, self._widths = columns, [width] * len(columns)
        self._print([head for head, _ in columns.values()])

    def __call__(self, row: Mapping[str, Any]) -> None:
        self._print(cells(row, self._columns))

    def _print(self, line: list[str]) -> None:
        self._widths = [max(width, len(cell)) for width, cell in zip(self._widths, line)]
        print(aligned(line, self._widths, [True] * len(line)), flush=True)


def cells(row: Mapping[str, Any], columns: Columns) -> list[str]:
    values = [(row.get(key), form) for key, (_, form) in columns.items()]
    return ["–" if value is None else format(value, form) for value, form in values]


def aligned(line: list[str], widths: list[int], texts: list[bool]) -> str:
    pad = lambda cell, width, text: cell.ljust(width) if text else cell.rjust(width)
    return "  ".join(map(pad, line, widths, texts)).rstrip()


def missing(modules: Iterable[str]) -> list[str]:
    """Returns the modules that are not installed, without importing any."""
    absent = lambda name: (
        sys.modules[name] is None if name in sys.modules else importlib.util.find_spec(name) is None
    )
    return [name for name in modules if absent(name)]


def missing_in(python: str, modules: Sequence[str]) -> list[str]:
    """Returns the modules that another interpreter lacks. Raises UserError if `python` is not an interpreter."""
    code = (
        "import importlib.util as u, sys; print(*(n for n in sys.argv[1:] if not u.find_spec(n)))"
    )
    try:
        found = subprocess.run([python, "-c", code, *modules], capture_output=True, text=True)
    except OSError as error:
        got = f"{python!r} ({error.strerror})"
        raise check.error("--rival-python", got, "a Python", "name one") from None
    if found.returncode:
        raise check.error("--rival-python", repr(python), "a Python", "name one")
    return found.stdout.split()


def allow_any_torchvision() -> None:
    """Lets open_clip be imported where torchvision was built for another torch: it needs two names of it, no more."""
    import torch

    with contextlib.suppress(ImportError):
        try:
            import torchvision  # noqa: F401
        except RuntimeError:  # torchvision's own operators do not load
            for name in [n for n in sys.modules if n.partition(".")[0] == "torchvision"]:
                del sys.modules[name]
            library = torch.library.Library("torchvision", "DEF")
            for op in ("nms", "qnms"):
                library.define(f"{op}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
            KEPT.append(library)  # keeps the reference: without it torch removes the operators


KEPT: list[Any] = []


class Failed(RuntimeError):
    """A worker ended, or took too long; the message is one line."""


class Worker:
    """A process that answers each line of JSON with one (`serve`), so that two sides can take turns.

    command: after the interpreter. python: another interpreter than this one. environ: added to this process's.
    """

    def __init__(
        self, *command: str, python: str = sys.executable, environ: Mapping[str, str] | None = None
    ):
        path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
        self._errors = tempfile.TemporaryFile("w+")
        self._process = subprocess.Popen(
            [python, *command], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=self._errors, text=True, env=os.environ | {"PYTHONPATH": path} | dict(environ or {}),
        )  # fmt: skip

    def ask(self, secs: float = 3600, **request: Any) -> Row:
        """Returns the worker's answer. Raises Failed if it ended or did not answer within `secs`."""
        assert self._process.stdin and self._process.stdout
        late = threading.Event()
        timer = threading.Timer(secs, lambda: (late.set(), self._process.kill()))
        timer.start()
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
            for line in self._process.stdout:
                if line.startswith(ANSWER):
                    return json.loads(line.removeprefix(ANSWER))
        except BrokenPipeError:
            pass
        finally:
            timer.cancel()
        self.close()
        raise Failed(f"no answer within {secs:.0f} s" if late.is_set() else self._last_words())

    def _last_words(self) -> str:
        self._errors.seek(0)
        lines = [line.strip() for line in self._errors.read().splitlines() if line.strip()]
        return lines[-1][:300] if lines else f"its process ended with {self._process.returncode}"

    def close(self) -> None:
        self._process.kill()
        self._process.wait()


ANSWER = "ANSWER "


def serve(handle: Callable[..., Mapping[str, Any]]) -> None:
    """Answers each line of standard input, a JSON object of arguments, with the object that `handle` returns."""
    for line in sys.stdin:
        print(ANSWER + json.dumps(handle(**json.loads(line))), flush=True)
