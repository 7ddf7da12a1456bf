"""An HTTP server on this machine that stalls, trickles, resets and answers 503 as it is told."""

import socket
import struct
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote

STALL_S = 0.5  # what the tests take for a stall


class Server(ThreadingHTTPServer):
    """Serves a folder; a file misbehaves as many times as `faults` says, then behaves."""

    daemon_threads = True

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.folder, self.fault = folder, ""
        self.faults = 1_000_000
        self.headers: dict[str, str] = {}  # by file, the X-Robots-Tag
        self.requests: Counter[str] = Counter()
        self.ranges: list[str] = []
        self.logins: set[str] = set()
        self.released = threading.Event()

    def shutdown_request(self, request: Any) -> None:
        """Close without the polite end of a connection, which would hide a reset."""
        self.close_request(request)

    def url(self, name: str) -> str:
        return f"http://127.0.0.1:{self.server_port}/{name}"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        path = self.server.folder / unquote(self.path.split("?")[0]).lstrip("/")
        self.server.requests[path.name] += 1
        self.server.logins.add(self.headers.get("Authorization", ""))
        if not path.is_file():
            return self.send_error(404)
        fault = self.server.fault
        if self.server.requests[path.name] > self.server.faults:
            fault = ""
        if fault == "503":
            return self.send_error(503)
        data = path.read_bytes()
        begin = 0
        if "Range" in self.headers:
            self.server.ranges.append(self.headers["Range"])
            begin = int(self.headers["Range"].removeprefix("bytes=").rstrip("-"))
        self.send_response(206 if begin else 200)
        if fault == "slow headers":
            self.flush_headers()
            while not self.server.released.wait(STALL_S / 10):
                self.wfile.write(b"x")
        self.send_header("Content-Length", str(len(data) - begin))
        if path.name in self.server.headers:
            self.send_header("X-Robots-Tag", self.server.headers[path.name])
        self.end_headers()
        if fault == "":
            self.wfile.write(data[begin:])
        elif fault == "corrupt":
            self.wfile.write(bytes(len(data) - begin))
        elif fault == "trickle":
            while not self.server.released.wait(STALL_S / 10):
                self.wfile.write(b"x")
        else:
            self.wfile.write(data[begin : begin + (len(data) - begin) // 2])
            self.wfile.flush()
            if fault == "stall":
                self.server.released.wait(60)
            elif fault == "reset":  # RST instead of FIN
                linger = struct.pack("ii", 1, 0)
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            self.close_connection = True

    def log_message(self, format: str, *args: object) -> None:
        pass


@contextmanager
def serve(folder: Path) -> Iterator[Server]:
    """Serve a folder until the end of the block."""
    folder.mkdir(exist_ok=True)
    with Server(folder) as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        try:
            yield server
        finally:
            server.released.set()
            server.shutdown()
