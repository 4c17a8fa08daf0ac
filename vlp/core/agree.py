"""Decisions that all processes of a run share, through JAX's coordinator: bounded in time, by name.

No device takes part, so a decision does not mix with the collectives of the step, and any thread may ask for one. A
process that does not come is named. No-op in a run of one process.
"""

from __future__ import annotations

import collections
import contextlib
import json
import logging
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import jax

from vlp.core import check

log = logging.getLogger(__name__)
SECS = 3600.0  # the slowest process may have to list all of its data first
_TELL_SECS = 60.0  # how often a wait is logged
_asked: collections.Counter[str] = collections.Counter()
_lock = threading.Lock()


def client() -> Any:
    """Returns the client of JAX's coordinator; None in a run of one process."""
    if not jax.distributed.is_initialized():
        return None
    from jax._src import distributed  # JAX offers its key-value store nowhere else

    return distributed.global_state.client


def decide(
    name: str, value: Any, judge: Callable[[list[Any]], Any], secs: float | None = None
) -> Any:
    """Returns `judge([value of process 0, of process 1, …])`, as process 0 computes it, on all processes.

    All processes call this the same number of times with the same name.

    Args:
        name: what is decided, for errors.
        value: JSON-able; this process's.
        judge: called by process 0 only; returns JSON-able data and does not raise.
        secs: how long to wait for the others (default `SECS`).

    Raises:
        Failed: some processes did not come in time; names them.
    """
    if (kv := client()) is None:
        return judge([value])
    secs = SECS if secs is None else secs
    with _lock:
        key = f"vlp/{name}/{_asked[name]}"
        _asked[name] += 1
    me, num = jax.process_index(), jax.process_count()
    if me:
        kv.key_value_set(f"{key}/{me}", json.dumps([socket.gethostname(), value]))
        try:
            text = kv.blocking_key_value_get(f"{key}/verdict", int(1000 * (secs + 5)))
        except jax.errors.JaxRuntimeError as e:
            raise _missing(name, [0], secs) from e
        verdict = json.loads(text)
    else:
        came = _collect(kv, name, key, num, secs)
        if missing := [i for i in range(1, num) if i not in came]:
            verdict = {"missing": missing}
        else:
            verdict = {"value": judge([value, *(came[i] for i in range(1, num))])}
        kv.key_value_set(f"{key}/verdict", json.dumps(verdict))
    if "missing" in verdict:
        raise _missing(name, verdict["missing"], secs)
    return verdict["value"]


def share(name: str, value: Any, secs: float | None = None) -> Any:
    """Returns process 0's value on all processes. Arguments as of `decide`."""
    return decide(name, value, lambda values: values[0], secs)


def numbers(values: Sequence[int]) -> str:
    """[2, 3, 4, 9] → "2-4, 9"."""
    runs: list[list[int]] = []
    for value in values:
        if runs and value == runs[-1][-1] + 1:
            runs[-1].append(value)
        else:
            runs.append([value])
    return ", ".join(str(r[0]) if len(r) == 1 else f"{r[0]}-{r[-1]}" for r in runs)


def _collect(kv: Any, name: str, key: str, num: int, secs: float) -> dict[int, Any]:
    """Waits for the values of the other processes; returns those that came."""
    began = told = time.monotonic()
    pause = 0.01
    while True:
        came = {int(k.rsplit("/", 1)[1]): json.loads(v)[1] for k, v in kv.key_value_dir_get(key)}
        now = time.monotonic()
        if len(came) == num - 1 or now - began > secs:
            return came
        if now - told > _TELL_SECS:
            told, missing = now, [i for i in range(1, num) if i not in came]
            log.info("%s: waiting for process %s … %.0f s", name, numbers(missing), now - began)
        time.sleep(pause)
        pause = min(2 * pause, 0.5)


def _missing(name: str, processes: Sequence[int], secs: float) -> check.Failed:
    who = f"process {numbers(processes)}"
    do = "look at its output and start all processes again"
    return check.Failed(f"{name}: got no answer from {who} within {secs:.0f} s, expected all; {do}")


_NOW = "vlp/now"  # what any process may say to all at any time: {kind: text}


def announce(kind: str, text: str) -> None:
    """Says something to all processes, which read it with `announced`. The first text of a kind stays."""
    if (kv := client()) is not None:
        with contextlib.suppress(jax.errors.JaxRuntimeError):  # said already; no coordinator
            kv.key_value_set(f"{_NOW}/{kind}", text)


def announced() -> dict[str, str]:
    """Returns what was announced, by kind."""
    if (kv := client()) is None:
        return {}
    try:
        return {k.rsplit("/", 1)[1]: v for k, v in kv.key_value_dir_get(_NOW)}
    except jax.errors.JaxRuntimeError:
        return {}


def leave(code: int, secs: float = 5.0) -> NoReturn:
    """Ends this process, after all others have come here too or `secs` have passed.

    Process 0 is the last: a process whose coordinator is gone is aborted by JAX, whatever its own exit code.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    if (kv := client()) is not None:
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            kv.wait_at_barrier("vlp/leave", int(1000 * secs))
        if jax.process_index() == 0:
            time.sleep(1.0)
    os._exit(code)
