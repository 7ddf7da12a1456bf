"""Reading small files that somebody else may have made, or that a crash has damaged.

Whatever such a file holds ends in a value or in a `BadFileError`, never in another exception: its
size is bounded, and so is the depth to which it nests (by Python's own limit).
"""

import io
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from dist_vse.common.errors import first_line

if TYPE_CHECKING:
    from numpy.typing import NDArray

MAX_BYTES = 1 << 30
"""Of a JSON file. The index of a million shards has a fifth of it."""
MAX_LINE_BYTES = 1 << 26
"""Of one line of JSON, or of one sample's JSON."""
_BLOCK_BYTES = 1 << 16
_UNUSUAL = (ValueError, RecursionError, MemoryError)  # ValueError: no JSON, no UTF-8, long integers

T = TypeVar("T")


class BadFileError(ValueError):
    """A file can't be read: missing, damaged, or of other content; the message gives the reason."""


def read_text(path: Path, *, max_bytes: int = MAX_BYTES) -> str:
    """Return the UTF-8 text of a regular file. Raises BadFileError."""
    try:
        if not path.is_file():  # a named pipe would block
            raise BadFileError("no such file")
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            data = file.read(min(size, max_bytes) + 1)  # a buffer of all of that is made first
        if len(data) > max_bytes:
            raise BadFileError(f"has more than {max_bytes:,} bytes")
        return data.decode()
    except (OSError, UnicodeError, MemoryError) as error:
        raise BadFileError(first_line(error)) from error


def parse_json(data: str | bytes, kind: type[T], *, max_bytes: int = MAX_BYTES) -> T:
    """Parse JSON whose outermost value is of a kind (dict, list). Raises BadFileError."""
    if len(data) > max_bytes:
        raise BadFileError(f"has more than {max_bytes:,} bytes")
    try:
        content = json.loads(data)
    except _UNUSUAL as error:
        reason = "nested too deep" if isinstance(error, RecursionError) else first_line(error)
        raise BadFileError(f"no JSON ({reason})") from error
    if not isinstance(content, kind):
        raise BadFileError(f"holds a {type(content).__name__}, not a {kind.__name__}")
    return content


def read_json(path: Path, *, max_bytes: int = MAX_BYTES) -> dict[str, Any]:
    """Return the JSON object that a file holds. Raises BadFileError."""
    return parse_json(read_text(path, max_bytes=max_bytes), dict)


def json_lines(path: Path, *, start: int = 0) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield line number and object for each whole line of a file; other lines are left out.

    The last line of a killed process may be cut, and a disk may damage any. The file is read as a
    stream, whatever its size, from byte `start` on, where a line may be cut. Nothing comes of a
    file that is missing. Raises BadFileError if the system refuses it.
    """
    try:
        if not path.is_file():
            return
        with path.open("rb") as file:
            file.seek(start)
            for number, line in enumerate(_lines(file), 1):
                try:
                    yield number, parse_json(line, dict)
                except BadFileError:
                    continue
    except OSError as error:
        raise BadFileError(first_line(error)) from error


def _lines(file: io.BufferedIOBase) -> Iterator[bytes]:
    """Yield the lines of a file; one that is too long is empty."""
    while line := file.readline(MAX_LINE_BYTES):
        if line.endswith(b"\n") or len(line) < MAX_LINE_BYTES:
            yield line
            continue
        while (rest := file.readline(MAX_LINE_BYTES)) and not rest.endswith(b"\n"):
            pass
        yield b""


def lines_from_end(path: Path) -> Iterator[bytes]:
    """Yield the lines of a file, the last one first; one that is too long is empty.

    The file is read in blocks, so that the first lines of a long one cost nothing if they are not
    asked for. Nothing comes of a file that is missing. Raises BadFileError if the system refuses
    it.
    """
    try:
        if not path.is_file():
            return
        with path.open("rb") as file:
            end = file.seek(0, io.SEEK_END)
            parts: list[bytes] = []  # of the line that begins before `end`, the last one first
            size = 0
            while end > 0:
                start = max(0, end - _BLOCK_BYTES)
                file.seek(start)
                *lines, last = file.read(end - start).split(b"\n")
                end, size = start, size + len(last)
                parts = [*parts, last] if size <= MAX_LINE_BYTES else []
                if lines:
                    yield b"".join(reversed(parts))
                    yield from reversed(lines[1:])
                    parts, size = [lines[0]], len(lines[0])
            yield b"".join(reversed(parts))
    except OSError as error:
        raise BadFileError(first_line(error)) from error


def read_array(path: Path, *, memory_map: bool = False) -> "NDArray[Any]":
    """Return the array of a `.npy` file, of numbers only. Raises BadFileError."""
    import tokenize  # NumPy's reader of the header lets its errors pass

    import numpy as np  # not here: `dist-vse --help` does without it

    unusual = (*_UNUSUAL, OSError, EOFError, TypeError, SyntaxError, OverflowError)
    try:
        if not path.is_file():  # a named pipe would block
            raise BadFileError("no such file")
        mode: Literal["r"] | None = "r" if memory_map else None
        array: NDArray[Any] = np.load(path, mmap_mode=mode, allow_pickle=False)
    except (*unusual, tokenize.TokenError) as error:
        raise BadFileError(first_line(error)) from error
    if not isinstance(array, np.ndarray):  # an archive of several
        raise BadFileError("holds no single array")
    if array.dtype.kind not in "biuf":
        raise BadFileError(f"holds {array.dtype}, no numbers")
    return array


def is_number(value: object, *, least: float | None = None) -> bool:
    """Return whether a value from JSON is a finite number, and at least `least`; no bool is."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return abs(value) < float("inf") and (least is None or value >= least)


def is_file_name(value: object) -> bool:
    """Return whether a value from JSON names a file right inside its folder."""
    return isinstance(value, str) and value not in ("", ".", "..") and not set("/\\\0") & set(value)


def is_count(value: object) -> bool:
    """Return whether a value from JSON is an integer from 0 to 2^63 - 1."""
    return type(value) is int and 0 <= value < 1 << 63
