"""Stopping a run on request: SIGTERM, Ctrl-C, or a notice that this machine will be taken away.

A request made on one process holds for all. The main thread asks `poll` between steps and between the batches of an
evaluation; all processes stop at the same poll, with the state of the same step. If the main thread does not come to a
poll soon (it compiles, waits for data, or is in a long evaluation), a thread saves the state that `holding` keeps and
ends the process. Killers wait about 30 s: GCE for a spot machine, Kubernetes, Slurm (KillWait).
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType, TracebackType
from typing import Any, NoReturn

import jax

from vlp.core import agree, check, interrupt
from vlp.core.interrupt import PREEMPTED

log = logging.getLogger(__name__)

_LOOK_SECS = 1.0  # how often a process looks whether another one was asked to stop
_PATIENCE, _LAST = (
    1 / 3,
    5 / 6,
)  # shares of the grace: the main thread may come to a poll; all is given up


@dataclasses.dataclass(frozen=True)
class _Held:
    """The state of a step while the main thread leaves it alone. save: starts its checkpoint; None: there is one."""

    step: int
    save: Callable[[], None] | None


class Stop:
    """Inside `with`, the first SIGTERM or Ctrl-C requests a stop; a second Ctrl-C interrupts at once.

    Before `work` is called there is nothing to save, and the first Ctrl-C interrupts at once.

    Attributes:
        grace_secs: seconds between SIGTERM and SIGKILL.
        finish: waits until the last checkpoint is on disk, and gives the workdir back; the loop sets it.
        stopped: whether `poll` has returned True.
        rescuing: whether the thread saves, while the main thread may be computing; no other computation may start.
    """

    def __init__(self, grace_secs: float = 30.0) -> None:
        self.grace_secs = grace_secs
        self.finish: Callable[[], None] = lambda: None
        self.stopped = self.rescuing = False
        self._reason = ""
        self._tick = 0  # polls so far, equal on all processes
        self._at: int | None = None  # the poll at which all processes stop
        self._held: _Held | None = _Held(0, None)  # before the first step nothing is lost
        self._lock = threading.RLock()
        self._wanted, self._closed = threading.Event(), threading.Event()
        self._previous: dict[int, Any] = {}
        self._noted = self._warned = False
        self._handler = self._signalled  # one bound method, so that `is` recognises it later

    def __enter__(self) -> Stop:
        if threading.current_thread() is threading.main_thread():
            self._take(signal.SIGTERM)
        interrupt.at_sigterm(self._sigterm)
        threading.Thread(target=self._serve, daemon=True, name="stop").start()
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
        self._closed.set()
        interrupt.at_sigterm(None)
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    # ---- requests

    def _signalled(self, number: int, frame: FrameType | None) -> None:
        if self._wanted.is_set() and number == signal.SIGINT and not interrupt.watched:
            raise KeyboardInterrupt
        self.ask(signal.Signals(number).name)

    def _sigterm(self) -> None:
        self.ask("SIGTERM")

    def ask(self, reason: str) -> None:
        """Requests a stop; any thread, and a signal handler, may call it."""
        if (
            not self._reason
        ):  # once: a second signal may interrupt `set`, whose lock is not reentrant
            self._reason = reason
            self._wanted.set()

    # ---- the main thread

    def poll(self) -> bool:
        """Returns whether to save and stop now; equal on all processes, which call it at the same places."""
        with self._lock:
            self._tick += 1
            if jax.process_count() == 1:
                self.stopped = self._wanted.is_set()
            else:
                self.stopped = self._at is not None and self._tick >= self._at
            return self.stopped

    def check(self) -> None:
        """Raises `interrupt.Stopped` where `poll` returns True."""
        if self.poll():
            raise interrupt.Stopped

    def note_save(self, secs: float) -> None:
        """Logs how long a save took beside the grace: the first one, and one that does not fit."""
        # one save may be going on when the stop comes, and another one follows
        fits = secs < self.grace_secs * (1 - _PATIENCE) / 2
        if not fits and not self._warned:
            self._warned = True
            log.warning(
                "saving took %.1f s; with config.grace_secs = %g a pre-empted run may lose the steps since its last "
                "checkpoint: use a faster --workdir, or raise grace_secs where the killer waits longer",
                secs, self.grace_secs,
            )  # fmt: skip
        elif not self._noted:
            text = "saving takes %.1f s; a killer waits %g s (config.grace_secs)"
            log.info(text, secs, self.grace_secs)
        self._noted = True

    @contextlib.contextmanager
    def holding(self, step: int, save: Callable[[], None] | None = None) -> Iterator[None]:
        """Inside, nothing changes the state of `step`, so that another thread may save it.

        save: starts its checkpoint; None: its checkpoint exists, or there is nothing to lose.
        """
        with self._lock:
            self._held = _Held(step, save)
        try:
            yield
        finally:
            with self._lock:  # waits here for the end if the thread is saving
                self._held = None

    # ---- the thread

    def _serve(self) -> None:
        while not self._wanted.wait(_LOOK_SECS):
            said = agree.announced()
            if self._closed.is_set():
                return
            if "failed" in said:
                self._fail(said["failed"])
            if "stop" in said:
                self.ask(said["stop"])
        agree.announce("stop", self._reason)
        log.info("%s: saving and stopping, within %.0f s", self._reason, self.grace_secs)
        if jax.process_count() > 1:
            self._agree()
        self._rescue()

    def _fail(self, message: str) -> None:
        """Ends this process for the error of another one, unless it ends by itself."""
        if not self._closed.wait(2.0):  # less than the other one waits in `leave`
            print(f"vlp: {message}", file=sys.stderr)
            agree.leave(1)

    def _agree(self) -> None:
        with self._lock:  # no process passes a poll meanwhile
            with contextlib.suppress(check.Failed):  # one that does not answer
                self._at = agree.decide(
                    "stop", self._tick, lambda ticks: max(ticks) + 1, self.grace_secs * _PATIENCE
                )

    def _rescue(self) -> None:
        """Saves what `holding` keeps and ends the process, if the main thread does not come to a poll."""
        began, asking = time.monotonic(), True
        self._closed.wait(self.grace_secs * _PATIENCE)
        while not self._closed.is_set():
            with self._lock:
                if self.stopped:
                    return
                held = self._held
                same = self._same_step(held) if asking else False
                if same and held is not None:
                    self._save_and_leave(held)
                asking = same is not None
                late = time.monotonic() - began > self.grace_secs * _LAST
                if late and self._reason != "SIGINT":  # nobody kills after Ctrl-C
                    self._leave(PREEMPTED, "stopped; the steps since the last checkpoint are lost")
            time.sleep(1.0)

    def _same_step(self, held: _Held | None) -> bool | None:
        """Returns whether all processes hold the state of one step; None if some do not answer."""
        mine = None if held is None else [held.step, held.save is None]
        same = lambda found: None not in found and all(x == found[0] for x in found)
        with contextlib.suppress(check.Failed):
            return agree.decide("stop: the step that is held", mine, same, 5.0)
        return None

    def _save_and_leave(self, held: _Held) -> NoReturn:
        self.rescuing = True
        try:
            if held.save is not None:
                held.save()
            self.finish()
        except Exception as e:
            text, code = check.answer(e) or (f"{type(e).__name__}: {e}", 1)
            print(f"vlp: {text}", file=sys.stderr)
            agree.leave(code)
        what = f"stopped at step {held.step} and saved" if held.step else "stopped before a step"
        self._leave(PREEMPTED, f"{what}; the same command continues")

    def _leave(self, code: int, text: str) -> NoReturn:
        log.info(text)
        interrupt.end_workers()
        agree.leave(code)
