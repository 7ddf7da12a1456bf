"""Fetch images at URLs: in parallel, a little ahead of the writer, with bounded memory."""

import contextlib
import errno
import tempfile
import threading
import time
import urllib.error
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from email.message import Message
from functools import lru_cache
from typing import IO
from urllib.parse import urlsplit
from urllib.robotparser import RobotFileParser

from dist_vse.common.errors import UserError, first_line
from dist_vse.data.download import PermanentError, http_chunks
from dist_vse.shards.fetching import Fetching, refused_by

BACKOFF_S = 1.0  # before the second try; four times as much before each further one
AHEAD = 4  # images that wait or are on their way, for each connection
IN_MEMORY = 1 << 20  # bytes of one image; what is beyond them lies on the disk
SLOW = 10  # times the time-out that a whole image may take
OUTAGE = 20  # images of which none got an answer: not they are at fault, but the network
HOSTS = 4096  # whose robots.txt is remembered


class Fetcher:
    """Fetches images; keeps what is known of their hosts. Threads share it."""

    def __init__(self, options: Fetching) -> None:
        self.options = options
        self._lock = threading.Lock()
        self._next: dict[str, float] = {}  # host to the time of the next request
        self._robots = lru_cache(maxsize=HOSTS)(self._read_robots)

    def fetch(self, url: str) -> IO[bytes]:
        """Return an open file with the image, tried again after a while where that may help.

        Raises OSError: PermanentError where the answer was no.
        """
        if self.options.robots == "full":
            parts = urlsplit(url)
            robots = self._robots(f"{parts.scheme}://{parts.netloc}/robots.txt")
            if not robots.can_fetch(self.options.token, url):
                raise PermanentError("robots.txt disallows it")
        return self._read_patiently(url)

    def _read_patiently(self, url: str) -> IO[bytes]:
        host = urlsplit(url).netloc
        for attempt in range(self.options.retries + 1):
            self._await_turn(host)
            try:
                return self._read(url)
            except PermanentError:
                raise
            except OSError:
                if attempt == self.options.retries:
                    raise
            time.sleep(BACKOFF_S * 4**attempt)
        raise AssertionError("unreachable")

    def _read(self, url: str) -> IO[bytes]:
        options, start = self.options, time.monotonic()
        headers = {"User-Agent": options.user_agent}
        file = tempfile.SpooledTemporaryFile(IN_MEMORY)  # noqa: SIM115 the writer closes it
        with contextlib.closing(
            http_chunks(url, options.timeout_s, headers, self._check)
        ) as chunks:
            for chunk in chunks:
                _write(file, chunk or b"")
                if file.tell() > options.max_bytes:
                    raise PermanentError(f"it has more than {options.max_bytes:,} bytes")
                if time.monotonic() - start > SLOW * options.timeout_s:
                    raise TimeoutError(f"it took more than {SLOW * options.timeout_s:g} s")
        file.seek(0)
        return file

    def _check(self, headers: Message) -> None:
        """Raise PermanentError if the server forbids to use the image."""
        refusal = refused_by(headers, self.options.token)
        if refusal and self.options.robots != "ignore":
            raise PermanentError(f"X-Robots-Tag says {refusal}")

    def _read_robots(self, url: str) -> RobotFileParser:
        """Return a host's rules: all is allowed without the file, nothing if it can't be read.

        https://www.rfc-editor.org/rfc/rfc9309.html#section-2.3.1
        """
        robots = RobotFileParser()
        try:
            with self._read_patiently(url) as file:
                robots.parse(file.read().decode("utf-8", "replace").splitlines())
        except PermanentError:
            robots.parse([])
        except OSError:
            robots.disallow_all = True  # type: ignore[attr-defined]
        return robots

    def _await_turn(self, host: str) -> None:
        """Wait until another request to the host is due."""
        if not self.options.per_host:
            return
        now = time.monotonic()
        with self._lock:
            if len(self._next) > HOSTS:
                self._next = {h: due for h, due in self._next.items() if due > now}
            due = max(now, self._next.get(host, 0.0))
            self._next[host] = due + 1 / self.options.per_host
        time.sleep(due - now)


class FetchedAhead:
    """The images of a shard, in the order in which they are asked for."""

    def __init__(self, fetcher: Fetcher, urls: Iterable[str], pool: ThreadPoolExecutor) -> None:
        self._fetcher, self._urls, self._pool = fetcher, iter(urls), pool
        self._pending: deque[tuple[str, Future[IO[bytes]]]] = deque()
        self._unanswered = 0
        self._answered = False
        for _ in range(AHEAD * fetcher.options.connections):
            self._submit()

    def read(self, url: str) -> bytes:
        """Return an image; those before it in the order are dropped.

        Raises OSError if it cannot be fetched, UserError if no image could for want of a network.
        """
        while True:
            there, future = self._pending.popleft()
            self._submit()
            if there == url:
                break
            future.cancel()
        try:
            with future.result() as file:
                data = file.read()
        except OSError as error:
            self._count(url, error)
            raise
        self._answered = True
        return data

    def _submit(self) -> None:
        url = next(self._urls, None)
        if url is not None:
            self._pending.append((url, self._pool.submit(self._fetcher.fetch, url)))

    def _count(self, url: str, error: OSError) -> None:
        """Take in a failure; raise UserError if nothing but failures to get an answer came."""
        from_server = isinstance(error.__cause__, urllib.error.HTTPError)
        self._answered |= from_server or isinstance(error, PermanentError)
        self._unanswered += 1
        if self._unanswered == OUTAGE and not self._answered:
            raise UserError(
                f"{url}: {first_line(error)}, and so for {OUTAGE} images in a row; is the network "
                "down? Run the command again to go on"
            ) from error


@contextlib.contextmanager
def fetched_ahead(urls: Iterable[str], options: Fetching) -> Iterator[FetchedAhead]:
    """Fetch in the background during the block."""
    pool = ThreadPoolExecutor(options.connections, thread_name_prefix="fetch")
    try:
        yield FetchedAhead(_fetcher(options), urls, pool)
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


@lru_cache(maxsize=1)
def _fetcher(options: Fetching) -> Fetcher:
    """Return the process's own: its hosts are the same in the next shard."""
    return Fetcher(options)


def _write(file: IO[bytes] | tempfile.SpooledTemporaryFile[bytes], data: bytes) -> None:
    try:
        file.write(data)
    except OSError as error:  # of this machine, not of the server
        full = "is full" if error.errno == errno.ENOSPC else first_line(error)
        raise UserError(
            f"{tempfile.gettempdir()}: {full}; make room, or set TMPDIR, and run the command again"
        ) from error
