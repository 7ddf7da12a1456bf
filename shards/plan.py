"""Which sample goes into which shard: a pure function of the records, the size and the seed."""

import hashlib
import json
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from dist_vse.errors import UserError
from shards.keys import safe_keys
from shards.recode import Recode
from shards.record import Member, Record

FORMAT = 2  # of the bytes that a shard holds; a new number makes every shard again
_SPLIT_NAME = re.compile(r"[A-Za-z0-9_-]+")


@dataclass(frozen=True, slots=True)
class Options:
    """What the shards depend on, beside the records."""

    shard_size: int = 500  # samples
    shard_bytes: int = 0  # bytes of the images as the source has them; 0: cut by samples
    seed: int = 0
    recode: Recode | None = None  # else the images' bytes stay as they are
    decode: bool = False  # decode every image to check it


@dataclass(frozen=True, slots=True)
class Task:
    """One shard to be made."""

    name: str  # of the tar
    split: str
    records: tuple[Record, ...]
    options: Options

    @property
    def units(self) -> int:
        """Count the samples."""
        return len(self.records)


def plan_shards(records: Sequence[Record], options: Options) -> list[Task]:
    """Give every record a safe key, shuffle each split, and cut it into shards.

    The order is that of a hash of seed and key: the same wherever the source's order differs
    (folders), and of two samples it never changes when others come or go.

    Raises UserError for a split whose name is unfit for a file.
    """
    splits: dict[str, list[Record]] = {}
    for record, key in zip(records, safe_keys(r.key for r in records), strict=True):
        check_split(record.split, record.key)
        splits.setdefault(record.split, []).append(replace(record, key=key))
    tasks = []
    for split, members in sorted(splits.items()):
        members.sort(key=lambda record: _shuffle_key(options.seed, record.key))
        for number, part in enumerate(_cut(members, options)):
            tasks.append(Task(f"{split}-{number:05d}.tar", split, tuple(part), options))
    return tasks


def check_split(split: str, key: str) -> None:
    """Raise UserError, naming a sample of it, for a split whose name is unfit for a file."""
    if not _SPLIT_NAME.fullmatch(split):
        raise UserError(f"split {split!r} of {key!r} is no file name; use letters, digits, - and _")


def fingerprint(task: Task) -> str:
    """Return a digest of all that a shard's bytes depend on; an image counts by size and time.

    A changed caption, image, order, option or format gives another fingerprint. A remote image
    counts by its URL only: to ask for its state would be a request each.
    """
    options = asdict(task.options)
    del options["shard_size"], options["shard_bytes"]  # they show in the records
    digest = hashlib.sha256(json.dumps([FORMAT, task.name, task.split, options]).encode())
    for record in task.records:
        fields = [record.key, record.captions, record.languages, record.extra, _state(record)]
        digest.update(json.dumps(fields).encode())
    return digest.hexdigest()


def _cut(members: Sequence[Record], options: Options) -> Iterator[Sequence[Record]]:
    """Yield the members of each shard; only a single image may exceed `shard_bytes`."""
    if not options.shard_bytes:
        for start in range(0, len(members), options.shard_size):
            yield members[start : start + options.shard_size]
        return
    part: list[Record] = []
    num_bytes = 0
    for record in members:
        state = _state(record)
        size = state[0] if state and isinstance(state[0], int) else 0
        if part and num_bytes + size > options.shard_bytes:
            yield part
            part, num_bytes = [], 0
        part.append(record)
        num_bytes += size
    yield part


def _state(record: Record) -> list[int | str]:
    """Return the image's size (bytes) and what else tells its state; nothing if it is missing."""
    image = record.image
    path = image.path if isinstance(image, Member) else image
    if not isinstance(path, Path):  # remote
        return [str(path)]
    try:
        status = os.stat(path)
    except (OSError, ValueError):  # what cannot be looked at has no state; writing reports it
        return []
    if isinstance(image, Member):
        return [image.num_bytes, image.offset, status.st_size, status.st_mtime_ns]
    return [status.st_size, status.st_mtime_ns]


def _shuffle_key(seed: int, key: str) -> bytes:
    return hashlib.sha256(f"{seed}/{key}".encode()).digest()
