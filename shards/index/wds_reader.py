"""Read tars in WebDataset's layout: which members make a sample, and what its captions are.

A sample's members follow one another and share a key: the path up to the first dot of its file
name (https://github.com/webdataset/webdataset). An extension that comes again begins another
sample, where WebDataset gives up. img2dataset writes `000000001.jpg`, `.txt` and `.json` with the
caption in both; dist_vse's own shards name all `captions` in the JSON.
"""

import json
import os
import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dist_vse.common.errors import UserError, first_line

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff")
_NOTE = re.compile(r"__[^/]*__($|/)")  # WebDataset's own notes, which are no samples


@dataclass(frozen=True)
class Sample:
    """One sample of a tar: where its image lies, its captions and other fields."""

    key: str
    image: tuple[int, int] | None  # offset in the tar, bytes; None without an image
    captions: tuple[str, ...] = ()
    fields: dict[str, Any] = field(default_factory=dict)  # of its JSON, without the captions
    fault: str = ""  # why it cannot be used, if so


def read_samples(path: Path, name: str = "") -> Iterator[Sample]:
    """Yield the samples of a local tar, in its order; an image is not read.

    `name` is what an error calls the tar: a URL, say, that `path` is a copy of.

    Raises UserError if the file is no plain tar: a compressed one has no offsets.
    """
    key, parts = "", dict[str, tuple[int, int]]()
    try:
        with path.open("rb") as file, tarfile.open(fileobj=file, mode="r:") as tar:
            for member in tar:
                if not member.isfile() or _NOTE.match(member.name):
                    continue
                stem, extension = _split_name(member.name)
                if parts and (stem != key or extension in parts):
                    yield _sample(file.fileno(), key, parts)
                    parts = {}
                key, parts[extension] = stem, (member.offset_data, member.size)
            if parts:
                yield _sample(file.fileno(), key, parts)
            # tarfile takes a broken or cut header for the end: the samples behind would be lost.
            if os.pread(file.fileno(), tarfile.BLOCKSIZE, tar.offset) != bytes(tarfile.BLOCKSIZE):
                raise tarfile.ReadError(f"no end of the archive at byte {tar.offset}")
    except (tarfile.ReadError, EOFError) as error:
        raise UserError(
            f"{name or path}: no plain tar, or cut ({first_line(error)}); unpack a compressed one, "
            "or copy it again"
        ) from error


def _split_name(name: str) -> tuple[str, str]:
    folder, _, base = name.rpartition("/")
    stem, _, extension = base.partition(".")
    return (f"{folder}/{stem}" if folder else stem), extension.lower()


def _sample(file: int, key: str, parts: dict[str, tuple[int, int]]) -> Sample:
    image = _image(parts)
    try:
        text, content = (_read(file, parts, e).decode() for e in ("txt", "json"))
        fields = json.loads(content) if content else {}
    except ValueError as error:  # no UTF-8, or no JSON
        return Sample(key, image, fault=f"its text or JSON is broken ({error})")
    if image is None:
        return Sample(key, None, fault="no image")
    if not isinstance(fields, dict):  # a bare label, say
        fields = {}
    caption, captions = fields.pop("caption", None), fields.pop("captions", None)
    if isinstance(captions, list) and all(isinstance(c, str) for c in captions):
        return Sample(key, image, tuple(captions), fields)
    if not isinstance(caption, str):  # img2dataset writes null where there was none
        caption = text
    return Sample(key, image, (caption.strip(),) if caption.strip() else (), fields)


def _image(parts: dict[str, tuple[int, int]]) -> tuple[int, int] | None:
    """Return where the image lies: `jpg` goes before `seg.png`, whichever comes first."""
    images = [e for e in parts if e.rpartition(".")[2] in IMAGE_EXTENSIONS]
    return parts[min(images, key=lambda e: "." in e)] if images else None


def _read(file: int, parts: dict[str, tuple[int, int]], extension: str) -> bytes:
    if extension not in parts:
        return b""
    offset, num_bytes = parts[extension]
    return os.pread(file, num_bytes, offset)
