"""Paths that may be URLs: of fsspec, or webdataset's `pipe:COMMAND`."""

import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, cast

from dist_vse.errors import UserError, first_line
from dist_vse.index import is_remote

COPY_BYTES = 1 << 20


def to_path(text: str) -> Path:
    """Return a local path, or for a URL an object of fsspec's that is used like one.

    Raises UserError if the package for URLs is missing.
    """
    if not is_remote(text):
        return Path(text)
    try:
        from upath import UPath  # here: only URLs pay for the import
    except ImportError:
        raise UserError(
            f"{text}: URLs need a package more; pip install 'dist_vse[remote]'"
        ) from None
    try:
        return cast(Path, UPath(text))
    except (ValueError, ImportError) as error:
        raise UserError(f"{text}: no URL that can be read ({first_line(error)})") from error


@contextmanager
def local_copy(location: str, folder: Path) -> Iterator[Path]:
    """Yield a local path with the bytes of `location`: a path, a URL or `pipe:COMMAND`.

    What is remote is copied into `folder` and removed afterwards. Raises UserError if it cannot be
    read.
    """
    if not is_remote(location):
        yield Path(location)
        return
    with tempfile.NamedTemporaryFile(dir=folder, prefix=".copy-", suffix=".tmp") as file:
        try:
            if location.startswith("pipe:"):
                subprocess.run(location[5:], shell=True, stdout=file, check=True)
            else:
                _download(location, cast(IO[bytes], file))
        except UserError:
            raise
        except (OSError, ValueError, ImportError, subprocess.CalledProcessError) as error:
            raise UserError(
                f"{location}: cannot be read ({first_line(error)}); mend that and run the command "
                "again"
            ) from error
        yield Path(file.name)


def _download(url: str, file: IO[bytes]) -> None:
    try:
        import fsspec  # here: only URLs pay for the import
    except ImportError:
        raise UserError(
            f"{url}: URLs need a package more; pip install 'dist_vse[remote]'"
        ) from None
    with fsspec.open(url, "rb") as source:
        shutil.copyfileobj(source, file, COPY_BYTES)
    file.flush()
