"""Errors that a user can act on: one line, `where: got X, expected Y; do Z`.

The command line prints only the message of a `UserError` and exits with code 2. It does the same for a failure that
is not a user error (`Failed`, or an `OSError` of the machine), with code 1. Any other exception is a crash: code 1,
with its traceback.
"""

import difflib
import errno
import os
import pathlib
import re
import resource
import sys
import sysconfig
import tempfile
import traceback
from collections.abc import Callable, Iterable, Mapping
from typing import NoReturn


class UserError(ValueError):
    """A mistake in a config, a command or a file; its message says what to do."""


class Failed(UserError):
    """A failure that is not a user error: a disk, a limit of the machine, another process, non-finite numbers.

    Its exit code is 1. The message names what is saved. The data being read is not the cause.
    """


_OTHERWISE = "correct that and run the command again"
_FAULTS = {  # of the machine, by errno: what to do
    errno.EMFILE: "raise the limit with `ulimit -n`",
    errno.ENFILE: "close other programs' files",
    errno.ENOSPC: "free space",
    errno.EDQUOT: "free space",
    errno.EIO: "check the disk or the network mount",
    errno.ENOMEM: "use fewer workers or smaller batches",
    errno.EFBIG: "raise the limit with `ulimit -f`",
    errno.EROFS: _OTHERWISE,
    errno.ESTALE: _OTHERWISE,
}
# Errors of a path. Where data names the file, the data is at fault, not the machine.
_OF_PATHS = (errno.EACCES, errno.EPERM, errno.ELOOP, errno.ENOTDIR, errno.ENAMETOOLONG)


def machine(where: object, e: BaseException) -> Failed | None:
    """Returns the error to raise if `e`, from Python or a library, is a fault of the machine; else None."""
    if isinstance(e, Failed):
        return e
    code = errno.ENOMEM if isinstance(e, MemoryError) else getattr(e, "errno", None)
    if code is None and isinstance(e, RuntimeError | OSError):  # compiled libraries: message only
        code = next((n for n in _FAULTS if os.strerror(n).lower() in str(e).lower()), None)
    if code not in _FAULTS:
        return None
    got = os.strerror(code)
    if code == errno.EMFILE:
        got += f" (this process may hold {resource.getrlimit(resource.RLIMIT_NOFILE)[0]})"
    return Failed(f"{where}: got {got}, expected room for more; {_FAULTS[code]}")


def advice(e: OSError, otherwise: str) -> str:
    """Returns what to do about an error of the machine; `otherwise` if nothing is known."""
    return _FAULTS.get(e.errno or 0, otherwise)


def line(text: object) -> str:
    """Returns a message as one line: characters that a terminal would not show (a line break in a name) are escaped."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in str(text))


def answer(e: BaseException) -> tuple[str, int] | None:
    """Returns the line to print for an error and its exit code (2: user error, 1: failure); None for a crash.

    The frames of a `Bug` follow its line.
    """
    if isinstance(e, Bug):
        return f"{line(e)}\n{e.frames}".rstrip(), 1
    if isinstance(e, UserError):
        return line(e), 1 if isinstance(e, Failed) else 2
    error: BaseException | None = e
    while error is not None:  # the first error of the chain, not what failed to close after it
        if isinstance(error, Failed):
            return line(error), 1
        error = error.__context__
    if isinstance(e, OSError) and (e.errno in _FAULTS or e.errno in _OF_PATHS):
        where = os.fsdecode(e.filename) if isinstance(e.filename, str | bytes) else "a file"
        do = _FAULTS.get(e.errno, _OTHERWISE)
        return line(f"{where}: got {e.strerror}, expected to read or write it; {do}"), 1
    return None


def run(main: Callable[[], int | None]) -> NoReturn:
    """Runs main and exits with its code; an error that `answer` knows is printed in one line, with its code."""
    try:
        sys.exit(main())
    except Exception as e:
        if (known := answer(e)) is None:
            raise
        print(known[0], file=sys.stderr)
        sys.exit(known[1])


def output_file(where: str, path: str | os.PathLike | None, *, new: bool = False) -> None:
    """Raises UserError unless a file can be written at `path`. Call it before the work.

    Args:
        where: the option.
        path: "" or None: no file is wanted.
        new: the file must not exist yet.
    """
    if not path:
        return
    got = repr(str(path))
    if os.path.isdir(path):
        raise error(where, f"the directory {str(path)!r}", "a file", "name a file in it")
    if new and os.path.lexists(path):
        raise error(where, f"{got}, which exists", "a new file", "give the path of a new file")
    real = os.path.realpath(path)
    if not os.path.isdir(os.path.dirname(real)):
        raise error(where, got, "a file in an existing directory", "make the directory")
    there = os.path.lexists(real)
    if there and not os.path.isfile(real):
        return  # a device or a pipe: opening it may wait
    try:
        os.close(os.open(real, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666))
        if not there:
            os.unlink(real)
    except OSError as e:
        do = "choose a place that you may write to"
        raise error(where, f"{got} ({e.strerror})", "a file to write", do) from None


def output_dir(where: str, path: str | os.PathLike) -> None:
    """Raises UserError unless files can be written in the directory `path`, which may not exist yet."""
    place = pathlib.Path(path).absolute()
    try:
        while not place.exists():  # raises where a name is too long
            place = place.parent
        tempfile.TemporaryFile(dir=place).close()
    except OSError as e:
        do = "choose a place that you may write to"
        got = f"{str(path)!r} ({e.strerror})"
        raise error(where, got, "a directory to write in", do) from None


def counts(options: Mapping[str, object], *may_be_zero: str) -> None:
    """Raises UserError for a script's option that is an int (or list of ints) below 1; below 0 for `may_be_zero`."""
    for name, value in options.items():
        for num in value if isinstance(value, list) else [value]:
            least = 0 if name in may_be_zero else 1
            if isinstance(num, int) and not isinstance(num, bool) and num < least:
                raise error(
                    f"--{name.replace('_', '-')}", num, f"{least} or more", f"write {least} or more"
                )


def error(where: str, got: object, expected: object, do: str) -> UserError:
    """Returns (does not raise) the error "where: got X, expected Y; do Z"."""
    return UserError(f"{where}: got {got}, expected {expected}; {do}")


def unknown(where: str, got: str, known: Iterable[str]) -> UserError:
    """Returns the error for a name that is not in `known`; it suggests the closest match."""
    known = sorted(known)
    hint = did_you_mean(got, known) or "use one of them"
    return error(where, repr(got), f"one of {known}", hint)


def did_you_mean(got: str, known: Iterable[str], otherwise: str = "") -> str:
    """Returns "did you mean 'x'?" for the name in `known` that is closest to `got`, else `otherwise`.

    If there is both: "did you mean 'x'? else …".
    """
    known = sorted(known)
    near = difflib.get_close_matches(got, known, n=1, cutoff=0.5)
    near = near or [k for k in known if len(got) > 2 and k[:2] == got[:2]][:1]
    hint = f"did you mean {near[0]!r}?" if near else ""
    return f"{hint} else {otherwise}" if hint and otherwise else hint or otherwise


class Bug(Failed):
    """An exception in the code of a method, model or evaluation. `frames`: its calls, without those of libraries."""

    frames = ""


_HERE = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
_LIBRARIES = ("beartype", "flax", "jax", "jaxlib", "jaxtyping", "numpy", "optax")
_MACHINERY = ("cli", "core", "evals/io.py", "plan", "runtime", "train")  # of vlp: calls the others


def bug(where: str, e: BaseException, expected: str = "code that JAX can trace") -> Bug:
    """Returns the error for an exception of code that `vlp` calls: a line with its place, then its own frames.

    The place is the innermost line outside of `vlp`, or else of `vlp`. The whole traceback is that of `__cause__`.
    """
    frames = [f for f in traceback.extract_tb(e.__traceback__) if not _of_library(f.filename)]
    theirs = [f for f in frames if not f.filename.startswith(_HERE + os.sep)]
    place = "".join(f", {f.filename}:{f.lineno}" for f in (theirs or frames)[-1:])
    got = f"{type(e).__name__} ({' '.join(str(e).split())[:300]})"
    do = "correct the code; these calls led there:" if frames else "correct the code"
    found = Bug(str(error(f"{where}{place}", got, expected, do)))
    found.frames = "".join(traceback.format_list(frames)).rstrip()
    return found


def _of_library(file: str) -> bool:
    """Whether a frame's file belongs to Python, to a library that runs others' code, or to vlp's own machinery."""
    if file.startswith(_HERE + os.sep):
        return file[len(_HERE) + 1 :].startswith(_MACHINERY)
    parts = file.split(os.sep)
    for folder in ("site-packages", "dist-packages"):
        if folder in parts:
            return parts[parts.index(folder) + 1].startswith(_LIBRARIES)
    return file.startswith(("<", sysconfig.get_path("stdlib") + os.sep))


def pattern(where: str, text: str) -> None:
    """Raises UserError unless `text` is a regular expression."""
    try:
        re.compile(text)
    except re.error as e:
        raise error(
            where,
            repr(text),
            f"a regular expression ({e})",
            "escape special characters with \\, or write '.*' for all",
        ) from None


def bounds(where: str, section: object, rules: Mapping[str, tuple[bool, str]]) -> None:
    """Raises UserError for the first field of `section` whose rule does not hold.

    Args:
        where: the section's place, "config.optim".
        section: a dataclass.
        rules: field → (whether it holds, what is expected).
    """
    for field, (holds, expected) in rules.items():
        if not holds:
            raise error(
                f"{where}.{field}", getattr(section, field), expected, f"correct {where}.{field}"
            )
