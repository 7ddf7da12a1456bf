"""Copies of remote shards on the local disk: checked, shared by all processes of a machine."""

import fcntl
import hashlib
import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from dist_vse.errors import UserError
from dist_vse.index import Shard
from dist_vse.stream.download import CHUNK_BYTES, GoneError, append_url

RETRY_DELAYS_S = (1.0, 4.0, 16.0)
STALL_S = 30.0
LIMIT_GIB = 100.0
LEFT_OVER_S = 3600.0  # a part that did not grow for so long is nobody's
OPEN_TRIES = 3  # another process may trim a copy before it is opened


@dataclass(frozen=True)
class Cache:
    """Where copies of shards lie, and how they are made."""

    folder: Path
    limit_bytes: float
    stall_s: float
    delays_s: tuple[float, ...]


def cache_from_environment() -> Cache:
    """Read `DIST_VSE_CACHE`, `DIST_VSE_CACHE_GIB` and `DIST_VSE_STALL_S`.

    Raises UserError for what is no number above 0.
    """
    given = os.environ.get("DIST_VSE_CACHE")
    user_cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Cache(
        Path(given) if given else user_cache / "dist_vse",
        _number("DIST_VSE_CACHE_GIB", LIMIT_GIB) * 2**30,
        _number("DIST_VSE_STALL_S", STALL_S),
        RETRY_DELAYS_S,
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
        f"{shard.path}: its copy is gone from {cache.folder} before it is opened; raise "
        "DIST_VSE_CACHE_GIB"
    )


def fetch(shard: Shard, cache: Cache) -> Path:
    """Copy a remote shard into the cache, unless it is there, and return its path.

    The file appears by one rename, after its SHA-256 agrees with the index. One process of a
    machine copies while the others wait, and if it fails, they fail alike. A failed copy is tried
    again after each delay, where possible from the byte at which it broke off. The shards that
    were fetched or opened longest ago make room.

    Raises UserError naming the shard if no copy succeeds.
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
        raise UserError(failure)  # it happened while we waited: no second wait for the same
    try:
        _make_room(cache, shard.num_bytes)
        _copy(shard, path, cache)
    except OSError as error:
        lock.seek(0)
        lock.truncate()
        lock.write(_failure(shard, cache, error))
        raise


def _failure(shard: Shard, cache: Cache, error: OSError) -> str:
    return (
        f"{shard.path}: cannot be fetched into {cache.folder} ({error}); check the address and the "
        "disk, or set DIST_VSE_CACHE to another folder"
    )


def _copy_name(shard: Shard) -> str:
    """Name a copy by its content, and for people by the end of its path."""
    name = re.sub(r"[^\w.-]", "_", re.split("[?#]", shard.path)[0].rsplit("/", 1)[-1])
    return f"{shard.sha256[:16]}-{name[-80:]}"


def _touch(path: Path) -> bool:
    """Mark a file as used just now; return False if there is none."""
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


def _copy(shard: Shard, path: Path, cache: Cache) -> None:
    part = path.with_name(path.name + ".part")  # ours alone, by the lock
    for delay in (*cache.delays_s, None):
        try:
            return _copy_once(shard, path, part, cache.stall_s)
        except GoneError:
            raise
        except OSError:
            if delay is None:
                raise
            time.sleep(delay)


def _copy_once(shard: Shard, path: Path, part: Path, stall_s: float) -> None:
    with open(part, "ab+") as file:
        if file.tell() >= shard.num_bytes:
            file.truncate(0)
        append_url(shard.path, file, shard.num_bytes, stall_s)
        num_bytes = file.seek(0, os.SEEK_END)
        if num_bytes < shard.num_bytes:
            raise OSError(f"it ends after {num_bytes} of {shard.num_bytes} bytes")
        file.seek(0)
        digest = hashlib.sha256()
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
    if digest.hexdigest() != shard.sha256:
        part.unlink()
        raise OSError(f"SHA-256 {digest.hexdigest()[:16]}, but the index has {shard.sha256[:16]}")
    os.replace(part, path)


def _make_room(cache: Cache, num_bytes: int) -> None:
    """Remove the copies used longest ago until `num_bytes` more fit into the cache.

    A process that has a removed copy open reads on; its bytes are freed when it is closed.
    """
    with _locked(cache.folder / "trim.lock"):
        files = []
        for path in cache.folder.iterdir():
            with suppress(FileNotFoundError):  # a part that became a copy just now
                files += [(path, path.stat())] if path.suffix != ".lock" else []
        held = sum(stat.st_size for _, stat in files)
        for path, stat in sorted(files, key=lambda file: file[1].st_mtime):
            if held + num_bytes <= cache.limit_bytes:
                return
            if path.suffix != ".part" or time.time() - stat.st_mtime > LEFT_OVER_S:
                path.unlink(missing_ok=True)
                held -= stat.st_size
