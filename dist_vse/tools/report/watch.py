"""A live view: the report of a run that still trains, served to this machine only."""

from html import escape
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from dist_vse.common.errors import UserError
from dist_vse.common.terminal import message, say
from dist_vse.tools.report.page import document, render
from dist_vse.tools.report.record import read_record

SECONDS = 10  # until the browser asks again


def watch_run(run_dir: Path, index_dir: Path | None, port: int) -> None:
    """Serve the run's report on 127.0.0.1 until Ctrl-C, each time as the run is by then.

    Nobody else can reach it, since a page holds images and captions of the data set. Port 0 takes
    any that is free. Raises UserError if `run_dir` is no folder or the port is taken.
    """
    if not run_dir.is_dir():
        raise UserError(f"{run_dir}: no such run; give the output_dir of a training")
    try:
        server = ThreadingHTTPServer(("127.0.0.1", port), _handler(run_dir, index_dir))
    except OSError as error:
        raise UserError(f"port {port}: {error.strerror}; give another with --port") from error
    with server:
        place = f"http://127.0.0.1:{server.server_port}/"
        say(message(f"{run_dir} is at {place}; Ctrl-C ends this"), flush=True)
        server.serve_forever()


def _handler(run_dir: Path, index_dir: Path | None) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if self.path != "/":
                self.send_error(404)
                return
            page, changes = _page(run_dir, index_dir)
            body = page.encode()
            self.send_response(200)
            self.send_header("Content-Type", "text/html; charset=utf-8")
            self.send_header("Content-Length", str(len(body)))
            self.send_header("Cache-Control", "no-store")
            if changes:
                self.send_header("Refresh", str(SECONDS))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            """Print nothing for each look."""

    return Handler


def _page(run_dir: Path, index_dir: Path | None) -> tuple[str, bool]:
    """Return the page, and whether the run may still change."""
    try:
        record = read_record(run_dir)
        last = record.metrics.train.last["step"]
        return render(record, index_dir), last < record.config.total_steps
    except UserError as error:  # such as a run that has not evaluated yet
        waits = f"Nothing to show yet: {error}. This page looks again every {SECONDS} seconds."
        return document(run_dir.name, f'<p class="lead">{escape(waits)}</p>'), True
