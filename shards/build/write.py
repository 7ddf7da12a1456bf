"""Write one shard: read, check and pack its samples; or check that it exists already."""

import errno
import os
import stat
from pathlib import Path
from typing import cast

from dist_vse.common.errors import UserError, first_line
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
from dist_vse.shards.build.tar_writer import TarWriter
from dist_vse.shards.manifest import ShardEntry, Skipped
from dist_vse.shards.record import Image, Member, Record, local_path
from dist_vse.shards.sample_checks import BadSampleError, check_captions, check_image
from dist_vse.shards.sources.paths import other_spelling

_READ_BYTES = 1 << 20
Row = tuple[int, int, int, int, int]
"""A sample's position and its image's id: `dist_vse.data.index.OFFSET_COLUMNS`."""


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
    with atomic_write(folder / task.name) as temporary:
        with temporary.open("wb", buffering=0) as file, TarWriter(file) as tar:
            for record in task.records:
                state, meta = image_state(record.image), sample_json(record)
                plan.add(record, state, meta)  # before the reading: a change shows next time
                try:
                    rows.append(_add_sample(tar, record, state[0], meta, task.options))
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
    return (
        tar.is_file()
        and offsets.is_file()
        and tar.stat().st_size == entry.num_bytes
        and fingerprint(task) == entry.fingerprint
        and sha256_of_file(offsets) == entry.offsets_sha256
        and sha256_of_file(tar) == entry.sha256
    )


def _add_sample(
    tar: TarWriter, record: Record, num_bytes: int, meta: bytes, options: Options
) -> Row:
    """Append the sample's three members; return its row of offsets.

    `num_bytes` is the size of the file that the image lies in, `meta` the sample's JSON.
    """
    if record.fault:
        raise BadSampleError(record.fault)
    check_captions(record.captions)
    if options.recode is None:
        image_offset, image_bytes, identity = _add_as_it_is(tar, record, num_bytes, options.decode)
    else:
        from dist_vse.shards.build.recode import (
            recode_image,  # imported here: many runs change no image
        )

        image, extension = recode_image(_read_image(record.image), options.recode)
        image_offset = tar.add(f"{record.key}.{extension}", image)
        image_bytes, identity = len(image), image_id(image)
    meta_offset = tar.add(f"{record.key}.json", meta)
    tar.add(f"{record.key}.txt", record.captions[0].encode())
    return image_offset, image_bytes, meta_offset, len(meta), identity


def _add_as_it_is(
    tar: TarWriter, record: Record, num_bytes: int, decode: bool
) -> tuple[int, int, int]:
    """Append the image untouched; return its offset, size and id.

    Most images are read directly into the tar's buffer.
    """
    in_place = num_bytes > 0 and not isinstance(record.image, Member)
    view = tar.reserve(num_bytes + 1) if in_place else None
    if view is None or not _read_into(view, record.image):
        data = _read_image(record.image)
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


def _read_image(image: Image) -> bytes:
    try:
        return _read_bytes(image)
    except (FileNotFoundError, NotADirectoryError) as error:
        hint = other_spelling(local_path(image)) or "is --images right?"
        raise BadSampleError(f"no such image file ({hint})") from error
    except (IsADirectoryError, ValueError) as error:
        raise BadSampleError(f"the path is no image file ({first_line(error)})") from error
    except OSError as error:  # the disk's or the permissions' fault, not the sample's
        if error.errno in (errno.ENAMETOOLONG, errno.ELOOP):
            raise BadSampleError(f"the path is no image file ({error.strerror})") from error
        raise UserError(
            f"{image}: cannot be read ({error.strerror or error}); fix that and run the command "
            "again"
        ) from error


def _read_bytes(image: Image) -> bytes:
    if isinstance(image, Member):
        with open(image.path, "rb", buffering=0) as file:
            data = os.pread(file.fileno(), image.num_bytes, image.offset)
        if len(data) != image.num_bytes:
            raise UserError(f"{image.path}: is cut; copy it again and run the command again")
        return data
    path = local_path(image)
    if not path and str(image).startswith(("http://", "https://")):
        return _read_http(str(image))
    if not path:
        return bytes(cast(Path, image).read_bytes())  # fsspec's
    if not stat.S_ISREG(os.stat(path).st_mode):  # to open a pipe could wait for ever
        raise ValueError("no regular file")
    with open(path, "rb", buffering=0) as file:
        return file.read()


def _read_http(url: str) -> bytes:
    from dist_vse.data.download import PermanentError, read_url  # here: few images are far away

    try:
        return read_url(url)
    except PermanentError as error:
        raise BadSampleError(f"no such image file ({first_line(error)})") from error
