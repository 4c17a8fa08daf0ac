"""Notices of Google Compute Engine that this machine will be taken away, from its metadata server.

Looked for only on machines that are Google's by their DMI name (Compute Engine, TPU VMs, GKE's nodes), or if
GCE_METADATA_HOST names a server: on any other machine nothing is asked and nothing waits.
"""

from __future__ import annotations

import contextlib
import http.client
import logging
import os
import pathlib
import threading
import urllib.parse
from collections.abc import Callable, Iterator

log = logging.getLogger(__name__)
_DMI = pathlib.Path("/sys/class/dmi/id/product_name")
_SERVER = "169.254.169.254"  # by address: a name may take seconds to be found
_WAIT_SECS = 60  # the server answers at once if the value changes (wait_for_change)
_RETRY_SECS = 5.0
# key → the value that means that the machine is about to end (MIGRATE_ON_HOST_MAINTENANCE does not)
KEYS = {"preempted": "TRUE", "maintenance-event": "TERMINATE_ON_HOST_MAINTENANCE"}


def server() -> str:
    """Returns "host:port" of the metadata server; "" on machines that have none."""
    if named := os.environ.get("GCE_METADATA_HOST", ""):
        return named
    if os.environ.get("NO_GCE_CHECK", "").lower() == "true" or "TPU_SKIP_MDS_QUERY" in os.environ:
        return ""
    try:
        return _SERVER if _DMI.read_text().strip().startswith("Google") else ""
    except OSError:
        return ""


@contextlib.contextmanager
def watched(ask: Callable[[str], None], address: str | None = None) -> Iterator[None]:
    """Inside, calls `ask(reason)` when the server says that the machine is about to end.

    A maintenance that is announced already when the run starts does not end it: a run that was stopped for it and
    started again on the same machine would never get on. It is logged, and SIGTERM comes at its time.

    Args:
        ask: requests a stop.
        address: of the server; None: `server()`.
    """
    address = server() if address is None else address
    closed = threading.Event()
    for key in KEYS if address else ():
        args = (address, key, ask, closed)
        threading.Thread(target=_follow, args=args, daemon=True, name=f"notice {key}").start()
    try:
        yield
    finally:
        closed.set()


def _follow(address: str, key: str, ask: Callable[[str], None], closed: threading.Event) -> None:
    etag, first = "", True
    while not closed.is_set():
        try:
            status, value, etag = _get(address, key, etag)
        except (OSError, http.client.HTTPException):
            status, value = 0, ""
        if status == 404 or closed.is_set():  # this kind of machine has no such notice
            return
        if status != 200:  # 503: the server is busy
            closed.wait(_RETRY_SECS)
            continue
        if value == KEYS[key] and (not first or key == "preempted"):
            ask(f"notice of Compute Engine: {key} is {value}")
            return
        if value == KEYS[key]:
            log.warning(
                "notice of Compute Engine: %s is %s; the run goes on until SIGTERM", key, value
            )
        first = False
        if not etag:  # a server that cannot be waited for
            closed.wait(_RETRY_SECS)


def _get(address: str, key: str, etag: str) -> tuple[int, str, str]:
    """Returns status, value and etag; with an etag waits until the value differs from it, `_WAIT_SECS` at most."""
    query = {"alt": "text"}
    if etag:
        query |= {"wait_for_change": "true", "timeout_sec": str(_WAIT_SECS), "last_etag": etag}
    path = f"/computeMetadata/v1/instance/{key}?{urllib.parse.urlencode(query)}"
    connection = http.client.HTTPConnection(address, timeout=_WAIT_SECS + 10)  # never by a proxy
    try:
        connection.request("GET", path, headers={"Metadata-Flavor": "Google"})
        answer = connection.getresponse()
        value = answer.read(1000).decode(errors="replace").strip()
        if answer.getheader("Metadata-Flavor") != "Google":
            return 0, "", etag  # something else answers there
        return answer.status, value, answer.getheader("ETag") or ""
    finally:
        connection.close()
