"""Signals and hangs: SIGTERM and Ctrl-C save and stop a run; a run that makes no progress is ended."""

from __future__ import annotations

import faulthandler
import json
import os
import signal
import socket
import sys
import threading
import time
from types import FrameType, TracebackType

import jax

from vlp.core import interrupt, paths

PREEMPTED = 75  # exit code: saved; start the run again
HANG = 76  # exit code: no progress


class Stop:
    """Inside `with`, the first SIGTERM or Ctrl-C requests a stop; a second Ctrl-C interrupts at once.

    Before `work` is called there is nothing to save, and the first Ctrl-C interrupts at once.
    """

    def __init__(self) -> None:
        self._asked = False
        self._previous: dict[int, object] = {}
        self._handler = self._ask  # one bound method, so that `is` recognises it later

    def __enter__(self) -> Stop:
        if threading.current_thread() is threading.main_thread():
            single = (
                jax.process_count() == 1
            )  # else JAX handles SIGTERM and all hosts stop after one step
            self._take(signal.SIGTERM if single else signal.SIGINT)
        return self

    def work(self) -> None:
        """Notes that a step was done, so that stopping saves a checkpoint."""
        if self._previous and signal.SIGINT not in self._previous:
            self._take(signal.SIGINT)

    def _take(self, number: int) -> None:
        self._previous[number] = signal.signal(number, self._handler)

    def __exit__(
        self, kind: type | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self._asked and number == signal.SIGINT and not interrupt.watched:
            raise KeyboardInterrupt
        self._asked = True
        if jax.process_count() > 1:
            os.kill(os.getpid(), signal.SIGTERM)

    def asked(self, step: int) -> bool:
        """Returns whether to save and stop after this step; equal on all hosts."""
        if jax.process_count() == 1:
            return self._asked
        from jax.experimental import multihost_utils

        return bool(multihost_utils.reached_preemption_sync_point(step))


class Watchdog:
    """Ends the process with exit code 76 if `beat` is not called for `secs` seconds (0: never).

    Prints the stacks of all threads first. folder: where each process of a run writes its progress; the message names
    the processes that are behind.
    """

    def __init__(self, secs: float, folder: os.PathLike | None = None) -> None:
        self._secs, self._folder = secs, folder if jax.process_count() > 1 else None
        self.last, self.phase, self._beats = time.monotonic(), "start", 0
        self._closed = threading.Event()
        if secs:
            threading.Thread(target=self._watch, daemon=True, name="watchdog").start()

    def beat(self, phase: str) -> None:
        self.last, self.phase = time.monotonic(), phase
        self._beats += 1  # all hosts make the same calls

    def close(self) -> None:
        self._closed.set()

    def _watch(self) -> None:
        while not self._closed.wait(min(self._secs / 4, 5.0)):
            still = time.monotonic() - self.last
            others = self._tell()
            if still > self._secs:
                got = f"no progress for {still:.0f} s in phase {self.phase!r}{others}"
                print(
                    f"run: got {got}, expected some within config.hang_secs; read the stacks below",
                    file=sys.stderr,
                    flush=True,
                )
                faulthandler.dump_traceback(all_threads=True)
                os._exit(HANG)

    def _tell(self) -> str:
        """Writes this process's progress. Returns its name and those of the processes that are behind, as text."""
        if self._folder is None:
            return ""
        me = {"process": jax.process_index(), "host": socket.gethostname()}
        me |= {"beats": self._beats, "phase": self.phase}
        name = lambda row: f"process {row['process']} on {row['host']}"
        try:
            folder = paths.of(self._folder)
            paths.write(folder / f"{me['process']}.json", (json.dumps(me) + "\n").encode())
            files = (folder / f"{i}.json" for i in range(jax.process_count()))
            rows = [json.loads(paths.read(p)) for p in files if paths.exists(p)]
        except (OSError, ValueError) as e:  # the disk fails: report that instead
            return f" ({name(me)}; {e})"
        least = min(row["beats"] for row in rows)
        behind = [f"{name(row)} in {row['phase']!r}" for row in rows if row["beats"] == least]
        last = (
            "no process is behind"
            if len(behind) == len(rows)
            else f"behind: {', '.join(behind[:8])}"
        )
        return f" ({name(me)}; {last})"
