"""Files that a command writes for people: tried before the work, then whole or not at all."""

import contextlib
import errno
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from dist_vse.errors import UserError, first_line


def check_output(path: Path) -> None:
    """Raise UserError unless a file can be written there; its folder is made."""
    with _refusals(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, "it is a folder")
        with tempfile.TemporaryFile(dir=path.parent):
            pass


@contextlib.contextmanager
def replaced(path: Path) -> Iterator[Path]:
    """Yield a path to write to; at the end of the block that file takes the name by one rename.

    Its folder is made. Raises UserError if the system refuses, and leaves no part behind.
    """
    temporary = path.with_name(f"{path.name}.tmp")
    with _refusals(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield temporary
            os.replace(temporary, path)
        except BaseException:
            with contextlib.suppress(OSError):
                temporary.unlink()
            raise


@contextlib.contextmanager
def _refusals(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        remedy = "make room, or name another place"
        raise UserError(f"{path}: can't be written ({first_line(error)}); {remedy}") from error
