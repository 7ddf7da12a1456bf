"""Which sample goes into which shard: a pure function of the records, the size and the seed."""

import hashlib
import json
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from dist_vse.common.errors import UserError
from dist_vse.shards.build.keys import safe_keys
from dist_vse.shards.fetching import Fetching
from dist_vse.shards.json_text import dump_json
from dist_vse.shards.manifest import shard_files
from dist_vse.shards.public_url import public_url
from dist_vse.shards.record import Image, Member, Record, Url, local_path

if TYPE_CHECKING:
    from dist_vse.shards.build.recode import Recode

FORMAT = 3  # of the shards' bytes; a new number rebuilds every shard
_SPLIT_NAME = re.compile(r"[A-Za-z0-9_-]+")
_EVALUATION = re.compile(r"(^|[_-])(val|valid|validation|dev|eval|test)($|[_0-9-])", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Options:
    """What the shards depend on, apart from the records."""

    shard_size: int = 500  # samples
    shard_bytes: int = 0  # bytes of the images as the source has them; 0: cut by samples
    seed: int = 0  # of the shuffle of the splits that are for training
    recode: "Recode | None" = None  # else the images' bytes stay as they are
    decode: bool = False  # decode every image to check it
    fetching: Fetching | None = None  # of images at URLs


@dataclass(frozen=True, slots=True)
class Task:
    """One shard to build."""

    name: str  # of the tar
    split: str
    records: tuple[Record, ...]
    options: Options

    @property
    def units(self) -> int:
        """Count the samples."""
        return len(self.records)

    @property
    def files(self) -> tuple[str, ...]:
        """Name the tar and its offsets."""
        return shard_files(self.name)


def plan_shards(records: Sequence[Record], options: Options) -> list[Task]:
    """Give every record a safe key, shuffle the splits for training, and cut each into shards.

    The shuffled order is that of a hash of seed and key. It does not depend on the source's order,
    and the order of two samples never changes when others come or go. Splits for
    evaluation keep the source's order: COCO 1K is defined on consecutive images of its file.

    Raises UserError for a split whose name can't be part of a file name.
    """
    splits: dict[str, list[Record]] = {}
    for record, key in zip(records, safe_keys(r.key for r in records), strict=True):
        if record.split not in splits:
            check_split(record.split, record.key)
            splits[record.split] = []
        splits[record.split].append(record if record.key == key else replace(record, key=key))
    tasks = []
    for split, members in sorted(splits.items()):
        if not is_evaluation(split):
            members.sort(key=lambda record: _shuffle_key(options.seed, record.key))
        for number, part in enumerate(_cut(members, options)):
            tasks.append(Task(f"{split}-{number:05d}.tar", split, tuple(part), options))
    return tasks


def is_evaluation(split: str) -> bool:
    """Say whether the name is one for evaluation: val, test2017, karpathy_test; not restval."""
    return _EVALUATION.search(split) is not None


def check_split(split: str, key: str) -> None:
    """Raise UserError if a split's name is unfit for a file name; `key` is one of its samples."""
    if not _SPLIT_NAME.fullmatch(split):
        raise UserError(f"split {split!r} of {key!r} is no file name; use letters, digits, - and _")


class Fingerprint:
    """A digest of all that a shard's bytes depend on; an image counts by size and time.

    A changed caption, image, order, option or format gives another fingerprint. A remote image
    counts by its URL only: to ask for its state would be a request each.
    """

    def __init__(self, task: Task) -> None:
        options = asdict(task.options)
        del options["shard_size"], options["shard_bytes"]  # they show in the records
        del options["fetching"]
        if task.options.fetching is not None:  # who else may be asked: other images
            options["robots"] = task.options.fetching.robots
        start = json.dumps([FORMAT, task.name, task.split, options])
        self._digest = hashlib.sha256(start.encode())

    def add(self, record: Record, state: tuple[int, int], meta: bytes) -> None:
        """Count the next record in, with what `image_state` says of its image, and its JSON."""
        image = record.image
        if isinstance(image, Member):
            place = f"{image.url}{image.offset}+{image.num_bytes}"
        elif isinstance(image, Url):
            place = public_url(image.url)  # a list that was signed again names the same images
        else:
            place = "" if local_path(image) else str(image)
        content = meta + record.fault.encode("utf-8", "backslashreplace")
        self._digest.update(b"%b %d %d %b\n" % (os.fsencode(place), *state, content))

    def hexdigest(self) -> str:
        """Return the digest of what was added."""
        return self._digest.hexdigest()


def fingerprint(task: Task) -> str:
    """Return the digest of a whole task."""
    whole = Fingerprint(task)
    for record in task.records:
        whole.add(record, image_state(record.image), sample_json(record))
    return whole.hexdigest()


def sample_json(record: Record) -> bytes:
    """Return the JSON that lies beside the image: ASCII, whatever the extra fields hold."""
    content: dict[str, Any] = {
        "key": record.key,
        "captions": record.captions,
        "split": record.split,
    }
    if record.languages:
        content["languages"] = record.languages
    return dump_json(content | {k: v for k, v in record.extra.items() if k not in content})


def image_state(image: Image) -> tuple[int, int]:
    """Return size (bytes) and time (ns) of the file that holds an image; zeros if it has none."""
    path = local_path(image)
    if path:
        try:
            status = os.stat(path)
            return status.st_size, status.st_mtime_ns
        except (OSError, ValueError):  # what cannot be looked at has no state; reading reports it
            pass
    return 0, 0


def _cut(members: Sequence[Record], options: Options) -> Iterator[Sequence[Record]]:
    """Yield the members of each shard; only a single image may exceed `shard_bytes`."""
    if not options.shard_bytes:
        for start in range(0, len(members), options.shard_size):
            yield members[start : start + options.shard_size]
        return
    part: list[Record] = []
    num_bytes = 0
    for record in members:
        image = record.image
        size = image.num_bytes if isinstance(image, Member) else image_state(image)[0]
        if part and num_bytes + size > options.shard_bytes:
            yield part
            part, num_bytes = [], 0
        part.append(record)
        num_bytes += size
    yield part


def _shuffle_key(seed: int, key: str) -> bytes:
    return hashlib.sha256(f"{seed}/{key}".encode()).digest()
