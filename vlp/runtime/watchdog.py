"""Hangs: each process writes heartbeats; a run that makes no progress is ended, and says where it stands.

A heartbeat is a small file in workdir/heartbeats: host, step, phase, since when. In a run of several processes every
process waits for the slowest one, so all of them notice a hang. A process that is frozen or dead cannot say so; the
others see that its heartbeats have stopped.
"""

from __future__ import annotations

import dataclasses
import faulthandler
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Mapping
from typing import Any

import jax

from vlp.core import agree, check, interrupt, paths

HANG = 76  # exit code: no progress
SILENT_SECS = (
    60.0  # a process without heartbeats for so long, while nothing moves: less than JAX's own 100 s
)
_JUDGES = 8  # processes that read all heartbeats; when they have ended, JAX ends the others


@dataclasses.dataclass(frozen=True)
class _Seen:
    """A heartbeat, and when (time.monotonic) it was first seen here."""

    row: Mapping[str, Any]
    at: float


class Watchdog:
    """Ends the process with exit code 76 if `beat` is not called for `secs` seconds (0: never).

    Prints the stacks of all threads first, and which processes are silent or behind.
    """

    def __init__(self, secs: float, folder: os.PathLike | None = None) -> None:
        """Starts the thread.

        Args:
            secs: the longest time without a beat.
            folder: where the processes of a run write their heartbeats, on a disk or in a bucket; used only if there
                are several. All processes call this at the same time.
        """
        self._secs, self._folder = secs, folder if jax.process_count() > 1 else None
        self.last, self.phase, self.step, self._beats = time.monotonic(), "start", 0, 0
        self._closed = threading.Event()
        self._seen: dict[int, _Seen] = {}
        self._written, self._problem, self._count = -1e9, "", 0
        self._told: tuple[int, str] | None = None
        self._looked = -1e9
        remote = folder is not None and paths.is_remote(folder)
        self._look = min(secs / 8, 1.0)  # seconds between two looks of the thread
        self._every = min(secs / 8, 10.0 if remote else 5.0)  # between two heartbeats of one phase
        self._least = min(self._every, 10.0 if remote else 0.0)  # between any two
        if secs:
            token = os.urandom(8).hex()  # tells heartbeats of this start from older ones
            self._start = agree.share("heartbeats", token) if self._folder is not None else token
            threading.Thread(target=self._watch, daemon=True, name="watchdog").start()

    def beat(self, phase: str, step: int | None = None) -> None:
        """Says that the process makes progress, and in what. step: the last step that was begun."""
        self.last, self.phase = time.monotonic(), phase
        self.step = self.step if step is None else step
        self._beats += 1  # all hosts make the same calls

    def close(self) -> None:
        self._closed.set()
        self.phase, self._told = "closed", None
        self._write(time.monotonic() + 2 * self._every)

    def _watch(self) -> None:
        woke = time.monotonic()
        while not self._closed.wait(self._look):
            now = time.monotonic()
            if now - woke > self._look + max(
                5.0, self._secs / 2
            ):  # this process itself was stopped
                self.last += now - woke
                self._seen.clear()
            woke = now
            self._write(now)
            still = now - self.last
            silent = self._silent(now) if still > min(self._secs, SILENT_SECS) / 2 else []
            if still > self._secs or (silent and still > min(self._secs, SILENT_SECS)):
                self._end(still, silent)

    def _end(self, still: float, silent: list[_Seen]) -> None:
        got = f"no progress for {still:.0f} s in phase {self.phase!r}{self._others(silent)}"
        expected = "all processes to answer" if silent else "some within config.hang_secs"
        text = f"run: got {got}, expected {expected}; read the stacks below"
        print(check.line(text), file=sys.stderr, flush=True)
        faulthandler.dump_traceback(all_threads=True)
        interrupt.end_workers()
        if self._folder is not None and jax.process_index() == 0:
            time.sleep(5.0)  # when it ends, JAX ends the others: they may still be writing
        os._exit(HANG)

    # ---- heartbeats

    def _write(self, now: float) -> None:
        """Writes this process's heartbeat, if its phase has lasted a moment or the last one is old."""
        told, age = (self._beats, self.phase), now - self._written
        settled = told != self._told and now - self.last > self._look / 2 and age > self._least
        if self._folder is None or not (settled or age > self._every):
            return
        self._count += 1
        row = {"start": self._start, "process": jax.process_index(), "host": socket.gethostname()}
        row |= {"pid": os.getpid(), "count": self._count, "beats": self._beats, "step": self.step}
        row |= {"phase": self.phase, "phase_secs": round(now - self.last, 1), "time": time.time()}
        try:
            path = paths.of(self._folder) / f"{jax.process_index()}.json"  # pyright: ignore
            paths.write(path, (json.dumps(row) + "\n").encode())
            self._written, self._problem, self._told = now, "", told
        except (OSError, check.UserError) as e:  # the disk fails: no word on the others
            self._written, self._problem = now, str(e)

    def _read(self, now: float) -> None:
        """Reads the heartbeats of all processes."""
        if (
            self._folder is None
            or jax.process_index() >= _JUDGES
            or now - self._looked < self._look
        ):
            return
        self._looked = now
        for number in range(jax.process_count()):
            try:
                row = json.loads(paths.read(paths.of(self._folder) / f"{number}.json"))  # pyright: ignore
                old = self._seen.get(number)
                if row["start"] == self._start and (
                    old is None or old.row["count"] != row["count"]
                ):
                    self._seen[number] = _Seen(row, now)
            except (OSError, ValueError, KeyError, TypeError, check.UserError):
                continue

    def _silent(self, now: float) -> list[_Seen]:
        """Returns the processes whose heartbeats have stopped; [] if this one's cannot be written either."""
        self._read(now)
        limit = max(3 * self._every, min(self._secs, SILENT_SECS) / 4)
        late = [seen for _, seen in sorted(self._seen.items()) if now - seen.at > limit]
        return [] if self._problem else [s for s in late if s.row["phase"] != "closed"]

    def _others(self, silent: list[_Seen]) -> str:
        """Returns this process's name and those of the processes that are silent or behind, as text."""
        if self._folder is None:
            return ""
        now = time.monotonic()
        self._read(now)
        name = lambda row: f"process {row['process']} on {row['host']}"
        where = lambda row: f"{name(row)} in {row['phase']!r} at step {row['step']}"
        me = f"process {jax.process_index()} on {socket.gethostname()}"
        if self._problem:
            return f" ({me}; {self._problem})"
        if silent:
            found = [f"{where(s.row)}, silent for {now - s.at:.0f} s" for s in silent]
            return f" ({me}; {', '.join(found[:8])})"
        rows = [seen.row for _, seen in sorted(self._seen.items())]
        least = min((row["beats"] for row in rows), default=0)
        behind = [where(row) for row in rows if row["beats"] == least]
        if len(behind) == len(rows):
            return f" ({me}; no process is behind)"
        return f" ({me}; behind: {', '.join(behind[:8])})"
