"""Images that lie in the cells of a table, copied into one local file to be read from there."""

import os
import tempfile
from pathlib import Path
from typing import BinaryIO

from dist_vse.shards.record import Member


class StoredImages:
    """Appends images to a file in a folder that the command removes when it ends."""

    def __init__(self, scratch: Path | None) -> None:
        """Store in `scratch`, or else in a folder for temporary files."""
        import xxhash  # here, so that `dist-vse --help` works without it

        self._scratch = scratch
        self._file: BinaryIO | None = None
        self._path = Path()
        self._num_bytes = 0
        self._digest = xxhash.xxh32()

    def add(self, data: bytes, where: str) -> Member:
        """Append an image that stands at `where`; return its place."""
        if self._file is None:
            folder = self._scratch or tempfile.gettempdir()
            handle, name = tempfile.mkstemp(dir=folder, prefix="images-")
            self._path, self._file = Path(name), open(handle, "wb")  # noqa: SIM115 close()
        self._file.write(data)
        place = Member(self._path, self._num_bytes, len(data), where)
        self._num_bytes += len(data)
        self._digest.update(data)
        return place

    def close(self) -> None:
        """End the file, once all are added. Its time is a hash of its bytes.

        So the shards' fingerprints are the same next time, unless the images have changed.
        """
        if self._file is not None:
            self._file.close()
            self._file = None
            os.utime(self._path, (0, self._digest.intdigest()))
