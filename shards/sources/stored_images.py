"""Images that lie in the cells of a table, copied into one local file to be read from there."""

import base64
import binascii
import os
import re
import tempfile
from pathlib import Path
from typing import Any, BinaryIO

from dist_vse.shards.record import Member

_MIN_CHARS = 64  # no image's file is shorter, and hardly a path that looks like one is longer
# The first bytes of a JPEG, PNG, WebP, GIF and TIFF.
_BASE64 = re.compile(
    r"(?:data:image/[\w.+-]+;base64,)?((?:/9j/|iVBORw0KGgo|UklGR|R0lGOD|SUkqA|TU0AK)[\w+/\s]*=*\s*)",
    re.ASCII,
)


def base64_image(value: Any) -> bytes:
    """Return the image that a cell holds in base64, also as a `data:` URL; none of other cells."""
    if not isinstance(value, str) or len(value) < _MIN_CHARS:
        return b""
    found = _BASE64.fullmatch(value)
    try:
        return base64.b64decode(found[1]) if found else b""
    except binascii.Error:  # cut
        return b""


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
