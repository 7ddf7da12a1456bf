"""Shapes of tiles that were timed on this GPU, kept in the user's cache.

`dist-vse doctor --gpu --autotune` writes them; a run only reads. They are of one GPU and one
version of Triton.
"""

import os
import re
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch

from dist_vse.common.files import write_json
from dist_vse.common.reading import read_json


class Blocks(NamedTuple):
    """The shape of a tile, and how a program works on it."""

    height: int
    width: int
    depth: int
    warps: int
    stages: int


Table = dict[str, Blocks]
"""By `key`."""


def key(kernel: str, dtype: torch.dtype, *, tf32: bool) -> str:
    """Return the name of a kernel's entry; `tf32` says how float32 factors are multiplied."""
    rounded = tf32 and dtype == torch.float32
    return f"{kernel} {'tf32' if rounded else str(dtype).removeprefix('torch.')}"


def cache_path(gpu: str) -> Path:
    """Return the file of a GPU, by its name and Triton's version."""
    import triton

    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    name = re.sub(r"[^A-Za-z0-9.]+", "-", f"{gpu} triton {triton.__version__}")
    return Path(base) / "dist_vse" / "blocks" / f"{name}.json"


@cache
def read_blocks(path: Path) -> Table:
    """Return what was timed; nothing if there is no such file, or it can't be used."""
    try:
        entries = read_json(path)
        return {
            name: Blocks(*map(int, shape))
            for name, shape in entries.items()
            if all(isinstance(number, int) and number > 0 for number in shape)
        }
    except (OSError, ValueError, TypeError, AttributeError):
        return {}  # as if nothing had been timed


def write_blocks(path: Path, table: Table) -> None:
    """Write what was timed. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, table, indent=1)
    read_blocks.cache_clear()
