"""The files and folders that a user names: checked, and read whatever they are packed in."""

import gzip
import os
import re
import unicodedata
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PosixPath
from typing import IO, cast
from urllib.parse import urlsplit

from dist_vse.common.errors import UserError, first_line
from dist_vse.common.files import LFS_POINTER, is_leftover

_GZIP = b"\x1f\x8b"
_PACKED = {  # by the first bytes
    b"\x28\xb5\x2f\xfd": "zstd",
    b"BZh": "bzip2",
    b"\xfd7zXZ\x00": "xz",
    b"PK\x03\x04": "zip",
}
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
_FOLDERS_SHOWN = 3

SPLITS = {"train": "train", "training": "train"}
SPLITS |= {"val": "val", "valid": "val", "validation": "val", "dev": "val"}
SPLITS |= {"test": "test", "testing": "test", "eval": "test", "evaluation": "test"}
"""What folders and files of a split are called, as Hugging Face's imagefolder reads them."""


def existing_file(path: Path) -> Path:
    """Return `path`, or raise UserError if no file is there."""
    if not path.is_file():
        fault = "no such file; check the path"
        if path.is_dir():
            fault = "is a folder; give the file"
        elif path.exists():
            fault = "is no regular file; give one"
        raise UserError(f"{path}: {fault}")
    return path


def existing(path: Path) -> Path:
    """Return `path`, or raise UserError if neither a file nor a folder is there."""
    if not path.exists():
        raise UserError(f"{path}: no such file or folder; check the path")
    return path


def existing_folder(path: Path) -> Path:
    """Return `path`, or raise UserError if no folder is there."""
    if not path.is_dir():
        fault = "is a file; give its folder" if path.exists() else "no such folder; check the path"
        raise UserError(f"{path}: {fault}")
    return path


@contextmanager
def open_list(path: Path) -> Iterator[IO[bytes]]:
    """Open a file of captions or paths; what gzip compressed is read as it was before.

    Raises UserError if there is none, for other compressions, and for a damaged one.
    """
    with existing_file(path).open("rb") as file:
        start = file.read(len(LFS_POINTER))
        file.seek(0)
        if start == LFS_POINTER:
            raise UserError(f"{path}: is a pointer of Git LFS, not the file; run `git lfs pull`")
        for magic, name in _PACKED.items():
            if start.startswith(magic):
                raise UserError(f"{path}: is compressed ({name}); unpack it")
        if not start.startswith(_GZIP):
            yield file
            return
        try:
            with gzip.open(file) as content:
                yield cast(IO[bytes], content)
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise UserError(f"{path}: is damaged ({first_line(error)}); copy it again") from error


def read_text(path: Path) -> str:
    """Read a UTF-8 file (a byte-order mark is dropped), or raise UserError if it is not UTF-8."""
    with open_list(path) as file:
        data = file.read()
    try:
        return data.decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path}: byte {error.start} is no UTF-8; save the file as UTF-8"
        ) from error


def read_lines(path: Path) -> list[str]:
    """Read a UTF-8 file, as `read_text`, and part it at its line ends.

    `str.splitlines` would also cut at U+2028, U+0085 and the like, which captions may hold.
    """
    return read_text(path).split("\n")


def image_in(root: Path, name: str) -> str | Path:
    """Return the path of the image `name`, which starts from `root` unless it is absolute."""
    return os.path.join(root, name) if isinstance(root, PosixPath) else root / name


def image_fault(name: object) -> str:
    """Return why a value of a list can't be the path of an image; "" if it can."""
    if not isinstance(name, str):
        return f"its image is a {type(name).__name__}, no path"
    url = _URL.match(name)
    if url is None:
        return ""
    if url[0].lower() in ("http://", "https://"):
        return "its image is a URL; download it with `dist-vse shard urls`"
    if url[0].lower() == "file://":
        return "its image is a URL (file://); write the path alone"
    return f"its image is a URL ({url[0]}); copy the images here, or give their folder as --images"


def url_fault(url: str) -> str:
    """Return why a value of a list can't be fetched over HTTP; "" if it can."""
    try:
        parts = urlsplit(url)
        fits = parts.scheme in ("http", "https") and bool(parts.hostname)
    except ValueError:  # a port that is no number, say
        fits = False
    return "" if fits else "its URL is none of http or https"


def other_spelling(path: str) -> str:
    """Return a hint where a path that is missing is there in another spelling; else ""."""
    if "\\" in path and os.path.exists(path.replace("\\", "/")):
        return "it is there with / for \\: replace the backslashes of Windows in the list"
    for form in ("NFC", "NFD"):
        if os.path.exists(unicodedata.normalize(form, path)):
            return f"it is there in another Unicode spelling ({form}): normalize the list's names"
    return ""


def where_instead(folder: Path, suffix: str) -> str:
    """Return a hint which of a folder's sub-folders hold files of this suffix."""
    found = sorted(
        {
            str(path.parent.relative_to(folder))
            for path in folder.rglob(f"*{suffix}")
            if not is_leftover(path.relative_to(folder)) and path.parent != folder
        }
    )
    if not found:
        return "check the path"
    more = f" and {len(found) - _FOLDERS_SHOWN} more" if len(found) > _FOLDERS_SHOWN else ""
    return f"but there are in {', '.join(found[:_FOLDERS_SHOWN])}{more}; give such a folder"
