"""The live view shows what the run has by now, to this machine, until the run has ended."""

import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from http.server import ThreadingHTTPServer
from pathlib import Path

import pytest

from dist_vse.common.errors import UserError
from dist_vse.runs.files import METRICS_NAME
from dist_vse.tools.report import watch_run
from dist_vse.tools.report.watch import SECONDS, _handler
from tests.support.reports import write_run


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    return write_run(tmp_path)


@pytest.fixture
def address(run_dir: Path) -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), _handler(run_dir, None)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


def _look(address: str) -> tuple[str, str | None]:
    with urllib.request.urlopen(address, timeout=20) as answer:
        return answer.read().decode(), answer.headers["Refresh"]


def test_each_look_shows_the_run_as_it_is_by_then(run_dir: Path, address: str) -> None:
    whole = (run_dir / METRICS_NAME).read_text()
    page, refresh = _look(address)
    assert "my &lt;run&gt;" in page and refresh is None  # it has ended
    (run_dir / METRICS_NAME).write_text("")
    page, refresh = _look(address)
    assert "Nothing to show yet" in page and refresh == str(SECONDS)
    before_the_end = [line for line in whole.splitlines(True) if '"step": 40' not in line]
    (run_dir / METRICS_NAME).write_text("".join(before_the_end))
    page, refresh = _look(address)
    assert "<svg" in page and refresh == str(SECONDS)
    with pytest.raises(urllib.error.HTTPError, match="404"):
        _look(f"{address}config.yaml")  # only the page


def test_what_cannot_be_watched(run_dir: Path, address: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nowhere: no such run"):
        watch_run(tmp_path / "nowhere", None, 0)
    port = int(address.rstrip("/").rpartition(":")[2])
    with pytest.raises(UserError, match=rf"port {port}: .*; give another with --port"):
        watch_run(run_dir, None, port)
