"""A server in front of another that answers late, with 503, or not at all: what an object store has in bad times."""

from __future__ import annotations

import http.client
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self

SILENCE_S = 15.0


class FlakyServer:
    """`every_nth`: of each kind of trouble, how often it strikes; `down`: whether nothing is answered but 503."""

    def __init__(self, host: str, port: int) -> None:
        self.behind = (host, port)
        self.every_nth: dict[str, int] = {}
        self.down = False
        self.requests = 0
        self.struck: dict[str, int] = {}
        self._lock = threading.Lock()
        owner = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            server_owner = owner

            def handle_any(self) -> None:
                owner.answer(self)

            do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = handle_any

            def log_message(self, format: str, *args: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *about: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def _trouble(self) -> str:
        with self._lock:
            self.requests += 1
            kinds = ["refused"] if self.down else [k for k, n in self.every_nth.items() if self.requests % n == 0]
            for kind in kinds[:1]:
                self.struck[kind] = self.struck.get(kind, 0) + 1
            return kinds[0] if kinds else ""

    def answer(self, handler: BaseHTTPRequestHandler) -> None:
        trouble = self._trouble()
        body = _body(handler)
        if trouble == "slow":
            time.sleep(1.0)
        if trouble == "silent":
            time.sleep(SILENCE_S)
            handler.close_connection = True
            return
        if trouble == "refused":
            _send(handler, 503, {}, b"<Error><Code>SlowDown</Code></Error>")
            return
        connection = http.client.HTTPConnection(*self.behind, timeout=30)
        headers = {name: value for name, value in handler.headers.items() if name.lower() != "transfer-encoding"}
        connection.request(handler.command, handler.path, body, headers)
        found = connection.getresponse()
        content = found.read()
        connection.close()
        if trouble == "lost":
            # It was carried out, and nobody is told.
            handler.close_connection = True
            handler.connection.close()
            return
        _send(handler, found.status, dict(found.getheaders()), content)


def _body(handler: BaseHTTPRequestHandler) -> bytes:
    if handler.headers.get("transfer-encoding", "").lower() == "chunked":
        parts = []
        while size := int(handler.rfile.readline().split(b";")[0], 16):
            parts.append(handler.rfile.read(size))
            handler.rfile.readline()
        handler.rfile.readline()
        return b"".join(parts)
    return handler.rfile.read(int(handler.headers.get("content-length") or 0))


def _send(handler: BaseHTTPRequestHandler, status: int, headers: dict[str, str], content: bytes) -> None:
    handler.send_response_only(status)
    for name, value in headers.items():
        if name.lower() not in ("content-length", "transfer-encoding", "connection"):
            handler.send_header(name, value)
    is_head = handler.command == "HEAD"
    length = next((v for n, v in headers.items() if n.lower() == "content-length"), str(len(content)))
    handler.send_header("Content-Length", length if is_head else str(len(content)))
    handler.end_headers()
    if not is_head:
        handler.wfile.write(content)
