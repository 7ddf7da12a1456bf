"""Copies of remote shards on the local disk: checked, shared by all processes of a machine."""

import fcntl
import os
import re
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from dist_vse.common.errors import UserError
from dist_vse.common.files import sha256_of_file
from dist_vse.common.terminal import without_secrets
from dist_vse.common.units import GIB
from dist_vse.data.download import PermanentError, append_url
from dist_vse.data.index import Shard

RETRY_DELAYS_S = (1.0, 4.0, 16.0)
STALL_S = 30.0
LIMIT_GIB = 100.0
WAIT_S = 0.1  # between two checks for free space
OURS = "[0-9a-f]" * 16 + "-*"  # names of copies, their parts and locks
OPEN_TRIES = 3  # another process may trim a copy before it is opened


@dataclass(frozen=True)
class Cache:
    """Where copies of shards lie, and how they are made."""

    folder: Path
    limit_bytes: float
    stall_s: float
    delays_s: tuple[float, ...]
    allow_pipe: bool = False
    """Whether the user lets commands run that stand for shards."""


def cache_from_environment(*, allow_pipe: bool = False) -> Cache:
    """Read `DIST_VSE_CACHE`, `DIST_VSE_CACHE_GIB` and `DIST_VSE_STALL_S`.

    Raises UserError for what is no number above 0.
    """
    given = os.environ.get("DIST_VSE_CACHE")
    user_cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Cache(
        Path(given) if given else user_cache / "dist_vse",
        _number("DIST_VSE_CACHE_GIB", LIMIT_GIB) * GIB,
        _number("DIST_VSE_STALL_S", STALL_S),
        RETRY_DELAYS_S,
        allow_pipe,
    )


def _number(name: str, default: float) -> float:
    text = os.environ.get(name, str(default))
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not value > 0:
        raise UserError(f"{name}={text!r}: give a number above 0, such as {default:g}")
    return value


def open_copy(shard: Shard, cache: Cache) -> tuple[Path, int]:
    """Return the path of a remote shard's copy, and the descriptor of the opened file.

    Raises UserError as `fetch` does, or if the cache is too small to keep it for a moment.
    """
    for _ in range(OPEN_TRIES):
        path = fetch(shard, cache)
        try:
            return path, os.open(path, os.O_RDONLY)
        except FileNotFoundError:
            continue
    raise UserError(
        f"{shard.path}: its copy was removed from {cache.folder} before it could be opened; raise "
        "DIST_VSE_CACHE_GIB"
    )


def fetch(shard: Shard, cache: Cache) -> Path:
    """Copy a remote shard into the cache, unless it is there, and return its path.

    The file appears by one rename, after its SHA-256 agrees with the index. One process per machine
    copies while the others wait; if it fails, all fail with its error. A failed copy is tried again
    after each delay, if possible from the byte where it stopped. The least recently used copies are
    removed to make room; if that is not enough, it waits for the copies in progress.

    Raises UserError naming the shard if no copy succeeds, or if the cache can never hold it.
    """
    path = cache.folder / _copy_name(shard)
    if _touch(path):
        return path
    try:
        cache.folder.mkdir(parents=True, exist_ok=True)
        asked = time.time()
        with _locked(path.with_name(path.name + ".lock")) as lock:
            if not _touch(path):
                _copy_as_one(shard, path, cache, lock, asked)
    except OSError as error:
        raise UserError(_failure(shard, cache, error)) from error
    return path


def _copy_as_one(shard: Shard, path: Path, cache: Cache, lock: IO[str], asked: float) -> None:
    """Copy under the shard's lock; the lock's file holds the last failure."""
    failure = lock.read()
    if failure and os.fstat(lock.fileno()).st_mtime >= asked:
        raise UserError(failure)  # it failed while we waited: don't wait for the same again
    if shard.num_bytes > cache.limit_bytes:
        raise UserError(
            f"{shard.path}: has {shard.num_bytes:,} bytes, more than {cache.folder} may hold "
            f"({cache.limit_bytes:,.0f}); raise DIST_VSE_CACHE_GIB"
        )
    # Ours alone, by the lock. Its name holds its final size, for the other processes.
    part = path.with_name(f"{path.name}.{shard.num_bytes}.part")
    try:
        while not _reserve(part, shard.num_bytes, cache):
            time.sleep(WAIT_S)
        _copy(shard, path, part, cache)
    except OSError as error:
        lock.seek(0)
        lock.truncate()
        lock.write(_failure(shard, cache, error))
        raise


def _failure(shard: Shard, cache: Cache, error: OSError) -> str:
    return without_secrets(  # a file holds it
        f"{shard.path}: cannot be fetched into {cache.folder} ({error}); check the address and the "
        "disk, or set DIST_VSE_CACHE to another folder"
    )


def _copy_name(shard: Shard) -> str:
    """Name a copy by its checksum and the end of its path."""
    name = re.sub(r"[^\w.-]", "_", re.split("[?#]", shard.path)[0].rsplit("/", 1)[-1])
    return f"{shard.sha256[:16]}-{name[-80:]}"


def _touch(path: Path) -> bool:
    """Mark a file as just used; return False if there is none."""
    try:
        os.utime(path)
    except FileNotFoundError:
        return False
    return True


@contextmanager
def _locked(path: Path) -> Iterator[IO[str]]:
    with open(path, "a+", encoding="utf-8") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        lock.seek(0)
        yield lock


def _copy(shard: Shard, path: Path, part: Path, cache: Cache) -> None:
    for delay in (*cache.delays_s, None):
        try:
            _copy_once(shard, part, cache)
            break
        except PermanentError:
            raise
        except OSError:
            if delay is None:
                raise
            time.sleep(delay)
    with _trimming(cache):  # so that it counts as a part or as a copy, never as both
        os.replace(part, path)


def _copy_once(shard: Shard, part: Path, cache: Cache) -> None:
    with open(part, "ab+") as file:
        if file.tell() >= shard.num_bytes:
            file.truncate(0)
        append_url(shard.path, file, shard.num_bytes, cache.stall_s, allow_pipe=cache.allow_pipe)
        num_bytes = file.seek(0, os.SEEK_END)
        if num_bytes < shard.num_bytes:
            raise OSError(f"it ends after {num_bytes} of {shard.num_bytes} bytes")
    digest = sha256_of_file(part)
    if digest != shard.sha256:
        os.truncate(part, 0)
        raise OSError(f"SHA-256 {digest[:16]}, but the index has {shard.sha256[:16]}")


def _reserve(part: Path, num_bytes: int, cache: Cache) -> bool:
    """Create a part if it fits, after removing the least recently used copies; return if it fits.

    A process that has a removed copy open can go on reading; the space is freed when it closes it.
    """
    with _trimming(cache):
        free, idle = cache.limit_bytes - num_bytes, []
        for path in cache.folder.glob(OURS):
            if path.suffix == ".part" and path != part and _is_locked(path):
                free -= int(path.suffixes[-2][1:])
            elif path.suffix != ".lock" and path != part:
                stat = path.stat()
                free -= stat.st_size
                idle.append((stat.st_mtime, stat.st_size, path))
        for _, size, path in sorted(idle):
            if free < 0:
                path.unlink()
                free += size
        if free < 0:
            part.unlink(missing_ok=True)  # else two left-overs would wait for each other
        else:
            part.touch()
        return free >= 0


def _trimming(cache: Cache) -> AbstractContextManager[IO[str]]:
    return _locked(cache.folder / "trim.lock")


def _is_locked(part: Path) -> bool:
    """Return whether a process is writing this part; if not, it is a left-over."""
    with open(part.with_suffix("").with_suffix(".lock"), "a", encoding="utf-8") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False
