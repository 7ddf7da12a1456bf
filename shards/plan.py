"""Which sample goes into which shard: a pure function of the records, the size and the seed."""

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

from dist_vse.errors import UserError
from shards.keys import safe_keys
from shards.record import Record

FORMAT = 1  # of the bytes that a shard holds; a new number makes every shard again
_SPLIT_NAME = re.compile(r"[A-Za-z0-9_-]+")


@dataclass(frozen=True, slots=True)
class Task:
    """One shard to be made."""

    name: str  # of the tar
    split: str
    records: tuple[Record, ...]


def plan_shards(records: Sequence[Record], *, shard_size: int, seed: int) -> list[Task]:
    """Give every record a safe key, shuffle each split, and cut it into shards.

    The order is that of a hash of seed and key: the same wherever the source's order differs
    (folders), and of two samples it never changes when others come or go.

    Raises UserError for a split whose name is unfit for a file.
    """
    splits: dict[str, list[Record]] = {}
    for record, key in zip(records, safe_keys(r.key for r in records), strict=True):
        if not _SPLIT_NAME.fullmatch(record.split):
            raise UserError(
                f"split {record.split!r} of {record.key!r} is no file name; "
                "use letters, digits, - and _"
            )
        splits.setdefault(record.split, []).append(replace(record, key=key))
    tasks = []
    for split, members in sorted(splits.items()):
        members.sort(key=lambda record: _shuffle_key(seed, record.key))
        for number, start in enumerate(range(0, len(members), shard_size)):
            part = tuple(members[start : start + shard_size])
            tasks.append(Task(f"{split}-{number:05d}.tar", split, part))
    return tasks


def fingerprint(task: Task) -> str:
    """Return a digest of all that a shard's bytes depend on; an image counts by size and time.

    A changed caption, image, order or format gives another fingerprint.
    """
    digest = hashlib.sha256(json.dumps([FORMAT, task.name, task.split]).encode())
    for record in task.records:
        try:
            status = record.image.stat()
            state = [status.st_size, status.st_mtime_ns]
        except (OSError, ValueError):  # what cannot be looked at has no state; writing reports it
            state = []
        fields = [record.key, record.captions, record.extra, state]
        digest.update(json.dumps(fields).encode())
    return digest.hexdigest()


def _shuffle_key(seed: int, key: str) -> bytes:
    return hashlib.sha256(f"{seed}/{key}".encode()).digest()
