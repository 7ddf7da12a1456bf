"""The bytes of a URL or a `pipe:` command, or an OSError after a while without any."""

import contextlib
import http.client
import os
import select
import signal
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from typing import IO

CHUNK_BYTES = 1 << 20
LEAST_BYTES = 1 << 14  # that must come within a time-out: a trickle counts as a stall
MAY_PASS = (408, 425, 429)  # answers below 500 that another try may change


class GoneError(OSError):
    """A source that will not come back: trying again is of no use."""


def append_url(url: str, file: IO[bytes], stall_s: float) -> None:
    """Append what a URL holds beyond the file's end; a source that cannot begin there starts anew.

    Raises OSError (GoneError where another try is of no use) if the source fails, or if next to
    nothing comes for `stall_s` seconds.
    """
    if url.startswith(("http://", "https://")):
        chunks = _read_http(url, file, stall_s)
    else:
        file.truncate(0)
        chunks = _read_command(url, stall_s)
    marked, since = time.monotonic(), 0
    for chunk in chunks:
        file.write(chunk)
        since += len(chunk)
        if time.monotonic() - marked > stall_s:
            if since < LEAST_BYTES:
                raise TimeoutError(f"only {since} bytes in {stall_s:g} s")
            marked, since = time.monotonic(), 0


def _read_http(url: str, file: IO[bytes], stall_s: float) -> Iterator[bytes]:
    start = file.seek(0, os.SEEK_END)
    request = urllib.request.Request(url, headers={"Range": f"bytes={start}-"} if start else {})
    try:
        with urllib.request.urlopen(request, timeout=stall_s) as answer:
            if answer.status != http.client.PARTIAL_CONTENT:
                file.truncate(0)
            while chunk := answer.read1(CHUNK_BYTES):
                yield chunk
    except urllib.error.HTTPError as error:
        kind = GoneError if error.code < 500 and error.code not in MAY_PASS else OSError
        raise kind(f"the server answers {error.code} {error.reason}") from error
    except http.client.HTTPException as error:
        raise OSError(f"broken answer ({error!r})") from error


def _read_command(url: str, stall_s: float) -> Iterator[bytes]:
    if url.startswith("pipe:"):
        # A session of its own, so that all of the pipe's commands can be ended.
        process = subprocess.Popen(
            url.removeprefix("pipe:"), shell=True, stdout=subprocess.PIPE, start_new_session=True
        )
    else:
        from webdataset import gopen  # here: only other schemes pay for the import

        source = gopen(url, "rb")
        if not hasattr(source, "proc"):  # a file
            with source:
                while chunk := source.read(CHUNK_BYTES):
                    yield chunk
            return
        process = source.proc
    yield from _read_process(process, stall_s)


def _read_process(process: "subprocess.Popen[bytes]", stall_s: float) -> Iterator[bytes]:
    assert process.stdout is not None
    poll = select.poll()
    poll.register(process.stdout, select.POLLIN)
    try:
        while True:
            if not poll.poll(stall_s * 1000):
                raise TimeoutError(f"no byte in {stall_s:g} s")
            chunk = os.read(process.stdout.fileno(), CHUNK_BYTES)
            if not chunk:
                break
            yield chunk
        status = process.wait(stall_s)
    except subprocess.TimeoutExpired:
        raise TimeoutError(f"the command does not end within {stall_s:g} s") from None
    finally:
        if process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                leads = os.getpgid(process.pid) == process.pid
                os.killpg(process.pid, signal.SIGKILL) if leads else process.kill()
        process.stdout.close()
        process.wait()
    if status != 0:
        raise OSError(f"the command ends with exit code {status}")
