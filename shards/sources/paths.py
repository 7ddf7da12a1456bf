"""Checks of the paths that a user gives."""

import os
from pathlib import Path, PosixPath

from dist_vse.common.errors import UserError


def existing_file(path: Path) -> Path:
    """Return `path`, or raise UserError if no file is there."""
    if not path.is_file():
        fault = "is a folder; give the file" if path.is_dir() else "no such file; check the path"
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


def read_text(path: Path) -> str:
    """Read a UTF-8 file (a byte-order mark is dropped), or raise UserError if it is not UTF-8."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path}: byte {error.start} is no UTF-8; save the file as UTF-8"
        ) from error


def read_lines(path: Path) -> list[str]:
    """Read a UTF-8 file, as `read_text`, and part it at its line ends.

    `str.splitlines` would also cut at U+2028, U+0085 and the like, which captions may hold.
    """
    return [line.removesuffix("\r") for line in read_text(path).split("\n")]


def image_in(root: Path, name: str) -> str | Path:
    """Return the path of the image `name`, which starts from `root` unless it is absolute."""
    return os.path.join(root, name) if isinstance(root, PosixPath) else root / name
