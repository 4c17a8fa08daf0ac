"""One run per workdir at a time: a file lock on a disk, a lease in a store.

A lease is an object in workdir/.lease that process 0 rewrites every `SECS` / 4 seconds. A start that finds one watches
it: a lease that changes belongs to a run that is going on; one that stays the same for `SECS` is given up, so clocks of
hosts are never compared. Leases are numbered, and a new one is made by a request that succeeds for one caller only
("if it does not exist"). A run whose lease is not the newest has lost the workdir and stops.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import pathlib
import secrets
import socket
import threading
import time
from typing import IO, Any, Protocol, runtime_checkable

import jax

from vlp.core import check, paths
from vlp.core.appended import open_text
from vlp.runtime.workdir import LEASE

log = logging.getLogger(__name__)
SECS = 60.0  # a lease that is not renewed for so long is given up


@runtime_checkable
class Lock(Protocol):
    """The right to write in a workdir."""

    def check(self) -> None:
        """Raises Failed if another start took the workdir over."""

    def close(self) -> None: ...


def lock(workdir: paths.Path) -> Lock:
    """Makes the workdir and locks it, on process 0. Close the lock when the run has written its last file.

    Raises:
        UserError: another process holds it: both would write the same metrics and checkpoints.
    """
    if not paths.is_remote(workdir):
        return _FileLock(pathlib.Path(workdir))
    return _Lease(workdir) if jax.process_index() == 0 else _Nothing()


def _taken(workdir: paths.Path, by: str = "") -> check.UserError:
    do = "wait for it, stop it, or choose another --workdir"
    return check.error(f"--workdir {workdir}", f"a run that is going on{by}", "a free workdir", do)


class _Nothing:
    def check(self) -> None: ...

    def close(self) -> None: ...


class _FileLock:
    def __init__(self, workdir: pathlib.Path):
        try:
            workdir.mkdir(parents=True, exist_ok=True)
            self._file: IO[str] = open_text(workdir / ".lock", "a")
        except OSError as e:
            got, do = str(e), "choose another --workdir"
            expected = "a directory to write to"
            raise check.error(f"--workdir {workdir}", got, expected, do) from None
        if jax.process_index() == 0:
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                self._file.close()
                raise _taken(workdir) from None
            except OSError:  # a file system without locks
                log.warning("%s cannot be locked; do not start a second run in it", workdir)

    def check(self) -> None: ...

    def close(self) -> None:
        self._file.close()


class _Lease:
    def __init__(self, workdir: paths.Path):
        self._workdir, self._folder = workdir, workdir / LEASE
        self._mine = {"host": socket.gethostname(), "token": secrets.token_hex(8), **_process()}
        self._beats, self._lost = 0, ""
        self._closed = threading.Event()
        self._own = self._acquire()
        self._thread = threading.Thread(target=self._renew, daemon=True, name="lease")
        self._thread.start()

    def check(self) -> None:
        if self._lost:
            raise check.Failed(
                f"--workdir {self._workdir}: got a workdir that {self._lost} took over, expected this run's own; "
                "what was saved is kept; stop one of the two runs"
            )

    def close(self) -> None:
        self._closed.set()
        self._thread.join(SECS)
        if not self._lost:
            try:
                paths.write(self._own, self._text(released=True))
            except (OSError, check.UserError) as e:  # the next start waits until it is given up
                log.warning("%s: lease not given back (%s)", self._workdir, check.line(e))

    def _text(self, **more: Any) -> bytes:
        return (json.dumps({**self._mine, "beats": self._beats, **more}) + "\n").encode()

    def _acquire(self) -> paths.Path:
        while True:
            found = paths.listing(self._folder)
            number = int(found[-1].stem) if found else 0
            if found and not _is_free(found[-1]):
                self._watch(found[-1])
            own = self._folder / f"{number + 1:09d}.json"
            if paths.create(own, self._text()):
                for old in found:
                    paths.remove(old)
                return own

    def _watch(self, path: paths.Path) -> None:
        """Returns once a lease is given up. Raises UserError if it is renewed or another start takes it over."""
        first = _load(path)
        who = f" on {first.get('host')}"
        log.info(
            "%s: waiting up to %.0f s for the lease of a run%s that may be going on",
            self._workdir, SECS, who,
        )  # fmt: skip
        until = time.monotonic() + SECS
        while time.monotonic() < until:
            time.sleep(SECS / 30)
            now = _load(path)
            if now.get("released") or not now:
                return
            if now != first:
                raise _taken(self._workdir, who)
        log.warning("%s: took over from a run%s that has stopped", self._workdir, who)

    def _renew(self) -> None:
        while not self._closed.wait(SECS / 4):
            try:
                found = paths.listing(self._folder)
                if not found or found[-1] != self._own:
                    by = _load(found[-1]).get("host") if found else "another host"
                    self._lost = f"a run on {by}"
                    log.error("%s: another start took this workdir over", self._workdir)
                    return
                self._beats += 1
                paths.write(self._own, self._text())
            except (OSError, check.UserError) as e:
                log.warning("%s: lease not renewed for now (%s)", self._workdir, check.line(e))


def _load(path: paths.Path) -> dict[str, Any]:
    """Returns a lease; {} if it is gone, or not one."""
    try:
        found = json.loads(paths.read(path))
    except (FileNotFoundError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _is_free(path: paths.Path) -> bool:
    """True for a lease that was released, or whose process was on this machine and is dead."""
    found, here = _load(path), _process()
    if not found or found.get("released"):
        return True
    same = all(found.get(k) == here[k] for k in ("boot", "space"))
    return same and _started(found.get("pid", 0)) != found.get("started")


def _process() -> dict[str, Any]:
    """Returns what tells this process from any other: machine since its start, pid namespace, pid, start time."""
    text = lambda path: pathlib.Path(path).read_text().strip()
    try:
        boot = text("/proc/sys/kernel/random/boot_id")
        space = os.readlink("/proc/self/ns/pid")
    except OSError:  # not Linux
        boot, space = secrets.token_hex(8), ""
    return {"boot": boot, "space": space, "pid": os.getpid(), "started": _started(os.getpid())}


def _started(pid: int) -> str:
    """Returns a process's start time, "" if there is no such process."""
    try:
        stat = pathlib.Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return ""
    fields = stat.rpartition(")")[2].split()  # the name before may hold spaces
    return "" if fields[0] in "ZX" else fields[19]
