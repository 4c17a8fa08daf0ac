"""Errors that a user can act on: one line, `where: got X, expected Y; do Z`.

The command line turns a `UserError` into exit code 2 and prints its message alone, and so it does with what the
machine refused (`Failed`, a full disk), with exit code 1; any other exception is a crash (1, with its traceback).
"""

import difflib
import errno
import os
import pathlib
import re
import resource
import sys
from collections.abc import Callable, Iterable, Mapping
from typing import NoReturn


class UserError(ValueError):
    """A mistake in a config, a command or a file; its message says what to do."""


class Failed(RuntimeError):
    """Something outside of the program failed (a disk, another process); the message says what is kept."""


# What an operating system refuses whatever the program does.
_MACHINE = (
    errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO, errno.ENOMEM, errno.EMFILE, errno.ENFILE,
    errno.EACCES, errno.EPERM, errno.ESTALE, errno.ELOOP, errno.ENOTDIR, errno.ENAMETOOLONG,
)  # fmt: skip


def failure(e: BaseException) -> str:
    """What to print for an error of the machine in one line; "" for a crash."""
    error: BaseException | None = e
    while error is not None:  # the first that says it, not what failed to close after it
        if isinstance(error, Failed):
            return str(error)
        error = error.__context__
    if isinstance(e, OSError) and e.errno in _MACHINE:
        where = os.fsdecode(e.filename) if isinstance(e.filename, str | bytes) else "a file"
        return f"{where}: got {e.strerror}, expected to read or write it; mend that and repeat the command"
    return ""


class MachineError(UserError):
    """A limit or a fault of the machine: nothing that was being read is to blame for it."""


_FAULTS = {  # by errno: what to do
    errno.EMFILE: "raise the limit with `ulimit -n`",
    errno.ENFILE: "close other programs' files",
    errno.ENOSPC: "free space",
    errno.EDQUOT: "free space",
    errno.EIO: "check the disk or the network mount",
    errno.ENOMEM: "use fewer workers or smaller batches",
}


def machine(where: object, e: BaseException) -> MachineError | None:
    """Returns the error to raise if `e` is a fault of the machine, from Python or from a library; else None."""
    if isinstance(e, MachineError):
        return e
    code = errno.ENOMEM if isinstance(e, MemoryError) else getattr(e, "errno", None)
    if code is None and isinstance(e, RuntimeError | OSError):  # compiled libraries: words alone
        code = next((n for n in _FAULTS if os.strerror(n).lower() in str(e).lower()), None)
    if code not in _FAULTS:
        return None
    got = os.strerror(code)
    if code == errno.EMFILE:
        got += f" (this process may hold {resource.getrlimit(resource.RLIMIT_NOFILE)[0]})"
    return MachineError(f"{where}: got {got}, expected room for more; {_FAULTS[code]}")


def line(text: object) -> str:
    """A message as one line of text: what a terminal would not show (line breaks of a name, say) is written out."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in str(text))


def answer(e: BaseException) -> tuple[str, int] | None:
    """The line to print for an error, and its exit code: 2 for a user's mistake, 1 for a fault of the machine.

    None for a crash.
    """
    if isinstance(e, UserError):
        return line(e), 1 if isinstance(e, MachineError) else 2
    told = failure(e)
    return (line(told), 1) if told else None


def run(main: Callable[[], int | None]) -> NoReturn:
    """Ends a script with its main's exit code; with 2 and one line for a mistake of the user's."""
    try:
        sys.exit(main())
    except UserError as mistake:
        told = answer(mistake)
        assert told is not None
        print(told[0], file=sys.stderr)
        sys.exit(told[1])


def output_file(where: str, path: str | pathlib.Path | None) -> None:
    """Raises UserError unless `path` can be a file to write ("" or None: there is none), before work is done for it."""
    if path and pathlib.Path(path).is_dir():
        raise error(where, f"the directory {str(path)!r}", "a file", "name one in it")
    if path and not pathlib.Path(path).absolute().parent.is_dir():
        raise error(where, repr(str(path)), "a file in an existing directory", "make it")


def counts(options: Mapping[str, object], *may_be_zero: str) -> None:
    """Raises UserError for a whole number among a script's options (or in a list of them) that is below 1."""
    for name, value in options.items():
        for num in value if isinstance(value, list) else [value]:
            least = 0 if name in may_be_zero else 1
            if isinstance(num, int) and not isinstance(num, bool) and num < least:
                raise error(f"--{name.replace('_', '-')}", num, f"{least} or more", "change it")


def error(where: str, got: object, expected: object, do: str) -> UserError:
    """Returns (does not raise) the error `where: got X, expected Y; do Z`."""
    return UserError(f"{where}: got {got}, expected {expected}; {do}")


def unknown(where: str, got: str, known: Iterable[str]) -> UserError:
    """Returns the error for a name that is not one of `known`, with the closest match."""
    known = sorted(known)
    near = difflib.get_close_matches(got, known, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}?" if near else "use one of them"
    return error(where, repr(got), f"one of {known}", hint)


def pattern(where: str, text: str) -> None:
    """Raises UserError unless the text is a regular expression."""
    try:
        re.compile(text)
    except re.error as e:
        raise error(where, repr(text), f"a regular expression ({e})", "correct it") from None


def bounds(where: str, section: object, rules: Mapping[str, tuple[bool, str]]) -> None:
    """Raises UserError for the first field whose rule, (holds, what is expected), does not hold."""
    for field, (holds, expected) in rules.items():
        if not holds:
            raise error(f"{where}.{field}", getattr(section, field), expected, "change the config")
