"""Make one shard: read, check and write its samples; or see that it is there already."""

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

import numpy as np

from dist_vse.errors import UserError
from dist_vse.index import OFFSET_COLUMNS, image_id, offsets_name
from shards.check import BadSampleError, check_captions, check_image
from shards.plan import Options, Task, fingerprint
from shards.receipts import Receipt, Skipped
from shards.recode import recode_image
from shards.record import Member, Record
from shards.tar import TarWriter

_READ_BYTES = 1 << 20


def write_shard(task: Task, folder: Path) -> Receipt:
    """Write the task's tar and its offsets into `folder`, each by one rename.

    Bad samples are left out and listed in the receipt. Raises UserError for an image that is
    there but cannot be read.
    """
    plan = fingerprint(task)  # before the reading: a file that changes now is noticed next time
    rows: list[tuple[int, ...]] = []
    skipped: list[Skipped] = []
    num_captions = 0
    temporary = folder / (task.name + ".tmp")
    with temporary.open("wb", buffering=0) as file:
        tar = TarWriter(file)
        for record in task.records:
            try:
                rows.append(_add_sample(tar, record, task.options))
                num_captions += len(record.captions)
            except BadSampleError as error:
                skipped.append(Skipped(record.key, str(record.image), str(error)))
        sha256 = tar.close()
    offsets = folder / offsets_name(task.name)
    table = np.array(rows, dtype=np.int64).reshape(-1, len(OFFSET_COLUMNS))
    replace_file(offsets, lambda file: np.save(file, table, allow_pickle=False))
    os.replace(temporary, folder / task.name)
    return Receipt(
        name=task.name,
        split=task.split,
        fingerprint=plan,
        num_samples=len(rows),
        num_captions=num_captions,
        num_bytes=tar.num_bytes,
        sha256=sha256,
        offsets_sha256=digest_of(offsets),
        skipped=skipped,
    )


def is_whole(task: Task, folder: Path, receipt: Receipt) -> bool:
    """Tell whether the shard lies in `folder`, to the byte as the task would have it."""
    tar, offsets = folder / task.name, folder / offsets_name(task.name)
    return (
        tar.is_file()
        and offsets.is_file()
        and tar.stat().st_size == receipt.num_bytes
        and fingerprint(task) == receipt.fingerprint
        and digest_of(offsets) == receipt.offsets_sha256
        and digest_of(tar) == receipt.sha256
    )


def _add_sample(tar: TarWriter, record: Record, options: Options) -> tuple[int, ...]:
    """Append the sample's three members; return its row of offsets (`OFFSET_COLUMNS`)."""
    if record.fault:
        raise BadSampleError(record.fault)
    check_captions(record.captions)
    image = _read_image(record.image)
    if options.recode is not None:
        image, extension = recode_image(image, options.recode)
    else:
        extension = check_image(image, decode=options.decode)
    content = {"key": record.key, "captions": record.captions, "split": record.split}
    if record.languages:
        content["languages"] = record.languages
    meta = json.dumps(content | record.extra).encode()  # ASCII, whatever the extra fields hold
    image_offset = tar.add(f"{record.key}.{extension}", image)
    meta_offset = tar.add(f"{record.key}.json", meta)
    tar.add(f"{record.key}.txt", record.captions[0].encode())
    return image_offset, len(image), meta_offset, len(meta), image_id(image)


def _read_image(image: Path | Member) -> bytes:
    try:
        return _read_bytes(image)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise BadSampleError("no such image file (is --images right?)") from error
    except (IsADirectoryError, ValueError) as error:
        raise BadSampleError(f"the path is no image file ({error})") from error
    except OSError as error:  # the disk's or the permissions' fault, not the sample's
        raise UserError(
            f"{image}: cannot be read ({error.strerror or error}); mend that and run the command "
            "again"
        ) from error


def _read_bytes(image: Path | Member) -> bytes:
    if isinstance(image, Member):
        with open(image.path, "rb", buffering=0) as file:
            data = os.pread(file.fileno(), image.num_bytes, image.offset)
        if len(data) != image.num_bytes:
            raise UserError(f"{image.path}: is cut; copy it again and run the command again")
        return data
    if not isinstance(image, Path):  # remote: fsspec's
        return bytes(image.read_bytes())
    with open(image, "rb", buffering=0) as file:
        return file.read()


def replace_file(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Let `write` fill a file that appears at `path` by one rename."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("wb") as file:
        write(file)
    os.replace(temporary, path)


def digest_of(path: Path) -> str:
    """Return the sha256 of a file, hex."""
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while block := file.read(_READ_BYTES):
            digest.update(block)
    return digest.hexdigest()
