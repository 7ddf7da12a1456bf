"""The bytes of a URL or a `pipe:` command, or an OSError after a while without any."""

import base64
import contextlib
import http.client
import io
import os
import queue
import select
import signal
import subprocess
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Generator, Mapping
from email.message import Message
from types import MappingProxyType
from typing import IO
from urllib.parse import quote, unquote_to_bytes, urlsplit, urlunsplit

from dist_vse.common.errors import first_line
from dist_vse.data.index import check_consent

CHUNK_BYTES = 1 << 20
STALL_S = 60.0  # time-out of those who have none of their own
RETRY_DELAYS_S = (1.0, 4.0)
MIN_BYTES = 1 << 14  # expected within a time-out; fewer count as a stall
RETRY_STATUS = (408, 425, 429)  # statuses below 500 that may succeed on another try
UNQUOTED = "%/?:@!$&'()*+,;=~[]"  # not quoted; % so that a quoted URL is not quoted twice

Chunks = Generator[bytes | None, None, None]
"""Bytes; None where the source starts again from its first byte."""


class PermanentError(OSError):
    """The source can't be read, and another try would not help."""


def append_url(
    url: str,
    file: IO[bytes],
    num_bytes: int | None,
    stall_s: float,
    *,
    allow_pipe: bool = False,
) -> None:
    """Append what a URL holds beyond the file's end; a source that can't resume sends all again.

    Raises UserError for a command without the user's consent (`allow_pipe`). Raises OSError
    (PermanentError if another try would not help) if the source fails, if almost nothing arrives
    for `stall_s` seconds, or once the file is longer than `num_bytes`, if given.
    """
    check_consent(url, allow_pipe=allow_pipe)
    try:
        with contextlib.closing(_chunks(url, file.seek(0, os.SEEK_END), stall_s)) as chunks:
            for chunk in _check_rate(chunks, stall_s):
                if chunk is None:
                    file.truncate(0)
                elif file.write(chunk) and num_bytes is not None and file.tell() > num_bytes:
                    raise OSError(f"it goes on after {num_bytes} bytes, its size in the index")
    except (ValueError, ImportError) as error:  # no address, no such scheme, or no library for it
        raise PermanentError(first_line(error)) from error


def download(url: str, file: IO[bytes], *, allow_pipe: bool = False) -> None:
    """Append all that a URL or a `pipe:` command holds to an empty file.

    Over HTTP, what breaks off is gone on with. Raises UserError and OSError as `append_url`.
    """
    for delay in (*RETRY_DELAYS_S, None):
        try:
            return append_url(url, file, None, STALL_S, allow_pipe=allow_pipe)
        except PermanentError:
            raise
        except OSError:
            if delay is None or not url.startswith(("http://", "https://")):
                raise
            time.sleep(delay)


def read_url(url: str) -> bytes:
    """Return what a URL holds. Raises OSError as `append_url`."""
    file = io.BytesIO()
    download(url, file)
    return file.getvalue()


def http_chunks(
    url: str, stall_s: float, headers: Mapping[str, str], check: Callable[[Message], None]
) -> Chunks:
    """Yield what a URL holds, asked for once, with more headers; `check` sees those that come back.

    Raises OSError as `append_url`, and what `check` raises.
    """
    try:
        yield from _check_rate(
            _with_timeout(_read_http(url, 0, stall_s, headers, check), stall_s), stall_s
        )
    except ValueError as error:
        raise PermanentError(first_line(error)) from error


def _check_rate(chunks: Chunks, stall_s: float) -> Chunks:
    """Yield the chunks. Raises TimeoutError if too few bytes arrive within a time-out."""
    marked, since = time.monotonic(), 0
    for chunk in chunks:
        yield chunk
        since += len(chunk or b"")
        if time.monotonic() - marked > stall_s:
            if since < MIN_BYTES:
                raise TimeoutError(f"only {since} bytes in {stall_s:g} s")
            marked, since = time.monotonic(), 0


def _chunks(url: str, start: int, stall_s: float) -> Chunks:
    if url.startswith(("http://", "https://")):
        return _with_timeout(_read_http(url, start, stall_s), stall_s)
    if not url.startswith("pipe:"):
        return _read_scheme(url, stall_s)
    # In a new session, so that all of the pipe's commands can be killed.
    process = subprocess.Popen(
        url.removeprefix("pipe:"), shell=True, stdout=subprocess.PIPE, start_new_session=True
    )
    return _read_process(process, stall_s)


def _with_timeout(chunks: Chunks, stall_s: float) -> Chunks:
    """Yield what a thread reads; abandon the thread if nothing arrives for `stall_s` seconds.

    Socket time-outs cover one read each; name look-ups, headers and libraries have none.
    """
    read: queue.Queue[bytes | Exception | None] = queue.Queue(maxsize=2)
    abandoned = threading.Event()
    threading.Thread(target=_read_on, args=(chunks, read, abandoned), daemon=True).start()
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
        abandoned.set()
        while not read.empty():  # unblocks the thread so that it can exit
            read.get()


class _EndError(Exception):
    """Marks the end, after the last chunk."""


def _read_on(
    chunks: Chunks, read: "queue.Queue[bytes | Exception | None]", abandoned: threading.Event
) -> None:
    try:
        with contextlib.closing(chunks):
            for chunk in chunks:
                read.put(chunk)
                if abandoned.is_set():
                    return
        read.put(_EndError())
    except Exception as error:  # raised again by the consumer
        read.put(error)


def _read_http(
    url: str,
    start: int,
    stall_s: float,
    headers: Mapping[str, str] = MappingProxyType({}),
    check: Callable[[Message], None] = lambda headers: None,
) -> Chunks:
    parts = urlsplit(url)
    path, query = quote(parts.path, UNQUOTED), quote(parts.query, UNQUOTED)
    login, _, host = parts.netloc.rpartition("@")
    request = urllib.request.Request(
        urlunsplit((parts.scheme, host, path, query, "")),
        headers={**headers, "Range": f"bytes={start}-"} if start else dict(headers),
    )
    if login:  # user:password, for this host alone
        basic = base64.b64encode(unquote_to_bytes(login)).decode()
        request.add_unredirected_header("Authorization", f"Basic {basic}")
    try:
        with urllib.request.urlopen(request, timeout=stall_s) as response:
            check(response.headers)
            yield b"" if response.status == http.client.PARTIAL_CONTENT else None
            while chunk := response.read1(CHUNK_BYTES):
                yield chunk
            if response.length:  # of Content-Length
                raise OSError(f"the connection ended {response.length:,} bytes early")
    except urllib.error.HTTPError as error:
        kind = PermanentError if error.code < 500 and error.code not in RETRY_STATUS else OSError
        raise kind(f"the server responded {error.code} {error.reason}") from error
    except http.client.InvalidURL as error:
        raise PermanentError(first_line(error)) from error
    except http.client.HTTPException as error:
        raise OSError(f"broken response ({error!r})") from error


def _read_scheme(url: str, stall_s: float) -> Chunks:
    """Read with webdataset's opener for the URL's scheme, else with fsspec's."""
    from webdataset.gopen import gopen, gopen_schemes, rewrite_url  # here: few need the import

    scheme = urlsplit(rewrite_url(url)).scheme
    if scheme != "file" and scheme not in gopen_schemes:
        yield from _with_timeout(_read_fsspec(url), stall_s)
        return
    source = gopen(url, "rb")
    if hasattr(source, "proc"):
        yield from _read_process(source.proc, stall_s)
    else:
        yield from _with_timeout(_read_file(source), stall_s)


def _read_fsspec(url: str) -> Chunks:
    from fsspec.core import url_to_fs

    try:
        files, path = url_to_fs(url)
        # Small blocks: a chunk must come within the time-out.
        yield from _read_file(files.open(path, "rb", block_size=CHUNK_BYTES))
    except (OSError, ValueError, ImportError):
        raise
    except Exception as error:  # each backend raises its own types
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
        raise TimeoutError(f"the command did not exit within {stall_s:g} s") from None
    finally:
        if process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                leads = os.getpgid(process.pid) == process.pid
                os.killpg(process.pid, signal.SIGKILL) if leads else process.kill()
        process.stdout.close()
        process.wait()
    if status != 0:
        raise OSError(f"the command exited with code {status}")
