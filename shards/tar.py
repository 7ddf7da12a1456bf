"""Tar bytes that depend on nothing but the names and contents of the members."""

import hashlib
import tarfile
from typing import BinaryIO

_END = b"\0" * (2 * tarfile.BLOCKSIZE)


class TarWriter:
    """Writes members one after another; knows where each begins and the digest of it all."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._digest = hashlib.sha256()
        self.num_bytes = 0

    def add(self, name: str, data: bytes) -> int:
        """Append a member; return the offset of its data from the start of the tar, bytes."""
        info = tarfile.TarInfo(name)  # its defaults are fixed: mode 644, no owner, time 0
        info.size = len(data)
        self._write(info.tobuf(tarfile.USTAR_FORMAT, "ascii"))
        offset = self.num_bytes
        self._write(data)
        self._write(b"\0" * (-len(data) % tarfile.BLOCKSIZE))
        return offset

    def close(self) -> str:
        """Write the end of the archive; return the sha256 of all bytes, hex."""
        self._write(_END)
        self._write(b"\0" * (-self.num_bytes % tarfile.RECORDSIZE))
        return self._digest.hexdigest()

    def _write(self, data: bytes) -> None:
        self._file.write(data)
        self._digest.update(data)
        self.num_bytes += len(data)
