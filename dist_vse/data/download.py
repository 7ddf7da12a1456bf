"""The bytes of a URL or a `pipe:` command, or an OSError after a while without any."""

import contextlib
import http.client
import os
import queue
import select
import signal
import subprocess
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Generator
from typing import IO
from urllib.parse import quote, urlsplit, urlunsplit

from dist_vse.common.errors import first_line

CHUNK_BYTES = 1 << 20
LEAST_BYTES = 1 << 14  # that must come within a time-out: a trickle counts as a stall
MAY_PASS = (408, 425, 429)  # answers below 500 that another try may change
IN_URLS = "%/?:@!$&'()*+,;=~[]"  # that stay as they are: what is quoted already is not quoted again

Chunks = Generator[bytes | None, None, None]
"""Bytes; None where the source begins anew."""


class GoneError(OSError):
    """A source that will not come back: trying again is of no use."""


def append_url(url: str, file: IO[bytes], num_bytes: int, stall_s: float) -> None:
    """Append what a URL holds beyond the file's end; a source that cannot begin there starts anew.

    Raises OSError (GoneError where another try is of no use) if the source fails, if next to
    nothing comes for `stall_s` seconds, or once the file is longer than `num_bytes`.
    """
    try:
        with contextlib.closing(_chunks(url, file.seek(0, os.SEEK_END), stall_s)) as chunks:
            for chunk in _no_trickle(chunks, stall_s):
                if chunk is None:
                    file.truncate(0)
                elif file.write(chunk) and file.tell() > num_bytes:
                    raise OSError(f"it goes on after {num_bytes} bytes, its size in the index")
    except (ValueError, ImportError) as error:  # no address, no such scheme, or no library for it
        raise GoneError(first_line(error)) from error


def _no_trickle(chunks: Chunks, stall_s: float) -> Chunks:
    """Pass the chunks on. Raises TimeoutError where too few bytes come within a time-out."""
    marked, since = time.monotonic(), 0
    for chunk in chunks:
        yield chunk
        since += len(chunk or b"")
        if time.monotonic() - marked > stall_s:
            if since < LEAST_BYTES:
                raise TimeoutError(f"only {since} bytes in {stall_s:g} s")
            marked, since = time.monotonic(), 0


def _chunks(url: str, start: int, stall_s: float) -> Chunks:
    if url.startswith(("http://", "https://")):
        return _watched(_read_http(url, start, stall_s), stall_s)
    if not url.startswith("pipe:"):
        return _read_scheme(url, stall_s)
    # A session of its own, so that all of the pipe's commands can be ended.
    process = subprocess.Popen(
        url.removeprefix("pipe:"), shell=True, stdout=subprocess.PIPE, start_new_session=True
    )
    return _read_process(process, stall_s)


def _watched(chunks: Chunks, stall_s: float) -> Chunks:
    """Yield what a thread reads; one that brings nothing for `stall_s` seconds is left behind.

    The time-outs of sockets are for one read each, and names, headers and libraries have none.
    """
    read: queue.Queue[bytes | Exception | None] = queue.Queue(maxsize=2)
    left = threading.Event()
    threading.Thread(target=_read_on, args=(chunks, read, left), daemon=True).start()
    try:
        while True:
            item = read.get(timeout=stall_s)
            if isinstance(item, _EndError):
                return
            if isinstance(item, Exception):
                raise item
            yield item
    except queue.Empty:
        raise TimeoutError(f"timed out: no byte in {stall_s:g} s") from None
    finally:
        left.set()
        while not read.empty():  # lets the thread go on to its end
            read.get()


class _EndError(Exception):
    """Stands behind the last chunk."""


def _read_on(
    chunks: Chunks, read: "queue.Queue[bytes | Exception | None]", left: threading.Event
) -> None:
    try:
        with contextlib.closing(chunks):
            for chunk in chunks:
                read.put(chunk)
                if left.is_set():
                    return
        read.put(_EndError())
    except Exception as error:  # raised where the chunks are taken
        read.put(error)


def _read_http(url: str, start: int, stall_s: float) -> Chunks:
    parts = urlsplit(url)
    path, query = quote(parts.path, IN_URLS), quote(parts.query, IN_URLS)
    request = urllib.request.Request(
        urlunsplit((parts.scheme, parts.netloc, path, query, "")),
        headers={"Range": f"bytes={start}-"} if start else {},
    )
    try:
        with urllib.request.urlopen(request, timeout=stall_s) as answer:
            yield b"" if answer.status == http.client.PARTIAL_CONTENT else None
            while chunk := answer.read1(CHUNK_BYTES):
                yield chunk
    except urllib.error.HTTPError as error:
        kind = GoneError if error.code < 500 and error.code not in MAY_PASS else OSError
        raise kind(f"the server answers {error.code} {error.reason}") from error
    except http.client.InvalidURL as error:
        raise GoneError(first_line(error)) from error
    except http.client.HTTPException as error:
        raise OSError(f"broken answer ({error!r})") from error


def _read_scheme(url: str, stall_s: float) -> Chunks:
    """Read by webdataset's opener for the URL's scheme, or else by fsspec's."""
    from webdataset.gopen import gopen, gopen_schemes, rewrite_url  # here: few need the import

    scheme = urlsplit(rewrite_url(url)).scheme
    if scheme != "file" and scheme not in gopen_schemes:
        yield from _watched(_read_fsspec(url), stall_s)
        return
    source = gopen(url, "rb")
    if hasattr(source, "proc"):
        yield from _read_process(source.proc, stall_s)
    else:
        yield from _watched(_read_file(source), stall_s)


def _read_fsspec(url: str) -> Chunks:
    from fsspec.core import url_to_fs

    try:
        files, path = url_to_fs(url)
        # Small blocks: a chunk must come within the time-out.
        yield from _read_file(files.open(path, "rb", block_size=CHUNK_BYTES))
    except (OSError, ValueError, ImportError):
        raise
    except Exception as error:  # each library behind it has its own kinds
        raise OSError(f"{type(error).__name__}: {first_line(error)}") from error


def _read_file(source: IO[bytes]) -> Chunks:
    yield None
    with source:
        while chunk := source.read(CHUNK_BYTES):
            yield chunk


def _read_process(process: "subprocess.Popen[bytes]", stall_s: float) -> Chunks:
    assert process.stdout is not None
    poll = select.poll()
    poll.register(process.stdout, select.POLLIN)
    try:
        yield None
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
