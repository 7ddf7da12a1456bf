"""A hub on this machine that speaks as much of Hugging Face's interface as a model's files need."""

import base64
import json
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any
from urllib.parse import unquote

COMMIT = "a" * 40


@contextmanager
def serve_hub(files: dict[str, bytes], asked: list[str]) -> Iterator[str]:
    """Serve one model's files, which uploads change; yield the address. `asked` lists requests."""

    class Hub(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            asked.append(f"POST {self.path}")
            body = self.rfile.read(int(self.headers["Content-Length"] or 0))
            if "refused" in self.path or b"refused" in body:
                self._send(403, b"{}")
            elif self.path == "/api/repos/create":
                given = json.loads(body)
                self._json({"url": f"{address}/{given['organization']}/{given['name']}"})
            elif self.path.endswith("/preupload/main"):
                names = [file["path"] for file in json.loads(body)["files"]]
                regular = {"uploadMode": "regular", "shouldIgnore": False}
                self._json({"files": [{"path": name, **regular} for name in names]})
            elif self.path.endswith("/commit/main"):
                for line in map(json.loads, body.splitlines()):
                    if line["key"] == "file":
                        files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
                self._json(
                    {"commitOid": COMMIT, "commitUrl": f"{address}/me/model/commit/{COMMIT}"}
                )
            else:
                self._json({"warnings": [], "errors": []})  # of a card's metadata

        def do_GET(self) -> None:
            asked.append(f"{self.command} {self.path}")
            path = unquote(self.path.partition("?")[0])
            if path.startswith("/me/model/resolve/"):
                data = files.get(path.split("/", 5)[5])
                self._send(404 if data is None else 200, data or b"")
            elif "/tree/" in path:
                names = [
                    {"type": "file", "path": n, "size": len(files[n]), "oid": n} for n in files
                ]
                self._json(names)
            elif path.startswith("/api/models/me/model"):
                siblings = [{"rfilename": name} for name in files]
                self._json({"id": "me/model", "sha": COMMIT, "siblings": siblings})
            else:
                self._send(404, b"")

        do_HEAD = do_GET  # noqa: N815

        def _json(self, content: Any) -> None:
            self._send(200, json.dumps(content).encode())

        def _send(self, status: int, data: bytes) -> None:
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.send_header("ETag", f'"{hash(self.path) & 0xFFFFFFFF:x}"')
            self.send_header("X-Repo-Commit", COMMIT)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(data)

        def log_message(self, *_: Any) -> None:
            """Say nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    address = f"http://127.0.0.1:{server.server_port}"
    Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield address
    finally:
        server.shutdown()
        server.server_close()
