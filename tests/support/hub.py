"""A hub on this machine that speaks as much of Hugging Face's interface as a model's files need.

Small files travel in its answers. Those of `LARGE` lie in a storage at another host name, as Git
LFS has it: the hub redirects downloads there, and names the places of uploads.
"""

import base64
import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any
from urllib.parse import unquote

COMMIT = "a" * 40
LARGE = ".safetensors"


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
                self._json(
                    {
                        "files": [
                            {
                                "path": name,
                                "uploadMode": "lfs" if name.endswith(LARGE) else "regular",
                                "shouldIgnore": False,
                            }
                            for name in names
                        ]
                    }
                )
            elif self.path.endswith("/info/lfs/objects/batch"):
                objects = [
                    {**each, "actions": {"upload": {"href": f"{storage}/{each['oid']}"}}}
                    for each in json.loads(body)["objects"]
                ]
                self._json({"transfer": "basic", "objects": objects})
            elif self.path.endswith("/commit/main"):
                for line in map(json.loads, body.splitlines()):
                    if line["key"] == "file":
                        files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
                    elif line["key"] == "lfsFile":
                        files[line["value"]["path"]] = stored[line["value"]["oid"]]
                self._json(
                    {"commitOid": COMMIT, "commitUrl": f"{address}/me/model/commit/{COMMIT}"}
                )
            else:
                self._json({"warnings": [], "errors": []})  # of a card's metadata

        def do_PUT(self) -> None:
            self._note()
            stored[self.path.rpartition("/")[2]] = self.rfile.read(
                int(self.headers["Content-Length"])
            )
            self._send(200, b"")

        def do_GET(self) -> None:
            self._note()
            path = unquote(self.path.partition("?")[0])
            if path.startswith("/storage/"):
                self._send(200, stored[path.rpartition("/")[2]])
            elif path.startswith("/me/model/resolve/"):
                name = path.split("/", 5)[5]
                data = files.get(name)
                if data is not None and name.endswith(LARGE):
                    self._redirect(data)
                else:
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

        def _note(self) -> None:
            known = " as me" if "Authorization" in self.headers else ""
            asked.append(f"{self.command} {self.path.partition('?')[0]}{known}")

        def _redirect(self, data: bytes) -> None:
            oid = hashlib.sha256(data).hexdigest()
            stored[oid] = data
            linked = {"Location": f"{storage}/{oid}?signed=1", "X-Linked-Size": str(len(data))}
            self._send(302, b"", linked | {"X-Linked-Etag": f'"{oid}"'})

        def _json(self, content: Any) -> None:
            self._send(200, json.dumps(content).encode())

        def _send(self, status: int, data: bytes, more: dict[str, str] | None = None) -> None:
            self.send_response(status)
            for name, value in (more or {}).items():
                self.send_header(name, value)
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
    storage = f"http://localhost:{server.server_port}/storage"  # another host: no token goes there
    stored: dict[str, bytes] = {}
    Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield address
    finally:
        server.shutdown()
        server.server_close()
