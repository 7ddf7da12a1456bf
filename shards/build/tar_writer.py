"""A tar writer whose bytes depend only on the names and contents of the members."""

import hashlib
import tarfile
import zlib
from collections.abc import Callable
from queue import SimpleQueue
from threading import Thread
from typing import BinaryIO

CHUNK_BYTES = 1 << 20  # written and digested at a time
_CHUNKS = 8  # one is filled, one written, one hashed; the others absorb differences in speed
_PAGE_BYTES = 4096
_BLOCK = tarfile.BLOCKSIZE
_PADDING = tuple(b"\0" * count for count in range(_BLOCK))
_NAME_BYTES, _SIZE_AT, _SUM_AT = 100, 124, 148  # places in a header
_MAX_SIZE = 8**11 - 1

# A header without name, size and checksum, which counts its own field as blanks.
_BLANK = tarfile.TarInfo("").tobuf(tarfile.USTAR_FORMAT, "ascii")  # mode 644, no owner, time 0
_HEADER = b"%%b%b%%011o%b%%06o\0 %b" % (
    _BLANK[_NAME_BYTES:_SIZE_AT],
    _BLANK[_SIZE_AT + 11 : _SUM_AT],
    _BLANK[_SUM_AT + 8 :],
)
_BLANK_SUM = sum(_BLANK[:_SIZE_AT]) + sum(_BLANK[_SIZE_AT + 11 : _SUM_AT]) + 8 * 32
_BLANK_SUM += sum(_BLANK[_SUM_AT + 8 :])


_Chunk = tuple[memoryview, int]  # a buffer, and how many of its bytes count
_Queue = SimpleQueue[_Chunk | None]  # None: there will be no more

_free_buffers: list[memoryview] = []  # of finished writers: fresh memory costs as much as a copy


class TarWriter:
    """Writes members one after another; knows where each begins and the digest of it all.

    Bytes gather in one of a few buffers; a full one is written by one thread and digested by
    another, and neither holds Python's lock. `file` should be unbuffered. To be used in a `with`
    statement, which ends the threads.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file, self._digest = file, hashlib.sha256()
        self._error: OSError | None = None  # of the writing thread
        self._free, self._full, self._written = _Queue(), _Queue(), _Queue()
        for _ in range(_CHUNKS):
            buffer = _free_buffers.pop() if _free_buffers else memoryview(bytearray(CHUNK_BYTES))
            self._free.put((buffer, 0))
        self._filled = self._flushed = 0
        self._buffer = self._next_buffer()
        stages = (
            (self._write_out, self._full, self._written),
            (self._digest_chunk, self._written, self._free),
        )
        self._threads = [Thread(target=_work_off, args=stage, daemon=True) for stage in stages]
        for thread in self._threads:
            thread.start()

    def __enter__(self) -> "TarWriter":
        return self

    def __exit__(self, *_: object) -> None:
        self._end()

    @property
    def num_bytes(self) -> int:
        """Bytes of the tar so far."""
        return self._flushed + self._filled

    def add(self, name: str, data: bytes) -> int:
        """Append a member; return the offset of its data from the start of the tar, bytes."""
        offset = self.num_bytes + _BLOCK
        self._write(b"%b%b%b" % (header(name, len(data)), data, _PADDING[-len(data) % _BLOCK]))
        return offset

    def reserve(self, num_bytes: int) -> memoryview | None:
        """Return a buffer to fill with the next member's data; None if it is too large.

        Nothing is appended until `add_filled`. A file read directly into the buffer saves a copy.
        """
        needed = _BLOCK + num_bytes + _BLOCK
        if needed + _PAGE_BYTES > CHUNK_BYTES:
            return None
        if self._filled + needed > CHUNK_BYTES:
            self._flush(keep=self._filled % _PAGE_BYTES)  # whole pages are written faster
        start = self._filled + _BLOCK
        return self._buffer[start : start + num_bytes]

    def add_filled(self, name: str, num_bytes: int) -> int:
        """Append the member whose data fills the last buffer of `reserve`; return as `add`."""
        start = self._filled + _BLOCK
        self._buffer[self._filled : start] = header(name, num_bytes)
        padding = _PADDING[-num_bytes % _BLOCK]
        end = start + num_bytes
        self._buffer[end : end + len(padding)] = padding
        self._filled = end + len(padding)
        return self._flushed + start

    def close(self) -> str:
        """Write the end of the archive; return the sha256 of all bytes, hex."""
        self._write(b"\0" * (2 * _BLOCK))
        self._write(b"\0" * (-self.num_bytes % tarfile.RECORDSIZE))
        self._flush()
        self._end()
        self._check_written()
        return self._digest.hexdigest()

    def _end(self) -> None:
        """Wait until all is written and digested; leave the buffers to the next writer."""
        if not self._threads:
            return  # done before
        self._full.put(None)
        for thread in self._threads:
            thread.join()
        self._threads.clear()
        _free_buffers.append(self._buffer)
        while (chunk := self._free.get()) is not None:
            _free_buffers.append(chunk[0])

    def _write(self, data: bytes) -> None:
        end = self._filled + len(data)
        if end <= CHUNK_BYTES:
            self._buffer[self._filled : end] = data
            self._filled = end
            return
        view = memoryview(data)
        while view:
            if self._filled == CHUNK_BYTES:
                self._flush()
            part = view[: CHUNK_BYTES - self._filled]
            self._buffer[self._filled : self._filled + len(part)] = part
            self._filled += len(part)
            view = view[len(part) :]

    def _flush(self, keep: int = 0) -> None:
        """Queue the buffer for writing; its last `keep` bytes start the next buffer."""
        count = self._filled - keep
        rest = bytes(self._buffer[count : self._filled])
        self._full.put((self._buffer, count))
        self._buffer = self._next_buffer()
        self._check_written()
        self._buffer[:keep] = rest
        self._filled, self._flushed = keep, self._flushed + count

    def _next_buffer(self) -> memoryview:
        chunk = self._free.get()
        assert chunk is not None, "ended"
        return chunk[0]

    def _check_written(self) -> None:
        if self._error is not None:
            raise self._error

    def _write_out(self, buffer: memoryview, count: int) -> None:
        rest = buffer[: 0 if self._error else count]
        try:
            while rest:
                rest = rest[self._file.write(rest) :]
        except OSError as error:
            self._error = error  # raised in the thread that waits for a buffer

    def _digest_chunk(self, buffer: memoryview, count: int) -> None:
        self._digest.update(buffer[:count])


def _work_off(work: Callable[[memoryview, int], None], take: _Queue, give: _Queue) -> None:
    """Process every chunk of one queue, then put it on the other."""
    while (chunk := take.get()) is not None:
        work(*chunk)
        give.put(chunk)
    give.put(None)


def header(name: str, size: int) -> bytes:
    """Return the ustar header of a file, as `tarfile` makes it but thirty times as fast."""
    encoded = name.encode("ascii")
    assert 0 < len(encoded) <= _NAME_BYTES and 0 <= size <= _MAX_SIZE, (name, size)
    # Adler-32's lower half is one more than the sum of so few bytes: the quickest way to it.
    checksum = _BLANK_SUM + (zlib.adler32(b"%b%011o" % (encoded, size)) & 0xFFFF) - 1
    return _HEADER % (encoded.ljust(_NAME_BYTES, b"\0"), size, checksum)
