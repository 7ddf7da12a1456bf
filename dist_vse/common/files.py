"""Files that are written whole or not at all, and their checksums."""

import contextlib
import errno
import hashlib
import json
import os
import secrets
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePath

from dist_vse.common.errors import writing
from dist_vse.common.local_path import require_local

READ_BYTES = 1 << 20
LFS_POINTER = b"version https://git-lfs.github.com/spec/v1"
"""What a file that Git LFS keeps elsewhere begins with until `git lfs pull` brings it."""
_LEFTOVERS = frozenset(("__MACOSX", "Thumbs.db", "desktop.ini", "$RECYCLE.BIN"))


@contextlib.contextmanager
def atomic_write(path: Path, *, shared: bool = False, fsync: bool = False) -> Iterator[Path]:
    """Yield a temporary path; after the block, rename that file to `path`.

    With `shared`, other processes may write the same file at the same time: the temporary name is
    unique. With `fsync`, the content is on the disk before the rename. Without, a power cut may
    leave an empty file. If the block fails, the temporary file is removed. A link that somebody
    planted under the temporary name, in a folder that several write to, is not followed. Raises
    OSError.
    """
    suffix = f".{secrets.token_hex(8)}.tmp" if shared else ".tmp"
    temporary = path.with_name(path.name + suffix)
    with contextlib.suppress(FileNotFoundError):
        temporary.unlink()  # also what a killed process left
    os.close(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666))
    try:
        yield temporary
        if fsync:
            fsync_path(temporary)
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise


def write_text(path: Path, text: str, *, shared: bool = False, fsync: bool = False) -> None:
    """Write a UTF-8 text file by `atomic_write`."""
    with atomic_write(path, shared=shared, fsync=fsync) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(
    path: Path,
    content: object,
    *,
    indent: int | None = None,
    sort_keys: bool = False,
    shared: bool = False,
    fsync: bool = False,
) -> None:
    """Write a JSON file by `atomic_write`, ASCII only."""
    text = json.dumps(content, indent=indent, sort_keys=sort_keys) + "\n"
    write_text(path, text, shared=shared, fsync=fsync)


def write_json_lines(path: Path, records: Iterable[object]) -> None:
    """Write one line of JSON a record by `atomic_write`, ASCII only."""
    write_text(path, "".join(json.dumps(record) + "\n" for record in records))


def check_output(path: Path) -> None:
    """Raise UserError unless a file can be written there, on this machine. Makes its folder."""
    require_local(path)
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, "it is a folder")
        if not _is_stream(path):
            with tempfile.TemporaryFile(dir=path.parent):
                pass


@contextlib.contextmanager
def atomic_output(path: Path) -> Iterator[Path]:
    """Do as `atomic_write` for a file that the user asked for, and make its folder.

    A device or pipe, such as /dev/stdout, gets the content at the end; a rename would replace it.
    Raises UserError if the system refuses.
    """
    with writing(path):
        if _is_stream(path):
            with tempfile.TemporaryDirectory() as folder:
                temporary = Path(folder) / "content"
                yield temporary
                with path.open("ab") as stream:  # what a redirection holds already stays
                    stream.write(temporary.read_bytes())
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as temporary:
            yield temporary


def output_json(path: Path, content: object, *, more_follows: bool = False) -> None:
    """Write a JSON file that the user asked for, by `atomic_output`.

    With `more_follows` it will be written again with more in it: a pipe gets the last one alone.
    """
    if more_follows and _is_stream(path):
        return
    with atomic_output(path) as temporary:
        temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def _is_stream(path: Path) -> bool:
    """Whether the user names a device or a pipe.

    A link counts if it is the system's, as /dev/stdout is: others may come with a stranger's
    folder.
    """
    if path.is_symlink():
        return path.absolute().parts[1] in ("dev", "proc")
    return path.exists() and not (path.is_file() or path.is_dir())


def is_leftover(path: str | PurePath) -> bool:
    """Return whether a path from a data set's folder, or in a tar, was left by the system.

    Hidden files and folders (`.DS_Store`, `._x`, `.ipynb_checkpoints`) are never data.
    """
    parts = PurePath(path).parts
    return any(part in _LEFTOVERS or (part[:1] == "." and part != "..") for part in parts)


def sha256_of_file(path: Path) -> str:
    """Return the SHA-256 of a file's content, hex."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(READ_BYTES):
            digest.update(block)
    return digest.hexdigest()


def fsync_path(path: Path) -> None:
    """Wait until a file's content, or a folder's names, are on the disk. Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
