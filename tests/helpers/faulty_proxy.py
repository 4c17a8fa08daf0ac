"""An HTTP proxy on loopback that answers some requests with errors, late, or not at all, before a store's emulator."""

import contextlib
import dataclasses
import http.client
import http.server
import random
import threading
import time


@dataclasses.dataclass
class Faults:
    """Shares of requests that get an error or stall.

    Every second error comes after the request was carried out, except for parts of uploads: Google answers a repeated
    last part as the first time, the emulator does not.
    """

    errors: float = 0.0
    stalls: float = 0.0
    stall_secs: float = 1.0
    down_until: float = 0.0  # time.monotonic; every request before it fails
    on: bool = True
    seed: int = 0
    requests: int = 0
    failed: int = 0
    stalled: int = 0
    refused: int = 0

    def __post_init__(self):
        self._draws, self._lock = random.Random(self.seed), threading.Lock()

    def draw(self, path):
        """Returns what happens to a request: "", "before", "after" (an error) or "stall"."""
        with self._lock:
            self.requests += 1
            if time.monotonic() < self.down_until:
                self.refused += 1
                return "before"
            value = self._draws.random()
            if not self.on or value >= self.errors + self.stalls:
                return ""
            if value >= self.errors:
                self.stalled += 1
                return "stall"
            self.failed += 1
            return "before" if self.failed % 2 or "upload_id=" in path else "after"


@contextlib.contextmanager
def before(port, faults):
    """Yields the port of a proxy before the server at `port`."""

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def answer(self):
            body = self._body()
            fate = faults.draw(self.path)
            if fate == "stall":
                time.sleep(faults.stall_secs)
            status, headers, data = 503, [], b""
            if fate != "before":
                upstream = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
                try:
                    upstream.putrequest(
                        self.command, self.path, skip_host=True, skip_accept_encoding=True
                    )
                    for name, value in self.headers.items():
                        if name.lower() not in ("transfer-encoding", "content-length", "expect"):
                            upstream.putheader(name, value)
                    upstream.putheader("Content-Length", str(len(body)))
                    upstream.endheaders(body)
                    reply = upstream.getresponse()
                    status, headers, data = reply.status, reply.getheaders(), reply.read()
                finally:
                    upstream.close()
            if fate == "after":
                status, headers, data = 503, [], b""
            self.send_response(status)
            skipped = {"transfer-encoding", "connection", "date", "server"}
            if self.command != "HEAD":
                skipped.add("content-length")
                self.send_header("Content-Length", str(len(data)))
            for name, value in headers:
                if name.lower() not in skipped:
                    self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(data)

        do_GET = do_POST = do_PUT = do_DELETE = do_HEAD = do_PATCH = answer

        def _body(self):
            if "chunked" not in self.headers.get("Transfer-Encoding", ""):
                return self.rfile.read(int(self.headers.get("Content-Length") or 0))
            parts = []
            while size := int(self.rfile.readline().split(b";")[0], 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)

        def log_message(self, *args):
            pass

    class Server(http.server.ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, request, client_address):
            """A client that hung up."""

    server = Server(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server.server_address[1]
    finally:
        server.shutdown()
        server.server_close()
