"""Paths that may be URLs: of fsspec, or webdataset's `pipe:COMMAND`."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO, cast

from braceexpand import braceexpand

from dist_vse.common.errors import UserError, first_line
from dist_vse.data.index import is_remote


def to_path(text: str) -> Path:
    """Return a local path, or for a URL an object of fsspec's that is used like one.

    Raises UserError if the package for URLs is missing.
    """
    if os.path.exists(text) or not is_remote(text):
        return Path(text)
    try:
        from upath import UPath  # here: only URLs pay for the import
    except ImportError:
        raise UserError(
            f"{text}: URLs need another package; pip install 'dist_vse[remote]'"
        ) from None
    try:
        return cast(Path, UPath(text))
    except (ValueError, ImportError) as error:
        raise UserError(f"{text}: no URL that can be read ({first_line(error)})") from error


@contextmanager
def local_copy(location: str, folder: Path, *, allow_pipe: bool = False) -> Iterator[Path]:
    """Yield a local path with the bytes of `location`: a path, a URL or `pipe:COMMAND`.

    HTTP is read as training reads it: a URL is sent as it is, and the status is reported.

    What is remote is copied into `folder` and removed afterwards. Raises UserError if it cannot be
    read, or is a command and the user has not consented (`allow_pipe`).
    """
    if not is_remote(location):
        yield Path(location)
        return
    from dist_vse.data.download import download  # here: few inputs are far away

    with tempfile.NamedTemporaryFile(dir=folder, prefix=".copy-", suffix=".tmp") as file:
        try:
            download(location, cast(IO[bytes], file), allow_pipe=allow_pipe)
            file.flush()
        except OSError as error:
            raise UserError(
                f"{location}: cannot be read ({first_line(error)}); fix that and run the command "
                "again"
            ) from error
        yield Path(file.name)


@contextmanager
def local_copies(text: str, *, allow_pipe: bool) -> Iterator[dict[str, Path]]:
    """Yield copies of the tars at a URL (`{000..099}` is expanded) by their URLs; none of a path.

    They lie in the folder for temporary files, and are removed afterwards. Their time is always the
    same, so that what is made of them has the same fingerprint. Raises UserError if one cannot be
    read.
    """
    urls = braceexpand(text) if is_remote(text) and not text.startswith("pipe:") else [text]
    with ExitStack() as stack:
        copies = {}
        for url in urls if is_remote(text) else ():
            copy = local_copy(url, Path(tempfile.gettempdir()), allow_pipe=allow_pipe)
            path = stack.enter_context(copy)
            os.utime(path, (0, 0))
            copies[url] = path
        yield copies
