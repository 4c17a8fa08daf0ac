"""Stores that fsspec opens, such as gs:// and s3://: settings, retries, time limits.

Google Cloud Storage (`pip install 'vlp[gcs]'`) and S3 (`vlp[s3]`) hold work directories and data; data may also come
from any other store that fsspec knows. Credentials and endpoints are those of gcsfs and s3fs.
"""

import asyncio
import dataclasses
import functools
import importlib.util
import logging
import os
import queue
import random
import threading
import time
from collections.abc import Callable
from typing import Any

from vlp.core import check

# Scheme of stores that can hold a work directory → its package for fsspec, the extra that installs it.
SCHEMES = {"gs": ("gcsfs", "vlp[gcs]"), "s3": ("s3fs", "vlp[s3]")}


@dataclasses.dataclass(frozen=True)
class Policy:
    """How remote requests are repeated and cached, per process."""

    tries: int = 8
    patience_secs: float = 90.0  # tries are repeated for at least so long
    pause_secs: float = 0.1  # doubles from try to try, up to 10 s, with random jitter
    stall_secs: float = 60.0  # an answer that takes longer is given up and asked for again
    block_bytes: int = 2**20
    cache_blocks: int = 256


POLICY = Policy()


class ShortRead(OSError):
    """A store's answer ended early."""


def is_remote(path: str | os.PathLike) -> bool:
    """True for what fsspec opens: "gs://…", "s3://…", "memory://…"."""
    return "://" in os.fspath(path)


def open_fs(path: str | os.PathLike) -> tuple[Any, str]:
    """Returns fsspec's file system for an address, and the address in it.

    Raises:
        UserError: the scheme is unknown, or its package is not installed.
    """
    text = os.fspath(path)
    check_package(text, text.partition("://")[0])
    import fsspec  # here, because reading from a disk does not need it

    try:
        return fsspec.core.url_to_fs(text)
    except (ValueError, ImportError) as e:
        raise check.error(
            text, f"a store that cannot be opened ({e})", "a known protocol", "install its package"
        ) from None


def check_package(where: str, scheme: str) -> None:
    """Prepares a store for its first use. Raises UserError if its package is missing."""
    if scheme not in SCHEMES:
        return
    package, extra = SCHEMES[scheme]
    if importlib.util.find_spec(package) is None:
        do = f"pip install '{extra}'"
        raise check.error(where, f"{scheme}:// without {package}", "the package", do)
    _prepare()


@functools.cache
def _prepare() -> None:
    # Otherwise gcsfs asks a control service for every bucket's type, which warns, or hangs without credentials.
    os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
    # Otherwise epath (Orbax) uses TensorFlow where it is installed: another client with other credentials, no s3://.
    os.environ.setdefault("EPATH_USE_TF", "false")
    # What fails is raised and told in one line; gcsfs would print a traceback before.
    logging.getLogger("gcsfs").setLevel(logging.CRITICAL)
    logging.getLogger("fsspec").setLevel(logging.WARNING)
    from fsspec.config import conf

    for scheme in SCHEMES:  # other hosts write too: a listing from memory is wrong
        conf.setdefault(scheme, {}).setdefault("use_listings_cache", False)


def call(path: str | os.PathLike, method: str, *args: Any, **options: Any) -> Any:
    """Calls fsspec's method on an address; `retried`.

    A request that stalls is cancelled before it is repeated: it must not overwrite later what a newer one wrote.
    """
    fs, inner = open_fs(path)
    if not fs.async_impl:
        return retried(path, lambda: getattr(fs, method)(inner, *args, **options))

    def once() -> Any:
        request = getattr(fs, f"_{method}")(inner, *args, **options)
        waiting = asyncio.wait_for(request, POLICY.stall_secs)
        return asyncio.run_coroutine_threadsafe(waiting, fs.loop).result()

    return retried(path, once, limit=False)


def retried(
    path: str | os.PathLike,
    ask: Callable[[], Any],
    failed: Callable[[Exception], None] = lambda e: None,
    limit: bool = True,
) -> Any:
    """Returns ask(), repeated by `POLICY` while the store fails or stalls.

    Args:
        path: for errors.
        ask: a request.
        failed: called with the error of each request that will be repeated or given up.
        limit: whether a request has to end within `POLICY.stall_secs`.

    Raises:
        FileNotFoundError, FileExistsError, IsADirectoryError, PermissionError: at once.
        Failed: every try failed, or this machine is at fault.
    """
    began, attempt = time.monotonic(), 0
    while True:
        try:
            return _within(ask, POLICY.stall_secs) if limit else ask()
        except (FileNotFoundError, FileExistsError, IsADirectoryError, PermissionError):
            raise
        except Exception as e:  # every store has its own exceptions
            if fault := check.machine(path, e):
                raise fault from None
            if str(e).startswith("Forbidden"):  # gcsfs's
                raise PermissionError(str(e)) from None
            failed(e)
            last = e
        attempt += 1
        if attempt >= POLICY.tries and time.monotonic() - began >= POLICY.patience_secs:
            break
        time.sleep(
            min(10.0, POLICY.pause_secs * 2 ** min(attempt - 1, 20)) * random.uniform(0.5, 1.5)
        )
    raise check.Failed(
        f"{os.fspath(path)}: got {attempt} failed requests (last: {type(last).__name__} {last!s:.80}), "
        "expected an answer; check the store and the network, then start again"
    )


def _within(ask: Callable[[], Any], secs: float) -> Any:
    """Returns ask(), or raises TimeoutError: a stalled thread is left behind, never waited for."""
    answers: queue.SimpleQueue = queue.SimpleQueue()

    def run() -> None:
        try:
            answers.put((ask(), None))
        except BaseException as e:
            answers.put((None, e))

    threading.Thread(target=run, daemon=True).start()
    try:
        value, error = answers.get(timeout=secs)
    except queue.Empty:
        raise TimeoutError(f"no answer in {secs} s") from None
    if error is not None:
        raise error
    return value
