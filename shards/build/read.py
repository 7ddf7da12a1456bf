"""Read the bytes of an image: a file's, a part of a tar, or what lies at a URL."""

import contextlib
import errno
import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import cast

from dist_vse.common.errors import UserError, first_line
from dist_vse.shards.build.plan import Task
from dist_vse.shards.record import Image, Member, Url, local_path
from dist_vse.shards.sample_checks import BadSampleError


@contextlib.contextmanager
def image_reader(task: Task) -> Iterator[Callable[[Image], bytes]]:
    """Yield a function that reads the task's images in their order; `read_image` says how."""
    urls = [str(r.image) for r in task.records if isinstance(r.image, Url) and not r.fault]
    fetching = task.options.fetching
    if fetching is None or not urls:
        yield read_image
        return
    from dist_vse.shards.build.fetch import fetched_ahead  # here: few images are far away

    with fetched_ahead(urls, fetching) as ahead:

        def read(image: Image) -> bytes:
            try:
                return ahead.read(str(image))
            except OSError as error:
                raise BadSampleError(first_line(error)) from error

        yield read


def read_image(image: Image) -> bytes:
    """Return the bytes of an image that is not fetched ahead.

    Raises BadSampleError where it is at fault, UserError where the disk or permissions are.
    """
    try:
        return _read_bytes(image)
    except (FileNotFoundError, NotADirectoryError) as error:
        from dist_vse.shards.sources.paths import other_spelling  # here: it brings all sources

        hint = other_spelling(local_path(image)) or "is --images right?"
        raise BadSampleError(f"no such image file ({hint})") from error
    except (IsADirectoryError, ValueError) as error:
        raise BadSampleError(f"the path is no image file ({first_line(error)})") from error
    except OSError as error:  # the disk's or the permissions' fault, not the sample's
        if error.errno in (errno.ENAMETOOLONG, errno.ELOOP):
            raise BadSampleError(f"the path is no image file ({error.strerror})") from error
        raise UserError(
            f"{image}: cannot be read ({error.strerror or error}); fix that and run the command "
            "again"
        ) from error


def _read_bytes(image: Image) -> bytes:
    if isinstance(image, Member):
        with open(image.path, "rb", buffering=0) as file:
            data = os.pread(file.fileno(), image.num_bytes, image.offset)
        if len(data) != image.num_bytes:
            raise UserError(f"{image.path}: is cut; copy it again and run the command again")
        return data
    path = local_path(image)
    if not path and str(image).startswith(("http://", "https://")):
        return _read_http(str(image))
    if not path:
        return bytes(cast(Path, image).read_bytes())  # fsspec's
    if not stat.S_ISREG(os.stat(path).st_mode):  # to open a pipe could wait for ever
        raise ValueError("no regular file")
    with open(path, "rb", buffering=0) as file:
        return file.read()


def _read_http(url: str) -> bytes:
    from dist_vse.data.download import PermanentError, read_url  # here: few images are far away

    try:
        return read_url(url)
    except PermanentError as error:
        raise BadSampleError(f"no such image file ({first_line(error)})") from error
