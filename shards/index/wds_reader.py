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
from typing import Any, BinaryIO

from dist_vse.common.errors import UserError, first_line
from dist_vse.common.files import READ_BYTES, is_leftover

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff")
_COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst")
_NOTE = re.compile(r"__[^/]*__($|/)")  # WebDataset's own notes, which are no samples


@dataclass(frozen=True)
class Sample:
    """One sample of a tar: where its image lies, its captions and other fields."""

    key: str
    image: tuple[int, int] | None  # offset in the tar, bytes; None without an image
    captions: tuple[str, ...] = ()
    fields: dict[str, Any] = field(default_factory=dict)  # of its JSON, without the captions
    fault: str = ""  # why it cannot be used, if so


@dataclass
class _Group:
    """The members of one sample."""

    key: str
    parts: dict[str, tuple[int, int]] = field(default_factory=dict)  # by extension
    names: list[str] = field(default_factory=list)
    fault: str = ""


def plain_tars(folder: Path) -> list[Path]:
    """Return the tars in a folder, sorted by name.

    Raises UserError, naming it, if there is a compressed one: it has no offsets.
    """
    files = [path for path in sorted(folder.iterdir()) if not is_leftover(path.name)]
    for path in files:
        if path.name.endswith(_COMPRESSED):
            raise UserError(f"{path}: is compressed; unpack it, or move it to another folder")
    return [path for path in files if path.name.endswith(".tar")]


def read_samples(path: Path, name: str = "") -> Iterator[Sample]:
    """Yield the samples of a local tar, in its order; an image is not read.

    Tars joined by `cat` are read one after the other. `name` is what an error calls the tar: a URL,
    say, that `path` is a copy of.

    Raises UserError if the file is no plain tar: a compressed one has no offsets.
    """
    group: _Group | None = None
    try:
        with path.open("rb") as file:
            for member, place, fault in _members(file):
                key, extension = _split_name(member)
                if group is not None and (key != group.key or extension in group.parts):
                    yield _sample(file.fileno(), group)
                    group = None
                group = group or _Group(key)
                group.parts[extension] = place
                group.names.append(member)
                group.fault = group.fault or fault
            if group is not None:
                yield _sample(file.fileno(), group)
    except (tarfile.ReadError, EOFError) as error:
        raise UserError(
            f"{name or path}: no plain tar, or cut ({first_line(error)}); unpack a compressed one, "
            "or copy it again"
        ) from error


def _members(file: BinaryIO) -> Iterator[tuple[str, tuple[int, int], str]]:
    """Yield name, offset and size of every file in the tar; with a fault if it can't be used."""
    places: dict[str, tuple[int, int]] = {}
    start: int | None = 0
    while start is not None:
        file.seek(start)
        with tarfile.open(fileobj=file, mode="r:") as tar:
            for member in tar:
                if member.isdir() or is_leftover(member.name) or _NOTE.match(member.name):
                    continue
                place, fault = (member.offset_data, member.size), ""
                if member.islnk():
                    place = places.get(member.linkname, (0, 0))
                    if member.linkname not in places:
                        fault = f"is a hard link to {member.linkname!r}, which is not before it"
                elif member.issym():
                    fault = "is a symbolic link; make the tar with --dereference"
                elif member.issparse():
                    fault = "is a sparse file; make the tar without --sparse"
                elif not member.isfile():
                    fault = "is no regular file"
                if not fault:
                    places[member.name] = place
                yield member.name, place, fault and f"{member.name!r} {fault}"
            end = tar.offset
        # tarfile takes a broken or cut header for the end: the samples behind would be lost.
        if os.pread(file.fileno(), tarfile.BLOCKSIZE, end) != bytes(tarfile.BLOCKSIZE):
            raise tarfile.ReadError(f"no end of the archive at byte {end}")
        start = _next_archive(file, end)


def _next_archive(file: BinaryIO, end: int) -> int | None:
    """Return the first block behind `end` that is not zero; None if there is none."""
    file.seek(end)
    while data := file.read(READ_BYTES):
        rest = data.lstrip(b"\0")
        if rest:
            at = end + len(data) - len(rest)
            return at - at % tarfile.BLOCKSIZE
        end += len(data)
    return None


def _split_name(name: str) -> tuple[str, str]:
    folder, _, base = name.rpartition("/")
    stem, _, extension = base.partition(".")
    return (f"{folder}/{stem}" if folder else stem), extension.lower()


def _sample(file: int, group: _Group) -> Sample:
    key, parts = group.key, group.parts
    image = _image(parts)
    if group.fault:
        return Sample(key, image, fault=group.fault)
    try:
        text, content = (_read(file, parts, e).decode() for e in ("txt", "json"))
        fields = json.loads(content) if content else {}
    except ValueError as error:  # no UTF-8, or no JSON
        return Sample(key, image, fault=f"its text or JSON is broken ({error})")
    if image is None:
        return Sample(key, None, fault=f"no image ({', '.join(group.names)})")
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
