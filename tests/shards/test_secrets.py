"""A signed URL and a password: the index keeps them, and no other file and no message."""

import http.server
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from dist_vse.common.errors import UserError
from dist_vse.data.index import read_index
from dist_vse.data.shard_cache import fetch
from tests.support.far_shards import cache
from tests.support.shards import run_shard, write_tar

SECRET = "X-Sig=SECRET%2B1"


class _Signed(http.server.BaseHTTPRequestHandler):
    """Gives the file to who brings the signature."""

    content: bytes

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        ok = self.path == f"/a.tar?{SECRET}"
        self.send_response(200 if ok else 403)
        self.end_headers()
        self.wfile.write(self.content if ok else b"")


@pytest.fixture
def signed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setenv("no_proxy", "*")
    tar = write_tar(tmp_path / "far" / "a.tar", {"1.jpg": b"x", "1.txt": "a", "2.txt": "alone"})
    _Signed.content = tar.read_bytes()
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Signed)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/a.tar?{SECRET}"
    server.shutdown()
    server.server_close()


def test_only_the_index_keeps_a_signature(
    signed: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    index = ["index", signed, "--out", out, "--max-bad", "1", "--workers", "1"]
    assert run_shard(*index) == 0
    (shard,) = read_index(out).split("train").shards
    assert shard.path == signed
    before = (out / "train.a.npy").stat().st_ino
    assert run_shard(*index) == 0  # nothing is read again: the entry was found
    assert (out / "train.a.npy").stat().st_ino == before
    with pytest.raises(UserError, match="1 samples cannot be used"):
        run_shard("verify", out, "--workers", "1")
    with pytest.raises(UserError, match=r"a\.tar\?\.\.\.: queries of URLs are not kept") as said:
        run_shard("repair", out, "--workers", "1")
    texts = [str(said.value), *capsys.readouterr()]
    wrong = replace(shard, path=signed.replace("SECRET", "SECRET_OLD"))
    with pytest.raises(UserError, match="responded 403") as said:
        fetch(wrong, cache(tmp_path / "cache"))
    texts += [str(said.value)]
    files = [p for p in (*out.iterdir(), *(tmp_path / "cache").iterdir()) if p.name != "index.json"]
    assert {"receipts.jsonl", "commands.jsonl", "skipped.jsonl"} < {p.name for p in files}
    texts += [path.read_bytes().decode(errors="replace") for path in files]
    assert all("SECRET" not in text for text in texts)
