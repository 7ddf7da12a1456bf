"""Read tars in WebDataset's layout: which members make a sample, and what its captions are.

A sample's members share a key: the path up to the first dot of its file name
(https://github.com/webdataset/webdataset). They need not follow one another. An extension that
comes again begins another sample, where WebDataset gives up. Where a key would join several images
with their captions (`img.0001.jpg`, `img.0002.jpg`), the last dot ends the key. img2dataset writes
`000000001.jpg`, `.txt` and `.json` with the caption in both; dist_vse's own shards name all
`captions` in the JSON.
"""

import os
import re
import tarfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from dist_vse.common.errors import UserError, first_line
from dist_vse.common.files import LFS_POINTER, READ_BYTES, is_leftover
from dist_vse.data.image_names import IMAGES, READ
from dist_vse.shards.captions import (
    Captions,
    first_captions,
    fit_fields,
    named_languages,
    read_captions,
)
from dist_vse.shards.json_text import load_json
from dist_vse.shards.notes import note

_NAMES_SHOWN = 8  # of members or fields, in a message
_COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst", ".tar.lz4")
_UNREAD = (".zip", ".rar", ".7z")  # archives that are no tars
_NOTE = re.compile(r"__[^/]*__($|/)")  # WebDataset's own notes, which are no samples


@dataclass(frozen=True)
class Sample:
    """One sample of a tar: where its image lies, its captions and other fields."""

    key: str
    image: tuple[int, int] | None  # offset in the tar, bytes; None without an image
    captions: tuple[str, ...] = ()
    languages: tuple[str, ...] = ()  # of the captions, if they are named
    fields: dict[str, Any] = field(default_factory=dict)  # of its JSON, without these
    fault: str = ""  # why it cannot be used, if so


@dataclass
class _Group:
    """The members of one sample."""

    key: str
    parts: dict[str, tuple[int, int]] = field(default_factory=dict)  # by extension
    names: list[str] = field(default_factory=list)
    fault: str = ""


def is_compressed(name: str) -> bool:
    """Return whether the name is that of a compressed tar."""
    return name.lower().endswith(_COMPRESSED)


def plain_tars(folder: Path, *, compressed: bool = False) -> list[Path]:
    """Return the tars in a folder, sorted by name; `compressed` ones if that is wanted.

    Else raises UserError, naming it, if there is a compressed one: it has no offsets. A note names
    other archives, and sub-folders that hold tars, unless there are only such.
    """
    files = [path for path in sorted(folder.iterdir()) if not is_leftover(path.name)]
    tars = [
        path for path in files if path.name.lower().endswith(".tar") or is_compressed(path.name)
    ]
    for path in files:
        if is_compressed(path.name) and not compressed:
            raise UserError(
                f"{path}: is compressed; unpack it, or `dist-vse shard reshard` the folder"
            )
        holds_tars = path.is_dir() and any(path.glob("*.tar"))
        if tars and (holds_tars or path.name.lower().endswith(_UNREAD)):
            what = "its tars are" if holds_tars else "is"
            note(f"{path}: {what} not read; give a folder of tars alone, or name each of them")
    return tars


def read_samples(path: Path, name: str = "", *, caption_key: str | None = None) -> Iterator[Sample]:
    """Yield the samples of a local tar, in the order of their first members; no image is read.

    Tars joined by `cat` are read one after the other. `name` is what an error calls the tar: a URL,
    say, that `path` is a copy of. `caption_key` names the JSON's field or the member's extension
    that holds the captions; without it they are the JSON's `captions` or `caption`, else the text.

    Raises UserError if the file is no plain tar: a compressed one has no offsets.
    """
    try:
        with path.open("rb") as file:
            for group in _groups(file):
                for sample in _parted(group):
                    yield _sample(file.fileno(), sample, caption_key)
    except (tarfile.ReadError, EOFError) as error:
        with path.open("rb") as file:
            if file.read(len(LFS_POINTER)) == LFS_POINTER:
                raise UserError(
                    f"{name or path}: is a pointer of Git LFS, no tar; run `git lfs pull`"
                ) from error
        raise UserError(
            f"{name or path}: no plain tar, or cut ({first_line(error)}); unpack a compressed one, "
            "or copy it again"
        ) from error


def _groups(file: BinaryIO) -> Iterator[_Group]:
    """Yield the members that share a key, together, whether they follow one another or not."""
    groups: list[_Group] = []
    newest: dict[str, _Group] = {}
    for member, place, fault in _members(file):
        key, extension = _split_name(member)
        group = newest.get(key)
        if group is None or extension in group.parts:
            group = newest[key] = _Group(key)
            groups.append(group)
        group.parts[extension] = place
        group.names.append(member)
        group.fault = group.fault or fault
    yield from groups


def _parted(group: _Group) -> Iterator[_Group]:
    """Yield the samples of a group: several where its names have dots before the extension.

    `a.jpg`, `a.seg.png` and `a.txt` are one sample, as are `a.left.jpg`, `a.right.jpg` and `a.txt`.
    `a.1.jpg`, `a.1.txt`, `a.2.jpg` and `a.2.txt` are two, which the last dot parts.
    """
    stems: dict[str, set[bool]] = {}  # to whether its members are images
    for extension in group.parts:
        stem, _, last = extension.rpartition(".")
        if last in IMAGES or last in ("txt", "json"):
            stems.setdefault(stem, set()).add(last in IMAGES)
    if "" in stems or (len(stems) < 2 and {True, False} not in stems.values()):
        yield group
        return
    parts: dict[str, _Group] = {}
    for (extension, place), name in zip(group.parts.items(), group.names, strict=True):
        stem, _, last = extension.rpartition(".")
        key = f"{group.key}.{stem}" if stem else group.key
        part = parts.setdefault(stem, _Group(key, fault=group.fault))
        part.parts[last] = place
        part.names.append(name)
    yield from parts.values()


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


def _sample(file: int, group: _Group, caption_key: str | None) -> Sample:
    # Names in another encoding than UTF-8 come with surrogates, which no other file may hold.
    key = group.key.encode("utf-8", "backslashreplace").decode()
    parts = group.parts
    image = _image(parts)
    if group.fault:
        return Sample(key, image, fault=group.fault)
    if image is None:
        return Sample(key, None, fault=f"no image ({_listed(group.names)})")
    try:
        content = _read(file, parts, "json")
        fields = load_json(content) if content else {}
        if not isinstance(fields, dict):  # a bare label, say
            fields = {}
        captions = _captions(file, parts, fields, caption_key)
    except ValueError as error:  # no UTF-8, or no JSON
        return Sample(key, image, fault=f"its text or JSON is broken ({error})")
    fault = captions.fault
    if not captions.texts and not fault:
        there = f"members: {_listed(group.names)}"
        there += f"; fields of the JSON: {_listed(fields)}" if fields else ""
        fault = f"no caption ({there}); --caption-key chooses one"
    fit_fields(fields, captions)
    languages = captions.languages or named_languages(fields.get("languages"), captions.texts)
    if languages:
        fields.pop("languages", None)
    return Sample(key, image, captions.texts, languages, fields, fault)


def _captions(
    file: int, parts: dict[str, tuple[int, int]], fields: dict[str, Any], caption_key: str | None
) -> Captions:
    """Return a sample's captions, and take them out of its fields."""
    if caption_key is None:
        values = [fields.pop(name, None) for name in ("captions", "caption")]
        return first_captions([*values, _read(file, parts, "txt").decode()])
    if caption_key in fields:
        return read_captions(fields.pop(caption_key))
    return read_captions(_read(file, parts, caption_key.lower()).decode())


def _listed(names: Iterable[str]) -> str:
    names = list(names)
    more = f", ... {len(names) - _NAMES_SHOWN} more" if len(names) > _NAMES_SHOWN else ""
    return ", ".join(names[:_NAMES_SHOWN]) + more


def _image(parts: dict[str, tuple[int, int]]) -> tuple[int, int] | None:
    """Return where the image lies: `jpg` goes before `seg.png`, and both before `svg`."""
    images = [e for e in parts if e.rpartition(".")[2] in IMAGES]
    if not images:
        return None
    return parts[min(images, key=lambda e: (e.rpartition(".")[2] not in READ, "." in e))]


def _read(file: int, parts: dict[str, tuple[int, int]], extension: str) -> bytes:
    if extension not in parts:
        return b""
    offset, num_bytes = parts[extension]
    return os.pread(file, num_bytes, offset)
