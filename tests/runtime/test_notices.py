"""Notices of Compute Engine's metadata server, from one on loopback; nothing is asked on other machines."""

import contextlib
import http.server
import queue
import threading
import time

import pytest

from helpers import runs
from vlp.runtime import notices
from vlp.runtime.stop import PREEMPTED

GONE = "TERMINATE_ON_HOST_MAINTENANCE"


class Server(http.server.ThreadingHTTPServer):
    """Answers as the metadata server does: values by key, a wait for their change, status 503 while `busy`."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.values = {"preempted": "FALSE", "maintenance-event": "NONE"}
        self.changed, self.asked, self.busy = threading.Condition(), [], 0
        threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()

    @property
    def address(self):
        return f"127.0.0.1:{self.server_address[1]}"

    def set(self, key, value):
        with self.changed:
            self.values[key] = value
            self.changed.notify_all()


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        path, _, query = self.path.partition("?")
        key, server = path.removeprefix("/computeMetadata/v1/instance/"), self.server
        server.asked.append(self.path)
        options = dict(pair.split("=") for pair in query.split("&"))
        if self.headers["Metadata-Flavor"] != "Google":
            return self.answer(403, "")
        if server.busy:
            server.busy -= 1
            return self.answer(503, "")
        if key not in server.values:
            return self.answer(404, "")
        with server.changed:
            if options.get("wait_for_change") == "true":
                same = lambda: server.values[key] != options["last_etag"]
                server.changed.wait_for(same, timeout=float(options["timeout_sec"]))
            return self.answer(200, server.values[key])

    def answer(self, status, text):
        with contextlib.suppress(OSError):
            self.send_response(status)
            self.send_header("Metadata-Flavor", "Google")
            self.send_header("ETag", text)
            self.end_headers()
            self.wfile.write(text.encode())

    def log_message(self, *_):
        pass


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(notices, "_RETRY_SECS", 0.05)
    made = Server()
    yield made
    made.shutdown()
    made.server_close()


def heard(server, said, seconds=10):
    try:
        return said.get(timeout=seconds)
    except queue.Empty:
        return None


@pytest.mark.parametrize("key, value", [("preempted", "TRUE"), ("maintenance-event", GONE)])
def test_a_notice_asks_for_a_stop_at_once(server, key, value):
    said = queue.Queue()
    with notices.watched(said.put, server.address):
        while len(server.asked) < 4:  # both keys: their values, then waits
            time.sleep(0.01)
        server.set("maintenance-event", "MIGRATE_ON_HOST_MAINTENANCE")  # the machine lives on
        server.set(key, value)
        assert heard(server, said) == f"notice of Compute Engine: {key} is {value}"
    assert any("wait_for_change=true" in path for path in server.asked)


def test_a_busy_server_is_asked_again_and_missing_keys_are_not(server):
    server.busy = 6
    del server.values["maintenance-event"]
    said = queue.Queue()
    with notices.watched(said.put, server.address):
        server.set("preempted", "TRUE")
        assert heard(server, said) == "notice of Compute Engine: preempted is TRUE"
    time.sleep(0.2)
    assert sum("maintenance-event" in path for path in server.asked) <= 7


def test_a_maintenance_that_was_announced_before_the_start_does_not_stop_the_run(server, caplog):
    """Else a run that is started again on the same machine would never get on."""
    server.set("maintenance-event", GONE)
    said = queue.Queue()
    with notices.watched(said.put, server.address):
        while len(server.asked) < 4:
            time.sleep(0.01)
        assert heard(server, said, 0.1) is None
        assert "the run goes on until SIGTERM" in caplog.text


def test_a_run_saves_and_ends_for_a_notice(server, toy, tmp_path, monkeypatch):
    from vlp.core import mesh as meshes

    calls, to_global = iter(range(1, 100)), meshes.to_global

    def tell(batch, mesh):
        if next(calls) == 3:
            server.set("preempted", "TRUE")
            time.sleep(0.5)
        return to_global(batch, mesh)

    monkeypatch.setenv("GCE_METADATA_HOST", server.address)
    with monkeypatch.context() as patch:
        patch.setattr(meshes, "to_global", tell)
        assert runs.train(runs.TOY, tmp_path / "run") == PREEMPTED
    assert 3 <= runs.rows(tmp_path / "run")[-1]["step"] < 4
    server.set("preempted", "FALSE")
    assert runs.train(runs.TOY, tmp_path / "run") == 0
    assert runs.train(runs.TOY, tmp_path / "whole") == 0
    runs.assert_same_run(tmp_path / "run", tmp_path / "whole")


def test_only_machines_of_google_are_asked(monkeypatch, tmp_path):
    """Known by their DMI name: no connection and no wait anywhere else."""
    for name in ("GCE_METADATA_HOST", "NO_GCE_CHECK", "TPU_SKIP_MDS_QUERY"):
        monkeypatch.delenv(name, raising=False)
    dmi = tmp_path / "product_name"
    monkeypatch.setattr(notices, "_DMI", dmi)
    assert notices.server() == ""
    dmi.write_text("Standard PC (Q35 + ICH9, 2009)\n")
    assert notices.server() == ""
    before = threading.active_count()
    with notices.watched(lambda reason: None):
        assert threading.active_count() == before
    dmi.write_text("Google Compute Engine\n")
    assert notices.server() == "169.254.169.254"
    monkeypatch.setenv("NO_GCE_CHECK", "true")
    assert notices.server() == ""
    monkeypatch.setenv("GCE_METADATA_HOST", "127.0.0.1:9")
    assert notices.server() == "127.0.0.1:9"
