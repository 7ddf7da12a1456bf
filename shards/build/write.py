"""Write one shard: read, check and pack its samples; or check that it exists already."""

import os
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

from dist_vse.common.files import atomic_write, sha256_of_file
from dist_vse.data.index import image_id, offsets_name, write_offsets
from dist_vse.shards.build.plan import (
    Fingerprint,
    Options,
    Task,
    fingerprint,
    image_state,
    sample_json,
)
from dist_vse.shards.build.read import image_reader
from dist_vse.shards.build.tar_writer import TarWriter
from dist_vse.shards.manifest import ShardEntry, Skipped
from dist_vse.shards.record import Image, Member, Record, local_path
from dist_vse.shards.sample_checks import (
    BadSampleError,
    check_captions,
    check_image,
    check_optional,
)

Row = tuple[int, int, int, int, int]
"""A sample's position and its image's id: `dist_vse.data.index.OFFSET_COLUMNS`."""
Read = Callable[[Image], bytes]


def write_shard(task: Task, folder: Path) -> ShardEntry:
    """Write the task's tar and its offsets into `folder`, each by one rename.

    Bad samples are left out and listed in the returned entry. Raises UserError for an image that is
    there but cannot be read.
    """
    plan = Fingerprint(task)
    rows: list[Row] = []
    skipped: list[Skipped] = []
    num_captions = 0
    offsets = folder / offsets_name(task.name)
    with ExitStack() as reading, atomic_write(folder / task.name) as temporary:
        read = reading.enter_context(image_reader(task))
        with temporary.open("wb", buffering=0) as file, TarWriter(file) as tar:
            for record in task.records:
                state, meta = image_state(record.image), sample_json(record)
                plan.add(record, state, meta)  # before the reading: a change shows next time
                try:
                    rows.append(_add_sample(tar, record, state[0], meta, task.options, read))
                    num_captions += len(record.captions)
                except BadSampleError as error:
                    skipped.append(Skipped(record.key, str(record.image), str(error)))
            sha256 = tar.close()
        write_offsets(offsets, rows)  # before the tar: a tar that is there has its offsets
    return ShardEntry(
        name=task.name,
        split=task.split,
        fingerprint=plan.hexdigest(),
        num_samples=len(rows),
        num_captions=num_captions,
        num_bytes=tar.num_bytes,
        sha256=sha256,
        offsets_sha256=sha256_of_file(offsets),
        skipped=skipped,
    )


def is_whole(task: Task, folder: Path, entry: ShardEntry) -> bool:
    """Return whether `folder` holds the shard exactly as the task would write it."""
    tar, offsets = folder / task.name, folder / offsets_name(task.name)
    fetching = task.options.fetching
    if fetching is not None and fetching.retry_failed and entry.skipped:
        return False
    return (
        tar.is_file()
        and offsets.is_file()
        and tar.stat().st_size == entry.num_bytes
        and fingerprint(task) == entry.fingerprint
        and sha256_of_file(offsets) == entry.offsets_sha256
        and sha256_of_file(tar) == entry.sha256
    )


def _add_sample(
    tar: TarWriter, record: Record, num_bytes: int, meta: bytes, options: Options, read: Read
) -> Row:
    """Append the sample's three members; return its row of offsets.

    `num_bytes` is the size of the file that the image lies in, `meta` the sample's JSON, and `read`
    returns the bytes of an image.
    """
    if record.fault:
        raise BadSampleError(record.fault)
    check_captions(record.captions)
    check_optional(record.extra, len(record.captions))
    if options.recode is None:
        image_offset, image_bytes, identity = _add_as_it_is(
            tar, record, num_bytes, read, decode=options.decode
        )
    else:
        from dist_vse.shards.build.recode import (
            recode_image,  # imported here: many runs change no image
        )

        image, extension = recode_image(read(record.image), options.recode)
        image_offset = tar.add(f"{record.key}.{extension}", image)
        image_bytes, identity = len(image), image_id(image)
    meta_offset = tar.add(f"{record.key}.json", meta)
    tar.add(f"{record.key}.txt", record.captions[0].encode())
    return image_offset, image_bytes, meta_offset, len(meta), identity


def _add_as_it_is(
    tar: TarWriter, record: Record, num_bytes: int, read: Read, *, decode: bool
) -> tuple[int, int, int]:
    """Append the image untouched; return its offset, size and id.

    Most images are read directly into the tar's buffer.
    """
    in_place = num_bytes > 0 and not isinstance(record.image, Member)
    view = tar.reserve(num_bytes + 1) if in_place else None
    if view is None or not _read_into(view, record.image):
        data = read(record.image)
        extension = check_image(data, decode=decode)
        return tar.add(f"{record.key}.{extension}", data), len(data), image_id(data)
    image = view[:num_bytes]
    extension = check_image(image, decode=decode)
    offset = tar.add_filled(f"{record.key}.{extension}", num_bytes)
    return offset, num_bytes, image_id(image)


def _read_into(view: memoryview, image: Image) -> bool:
    """Fill all of the view but its last byte with a local file that is just as long.

    Returns False, to try another way, for any other file, or one that cannot be read.
    """
    try:
        file = os.open(local_path(image), os.O_RDONLY | os.O_CLOEXEC)
    except (OSError, ValueError):
        return False
    try:
        return os.readv(file, [view]) == len(view) - 1
    except OSError:
        return False
    finally:
        os.close(file)
