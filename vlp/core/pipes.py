"""Standard output whose reader may leave before the end, as in `vlp … | head`."""

import io
import os
import sys

SIGPIPE = 141  # the exit code that a shell gives for it


def guard(ends: bool) -> None:
    """Replaces standard output and error by streams that raise no BrokenPipeError when their reader leaves.

    Args:
        ends: the process exits with code `SIGPIPE`, in silence. Otherwise it works on, and what it and its later
            children print goes nowhere.
    """
    for name, number in (("stdout", 1), ("stderr", 2)):
        old = getattr(sys, name)
        if type(old) is not io.TextIOWrapper or old.fileno() != number:
            continue
        old.flush()
        raw = _Output(number, ends and name == "stdout")
        buffer = raw if isinstance(old.buffer, io.FileIO) else io.BufferedWriter(raw)  # python -u
        new = io.TextIOWrapper(
            buffer, old.encoding, old.errors,
            line_buffering=old.line_buffering, write_through=old.write_through,
        )  # fmt: skip
        setattr(sys, name, new)


class _Output(io.FileIO):
    def __init__(self, number: int, ends: bool):
        super().__init__(number, "w", closefd=False)
        self._ends = ends

    def write(self, data, /) -> int | None:
        try:
            return super().write(data)
        except BrokenPipeError:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self.fileno())
            os.close(nowhere)
            if self._ends:
                raise SystemExit(SIGPIPE) from None
            return len(data)
