"""Copies of remote shards on the local disk: checked, shared by all processes of a machine."""

import fcntl
import hashlib
import os
import time
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import urlparse

from dist_vse.errors import UserError
from dist_vse.index import Shard

COPY_BYTES = 1 << 20
RETRY_DELAYS_S = (1.0, 10.0)


def cache_folder() -> Path:
    """Return the folder of fetched shards: `$DIST_VSE_CACHE`, or the user's cache folder."""
    given = os.environ.get("DIST_VSE_CACHE")
    user_cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(given) if given else Path(user_cache) / "dist_vse"


def fetch(shard: Shard, folder: Path, *, delays_s: Sequence[float] = RETRY_DELAYS_S) -> Path:
    """Copy a remote shard into the folder, unless it is there, and return its path.

    The file appears by one rename, after its SHA-256 agrees with the index. One process of a
    machine copies while the others wait. A failed copy is tried again after each delay.

    Raises UserError naming the shard if no copy succeeds.
    """
    name = urlparse(shard.path).path.rsplit("/", 1)[-1]
    path = folder / f"{shard.sha256[:16]}-{name}"
    if path.exists():
        return path
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with open(path.with_name(path.name + ".lock"), "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not path.exists():
                _copy(shard, path, delays_s)
    except OSError as error:
        raise UserError(
            f"{shard.path}: cannot be fetched into {folder} ({error}); check the address and the "
            "disk, or set DIST_VSE_CACHE to another folder"
        ) from error
    return path


def _copy(shard: Shard, path: Path, delays_s: Sequence[float]) -> None:
    for delay in delays_s:
        try:
            return _copy_once(shard, path)
        except OSError:
            time.sleep(delay)
    _copy_once(shard, path)


def _copy_once(shard: Shard, path: Path) -> None:
    from webdataset import gopen  # here: only remote shards pay for the import

    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    digest = hashlib.sha256()
    try:
        with gopen(shard.path, "rb") as source, open(temporary, "wb") as target:
            while data := source.read(COPY_BYTES):
                digest.update(data)
                target.write(data)
        if digest.hexdigest() != shard.sha256:
            raise OSError(f"SHA-256 {digest.hexdigest()[:16]} where the index says otherwise")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
