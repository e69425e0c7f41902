"""A gate before an S3 server on loopback: lets requests pass until a test says that they are refused from now on."""

from __future__ import annotations

import http.client
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

EXPIRED = b"<?xml version='1.0'?><Error><Code>ExpiredToken</Code><Message>It has expired.</Message></Error>"
_NOT_PASSED_ON = {"transfer-encoding", "connection", "content-length"}


class Gate:
    """`allowed`: so many requests with a body (method PUT) pass, then all requests are refused; None: all pass."""

    def __init__(self, port: int, server_port: int) -> None:
        self.endpoint = f"http://127.0.0.1:{port}"
        self.server_port = server_port
        self.allowed: int | None = None
        self.refused: list[str] = []  # method and path
        self.passed: list[str] = []
        self._lock = threading.Lock()

    def admits(self, method: str, path: str) -> bool:
        with self._lock:
            if self.allowed == 0:
                self.refused.append(f"{method} {path}")
                return False
            if self.allowed is not None and method == "PUT":
                self.allowed -= 1
            self.passed.append(f"{method} {path}")
            return True


def _handler(gate: list[Gate]) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def _pass_on(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            if not gate[0].admits(self.command, self.path):
                self._answer(403, [("Content-Type", "application/xml")], EXPIRED)
                return
            server = http.client.HTTPConnection("127.0.0.1", gate[0].server_port, timeout=30)
            try:
                server.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
                for name, value in self.headers.items():
                    server.putheader(name, value)
                server.endheaders(body)
                answer = server.getresponse()
                self._answer(answer.status, answer.getheaders(), answer.read())
            finally:
                server.close()

        do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = _pass_on

        def _answer(self, status: int, headers: list[tuple[str, str]], body: bytes) -> None:
            self.send_response_only(status)
            is_head = self.command == "HEAD"
            for name, value in headers:
                if name.lower() not in _NOT_PASSED_ON or (is_head and name.lower() == "content-length"):
                    self.send_header(name, value)
            if not is_head:
                self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if not is_head:
                self.wfile.write(body)

        def log_message(self, format: str, *arguments: object) -> None:
            """Nothing is said."""

    return Handler


@contextmanager
def gate_before(server_port: int) -> Iterator[Gate]:
    gates: list[Gate] = []
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(gates))
    server.daemon_threads = True
    gates.append(Gate(server.server_address[1], server_port))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield gates[0]
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
