"""Vectors in the place of images: what an encoder put out before, as a `.npy` file of float32.

A shard's member may be such a file instead of a picture. Nothing here needs NumPy, so that sharding
does without it.
"""

import ast
import math
import struct
from functools import lru_cache

MAGIC = b"\x93NUMPY"
EXTENSION = "npy"


def is_vector(data: bytes | memoryview) -> bool:
    """Return whether these are the bytes of a `.npy` file."""
    return bytes(data[: len(MAGIC)]) == MAGIC


def vector_place(data: bytes | memoryview) -> tuple[int, int]:
    """Return where the numbers of a vector's file begin, and how many there are.

    Raises ValueError unless it holds one row of little-endian float32, and nothing else.
    """
    wide = len(data) > 6 and data[6] > 1  # version 2 counts the header's bytes with four bytes
    layout = struct.Struct("<I" if wide else "<H")
    if len(data) < 8 + layout.size:
        raise ValueError("the .npy file is cut")
    start = 8 + layout.size + layout.unpack_from(data, 8)[0]
    count = _numbers(bytes(data[8 + layout.size : start]))
    if len(data) != start + 4 * count:
        raise ValueError("the .npy file is cut")
    return start, count


@lru_cache(maxsize=16)  # the same for all vectors of a data set
def _numbers(header: bytes) -> int:
    """Return how many numbers a header announces. Raises ValueError as `vector_place`."""
    try:
        fields = ast.literal_eval(header.decode("latin-1"))
        kind, shape = fields["descr"], fields["shape"]
        dimensions = len(shape)
    except (ValueError, SyntaxError, KeyError, TypeError, RecursionError, MemoryError) as error:
        raise ValueError("the .npy file is broken") from error
    if kind != "<f4" or dimensions != 1:
        raise ValueError(f"the .npy file holds {kind} of shape {shape}, not one row of float32")
    return int(shape[0])


def check_vector(data: bytes | memoryview) -> int:
    """Return how many numbers a vector's file holds.

    Raises ValueError as `vector_place` does, and for numbers that are not finite.
    """
    start, count = vector_place(data)
    if not all(map(math.isfinite, memoryview(data)[start:].cast("f"))):
        raise ValueError("the vector has numbers that are not finite")
    return count


def vector_file(row: bytes) -> bytes:
    """Return the `.npy` file of little-endian float32 numbers."""
    header = f"{{'descr': '<f4', 'fortran_order': False, 'shape': ({len(row) // 4},), }}".encode()
    header += b" " * (-(len(MAGIC) + 4 + len(header) + 1) % 64) + b"\n"  # the format's alignment
    return MAGIC + b"\x01\x00" + struct.pack("<H", len(header)) + header + row
