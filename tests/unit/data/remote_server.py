"""A real HTTP server on loopback that serves a folder and misbehaves where it is told to."""

from __future__ import annotations

import threading
from collections import Counter, defaultdict, deque
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


class FaultServer:
    """Serves `root`. `faults[name]` is a queue of what to do with the next requests for a file of that name.

    Faults: "cut" (the connection ends half way), "short" (half of the file as if it were all), "wrong" (one flipped
    byte), "stall" (half of the file, then silence until the server is closed), or a status code.
    `always[name]` is a fault for every request.
    """

    def __init__(self, root: Path):
        self.root = root
        self.faults: dict[str, deque] = defaultdict(deque)
        self.always: dict[str, object] = {}
        self.requests: Counter[str] = Counter()
        self._lock = threading.Lock()
        self._closing = threading.Event()
        owner = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self):
                owner._answer(self)

            def log_message(self, *_):
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def close(self) -> None:
        self._closing.set()
        self._server.shutdown()
        self._server.server_close()

    def _answer(self, handler: BaseHTTPRequestHandler) -> None:
        path = self.root / handler.path.partition("?")[0].lstrip("/")
        with self._lock:
            self.requests[path.name] += 1
            fault = self.always.get(path.name)
            if fault is None and self.faults[path.name]:
                fault = self.faults[path.name].popleft()
        data = path.read_bytes() if path.is_file() else b""
        if fault is None and not path.is_file():
            fault = 404
        status, length = (fault, 0) if isinstance(fault, int) else (200, len(data))
        if fault == "short":
            data = data[: len(data) // 2]
            length = len(data)
        elif fault == "wrong":
            data = data[:700] + bytes([data[700] ^ 1]) + data[701:]
        handler.send_response(status)
        handler.send_header("Content-Length", str(length))
        handler.end_headers()
        if status != 200:
            return
        if fault in ("cut", "stall"):
            handler.wfile.write(data[: len(data) // 2])
            handler.wfile.flush()
            if fault == "stall":
                self._closing.wait(30)
            handler.close_connection = True
            return
        handler.wfile.write(data)
