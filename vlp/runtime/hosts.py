"""Runs of several processes (hosts): rank of this process, roll call before the start, joint errors.

If a process is missing, `jax.distributed.initialize(initialization_timeout=…)` aborts all others with SIGABRT,
"DEADLINE_EXCEEDED" and a C++ stack trace. Python cannot catch it, and no process is named (JAX 0.10.2).
So the processes first connect to the coordinator's port by TCP, and JAX starts when all are connected. If that fails
within `secs`, every process prints one line that names the processes that are missing, differ from process 0 in config
or code, or do not see its workdir. Later decisions: core/agree.py.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import functools
import json
import logging
import os
import re
import secrets
import socket
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np

from vlp.ckpt import orbax_io
from vlp.core import agree, check, paths
from vlp.core.config import difference, plain
from vlp.runtime.workdir import SHARED

log = logging.getLogger(__name__)
SECS = 40.0  # how long a process waits for the others; all of them have ended within a minute
_SEE_SECS = (
    10.0  # how long a file of process 0 may take to show on another host (NFS caches directories)
)
_LINE = 1 << 24  # bytes of one message at most: a config


@dataclasses.dataclass(frozen=True)
class Place:
    """This process's place in a run.

    coordinator: "host:port" of process 0. num: number of processes. process: its number, from 0. local: ids of the
    devices that it uses (None: all of its host).
    """

    coordinator: str
    num: int
    process: int
    local: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        host, _, port = self.coordinator.rpartition(":")
        if not (host and port.isdecimal() and 0 < int(port) < 1 << 16):
            do = "give the address of process 0"
            raise check.error("--coordinator", repr(self.coordinator), "HOST:PORT", do)
        if self.num < 1 or not 0 <= self.process < self.num:
            got = f"process {self.process} of {self.num}"
            do = "number the processes from 0"
            raise check.error("--process", got, f"one of 0 … {self.num - 1}", do)

    @property
    def address(self) -> tuple[str, int]:
        host, _, port = self.coordinator.rpartition(":")
        return host.strip("[]"), int(port)


def find(coordinator: str = "", num: int | None = None, process: int | None = None) -> Place | None:
    """Finds this process's place in the run.

    The arguments come first, then JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID, then the cluster that
    JAX detects (Cloud TPU, Slurm, Open MPI, Kubernetes).

    Args:
        coordinator: "host:port" of process 0; "none": a run of one process; ignores the environment.
        num: number of processes.
        process: number of this process, from 0.

    Returns:
        The place; None for a run of one process.

    Raises:
        UserError: some of the three are known and others are not.
    """
    if coordinator == "none":
        return None
    coordinator = coordinator or os.environ.get("JAX_COORDINATOR_ADDRESS", "")
    num = _number("JAX_NUM_PROCESSES") if num is None else num
    process = _number("JAX_PROCESS_ID") if process is None else process
    if coordinator and num is not None and process is not None:
        return Place(coordinator, num, process)
    given = (coordinator or None, num, process)
    address, num, process, local = _detected(*given)
    if address is None or num is None or process is None:
        if given == (None, None, None):
            return None
        got = ", ".join(f"{k}={v}" for k, v in zip(("coordinator", "processes", "process"), given))
        do = "give --coordinator HOST:PORT --processes N --process I (or none of them on a cluster)"
        raise check.error("vlp train", got, "all three", do)
    return None if num == 1 else Place(address, num, process, local)


def _number(name: str) -> int | None:
    text = os.environ.get(name, "")
    if text and not text.isdecimal():
        raise check.error(name, repr(text), "a number", "correct it")
    return int(text) if text else None


def _detected(
    coordinator: str | None, num: int | None, process: int | None
) -> tuple[str | None, int | None, int | None, tuple[int, ...] | None]:
    """What `jax.distributed.initialize` would fill in: coordinator, number of processes, this one's, its devices.

    Private to JAX: its one public function detects and connects in one call, and aborts if a process is missing.
    """
    try:
        from jax._src.clusters import ClusterEnv

        detect = ClusterEnv.auto_detect_unset_distributed_params
        found = detect(coordinator, num, process, None, None, int(SECS))
        coordinator, num, process, local = found
    except (ImportError, AttributeError, TypeError, OSError) as e:  # another JAX; no metadata
        log.warning("no cluster found (%s); if this is one, give --coordinator", e)
        return coordinator, num, process, None
    except RuntimeError as e:  # the coordinator's name is not known
        raise check.error("hosts", str(e), "process 0 to be up", "start it") from e
    return coordinator, num, process, None if local is None else tuple(local)


@contextlib.contextmanager
def joined(
    place: Place | None, facts: Mapping[str, Any], workdir: paths.Path, secs: float = SECS
) -> Iterator[None]:
    """Inside, this process takes part in the run. Does nothing for one process.

    An error inside prints its line and ends the process at once: an orderly shutdown would wait for processes that wait
    for this one.

    Args:
        place: from `find`.
        facts: what must be equal on all processes (config, versions).
        workdir: must be one directory for all processes.
        secs: how long to wait for the others, in seconds.

    Raises:
        UserError: from `roll_call`.
    """
    if place is None or place.num == 1:
        yield
        return
    roll_call(place, facts, workdir, secs)
    jax.config.update("jax_enable_preemption_service", False)  # runtime/stop.py takes SIGTERM
    orbax_io.bound_barriers()
    jax.distributed.initialize(
        place.coordinator,
        place.num,
        place.process,
        place.local,
        cluster_detection_method="deactivate",  # all was detected
        shutdown_timeout_seconds=60,
    )
    try:
        _check_devices()
        log.info("process %d of %d, on %s", place.process, place.num, _host())
        if place.process:  # only process 0 logs
            logging.getLogger().setLevel(logging.WARNING)
        yield
    except BaseException as error:
        where = f"process {place.process} on {_host()}"
        text, code = check.answer(error) or _lost(error) or ("", 1)
        if text:
            print(f"vlp: {text}", file=sys.stderr)
        else:
            traceback.print_exc()
            text = f"{type(error).__name__}: {error}"
        agree.announce("failed", text if text.startswith("process ") else f"{where}: {text}")
        agree.leave(code)
    jax.distributed.shutdown()


def _lost(error: BaseException) -> tuple[str, int] | None:
    """Returns the line and exit code for an error whose cause is another process; None if it is this one's own."""
    if not isinstance(error, jax.errors.JaxRuntimeError):
        return None
    if said := agree.announced().get("failed"):
        return said, 1
    reason = check.line((str(error).splitlines() or [""])[0])[:160]
    if re.search("gloo|closed by peer|connection reset|unavailable|heartbeat", reason.lower()):
        do = "look at the output of the others, and start all again"
        return f"hosts: got {reason}, expected all processes to go on; {do}", 1
    return None


def _check_devices() -> None:
    counts = np.bincount([d.process_index for d in jax.devices()], minlength=jax.process_count())
    if len(set(counts.tolist())) > 1:
        odd = int(np.argmax(counts != np.bincount(counts).argmax()))
        usual = int(np.bincount(counts).argmax())
        do = "look at its accelerators and installation"
        raise check.error(f"process {odd}", f"{counts[odd]} devices", f"{usual} as others", do)


# ---- the roll call


def roll_call(place: Place, facts: Mapping[str, Any], workdir: paths.Path, secs: float) -> None:
    """Returns once all processes have come, agree on `facts` and see the workdir of process 0.

    Args: as of `joined`.

    Raises:
        UserError: on every process that has come, with the same message.
    """
    facts = {"processes": place.num, **facts}
    if place.process == 0:
        problem = asyncio.run(_lead(place, facts, workdir, secs))
    else:
        problem = _follow(place, facts, workdir, secs)
    if problem:
        raise check.UserError(problem)


@dataclasses.dataclass(frozen=True)
class _Guest:
    host: str
    facts: Mapping[str, Any]
    until: float  # when its own wait ends (time.monotonic)
    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter

    def tell(self, **message: Any) -> None:
        self.writer.write(json.dumps(message).encode() + b"\n")


async def _lead(place: Place, facts: Mapping[str, Any], workdir: paths.Path, secs: float) -> str:
    """Process 0: waits for the others and sends all of them the problem, which it returns ("": none)."""
    here: dict[int, _Guest] = {}
    guests: list[_Guest] = []  # every connection, also of a process that came twice
    news = asyncio.Event()
    twice: list[str] = []

    async def greet(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            hello = json.loads(await asyncio.wait_for(reader.readline(), 10))
            number, host, until = hello["process"], hello["host"], time.monotonic() + hello["left"]
            guest = _Guest(host, hello["facts"], until, reader, writer)
        except (TimeoutError, ValueError, KeyError, TypeError, OSError):
            writer.close()  # another program
            return
        if number in here and not here[number].reader.at_eof():
            twice.append(f"process {number} twice (on {here[number].host} and {host})")
        here[number] = guest
        guests.append(guest)
        news.set()

    until = time.monotonic() + secs
    try:
        server = await asyncio.start_server(
            greet, None, place.address[1], limit=_LINE, backlog=1024
        )
    except OSError as e:
        do = "stop what uses the port, or choose another"
        raise check.error(
            f"--coordinator {place.coordinator}", e.strerror, "a free port", do
        ) from e
    async with server:
        while len(here) < place.num - 1 and not twice:
            left = min([until, *(g.until for g in here.values())]) - time.monotonic()
            try:
                await asyncio.wait_for(news.wait(), left)
            except TimeoutError:
                break
            news.clear()
        problem = _verdict(place, facts, here, twice, secs)
        if not problem:
            problem = await _shared(workdir, here)
        for guest in guests:
            guest.tell(problem=problem)
        with contextlib.suppress(
            asyncio.TimeoutError
        ):  # they close first, which frees the port for JAX
            reads = (guest.reader.read() for guest in guests)
            await asyncio.wait_for(asyncio.gather(*reads, return_exceptions=True), 5)
        for guest in guests:
            guest.writer.close()
    return problem


def _verdict(
    place: Place,
    facts: Mapping[str, Any],
    here: Mapping[int, _Guest],
    twice: list[str],
    secs: float,
) -> str:
    """The error's message for who is missing, came twice or differs; "" if nothing is wrong."""
    if twice:
        do = "give each its own --process"
        return str(check.error("hosts", twice[0], "each process once", do))
    for number, guest in sorted(here.items()):
        if changes := difference(plain(facts), plain(guest.facts)):
            more = f" and {len(changes) - 1} more" if len(changes) > 1 else ""
            where, expected = f"process {number} on {guest.host}", "what process 0 has"
            do = "start all with the same command and the same code"
            return str(check.error(where, f"another {changes[0]}{more}", expected, do))
    missing = [n for n in range(1, place.num) if n not in here]
    if missing:
        seen = {0: _host(), **{n: guest.host for n, guest in sorted(here.items())}}
        known = ", ".join(f"{n} on {host}" for n, host in list(seen.items())[:8])
        got = f"{len(seen)} of {place.num} processes within {secs:.0f} s; missing: {agree.numbers(missing)}"
        do = "start the missing ones, or look at their output"
        return str(check.error("hosts", got, f"all (here: {known})", do))
    return ""


async def _shared(workdir: paths.Path, here: Mapping[int, _Guest]) -> str:
    """Writes a token into the workdir and asks every process whether it sees it; returns an error's message or ""."""
    made = []  # folders to remove again; a store has none
    if not paths.is_remote(workdir):
        made = [p for p in (workdir, *workdir.parents) if not paths.exists(p)]
    token = workdir / f".{secrets.token_hex(8)}{SHARED}"
    do = "give a --workdir that all hosts share (NFS, gs://…, s3://…)"
    try:
        paths.make_dir(workdir)
        paths.write(token, b"")
    except (OSError, check.Failed) as e:
        do = "choose another --workdir"
        return str(check.error(f"--workdir {workdir}", str(e), "a directory to write to", do))
    try:
        for guest in here.values():
            guest.tell(token=str(token))
        for number, guest in sorted(here.items()):
            try:
                answer = json.loads(await asyncio.wait_for(guest.reader.readline(), 2 * _SEE_SECS))
            except (TimeoutError, ValueError, OSError):
                return str(
                    check.error(
                        f"process {number} on {guest.host}",
                        "no answer",
                        "one",
                        "look at its output",
                    )
                )
            if not answer["seen"]:
                got = f"not shared: process {number} on {guest.host} does not see what process 0 wrote"
                return str(check.error(f"--workdir {workdir}", got, "one directory for all", do))
    finally:
        paths.remove(token)
        for path in made:
            with contextlib.suppress(OSError):
                os.rmdir(path)
    return ""


def _follow(place: Place, facts: Mapping[str, Any], workdir: paths.Path, secs: float) -> str:
    """Any other process: reports to process 0 and returns the problem that it answers ("": none)."""
    until = time.monotonic() + secs
    silent = "no answer"
    while (left := until - time.monotonic()) > 0:
        try:
            with socket.create_connection(place.address, timeout=min(left, 5)) as line:
                line.settimeout(left + 3 * _SEE_SECS)
                hello = {"process": place.process, "host": _host(), "left": left, "facts": facts}
                line.sendall(json.dumps(plain(hello)).encode() + b"\n")
                with line.makefile("rb") as answers:
                    message = json.loads(answers.readline(_LINE))
                    if "token" in message:
                        token = workdir / message["token"].rpartition("/")[2]
                        seen = appears(token, functools.partial(paths.exists, token))
                        line.sendall(json.dumps({"seen": seen}).encode() + b"\n")
                        message = json.loads(answers.readline(_LINE))
                    return message["problem"]
        except (OSError, ValueError) as e:  # refused, unreachable, hung up
            silent = getattr(e, "strerror", None) or "hung up"
            time.sleep(min(0.25, max(until - time.monotonic(), 0)))
    got = f"no answer from process 0 at {place.coordinator} within {secs:.0f} s ({silent})"
    do = "start process 0, or check the address and whether the port is open"
    return str(check.error("hosts", got, "the coordinator", do))


def appears(path: paths.Path, good: Callable[[], bool]) -> bool:
    """Returns whether `good` becomes true, within the time that a file of another host may take to show here."""
    until = time.monotonic() + _SEE_SECS
    while not good():
        if time.monotonic() > until:
            return False
        with contextlib.suppress(OSError):
            paths.listing(path.parent)  # makes NFS look again
        time.sleep(0.2)
    return True


def _host() -> str:
    return socket.gethostname()


# ---- joint decisions


@contextlib.contextmanager
def raise_together(where: str) -> Iterator[dict[str, Any]]:
    """If any process raises inside, every process raises. No-op in a run of one process.

    Nothing inside may wait for other processes.

    Yields:
        A dict. What is put into it must be plain data and equal on all processes.

    Raises:
        UserError: names the first process that raised, or whose dict differs from that of process 0.
    """
    reported: dict[str, Any] = {}
    if not jax.distributed.is_initialized():
        yield reported
        return
    error: Exception | None = None
    try:
        yield reported
    except Exception as e:
        error = e
    problem = "" if error is None else str(error) or repr(error)
    mine = {"host": _host(), "problem": problem, "reported": plain(reported)}
    found = agree.decide(where, mine, functools.partial(_first_problem, where))
    if error is not None:
        raise error
    if found:
        raise check.UserError(found)


def _first_problem(where: str, answers: list[dict[str, Any]]) -> str:
    """Returns the error of the first process that raised, or whose facts differ from those of process 0; or ""."""
    for number, answer in enumerate(answers):
        if answer["problem"]:
            return f"process {number} on {answer['host']}: {answer['problem']}"
    for number, answer in enumerate(answers):
        if changes := difference(answers[0]["reported"], answer["reported"]):
            got, do = f"another {changes[0]}", "make them equal"
            place = f"{where}: process {number} on {answer['host']}"
            return str(check.error(place, got, "what process 0 has", do))
    return ""
