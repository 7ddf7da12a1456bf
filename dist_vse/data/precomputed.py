"""Outputs of a frozen image trunk on disk: computed once, then read instead of images.

A folder holds `features.json` and one array per writing process, float32 (rows, d), in the order of
the split. Its key says what the numbers depend on; another key is refused. Shape letters: b rows
of a batch, n samples of the split, d the trunk's features.
"""

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dist_vse.common.errors import UserError
from dist_vse.common.files import atomic_write, write_json
from dist_vse.common.log import logger
from dist_vse.common.reading import BadFileError, is_count, is_file_name, read_array, read_json

MANIFEST = "features.json"
FORMAT = 1
Key = dict[str, str]


@dataclass(frozen=True)
class Part:
    """One array of the folder."""

    path: str  # relative to the folder
    rows: int
    num_bytes: int


class Features:
    """The outputs of a split, by the sample's number; opened by `open_features`."""

    def __init__(self, folder: Path, parts: list[Part]) -> None:
        self._arrays = [read_array(folder / part.path, memory_map=True) for part in parts]
        self._first = np.cumsum([0, *(part.rows for part in parts)])

    def rows(self, numbers: Tensor) -> Tensor:
        """Return float32 (b, d) of int64 sample numbers (b,)."""
        wanted = numbers.numpy()
        part = np.searchsorted(self._first, wanted, side="right") - 1  # (b,)
        found = np.empty((len(wanted), self._arrays[0].shape[1]), np.float32)
        for i in np.unique(part).tolist():
            found[part == i] = self._arrays[i][wanted[part == i] - self._first[i]]
        return torch.from_numpy(found)


def open_features(folder: Path, key: Key, num_samples: int) -> Features:
    """Open a folder of features.

    Raises UserError if there are none, if they were made with another key, or if a file is cut.
    """
    remedy = "make them with `dist-vse features CONFIG`"
    path = folder / MANIFEST
    if not path.is_file():
        raise UserError(f"{folder}: no features here ({MANIFEST} is missing); {remedy}")
    try:
        content = read_json(path)
        made_with: Key = content["key"] if content["format"] == FORMAT else {"format": "another"}
        parts = [Part(**part) for part in content["parts"]]
        if not all(
            is_file_name(p.path) and is_count(p.rows) and is_count(p.num_bytes) for p in parts
        ):
            raise TypeError("parts must have a file name, rows and bytes")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: is broken ({error}); {remedy}") from error
    stale = [
        f"{name}: {made_with.get(name, 'unknown')}, now {value}"
        for name, value in key.items()
        if made_with.get(name) != value
    ]
    if stale:
        raise UserError(f"{folder}: stale features ({'; '.join(stale)}); {remedy}")
    for part in parts:
        file = folder / part.path
        if not file.is_file() or file.stat().st_size != part.num_bytes:
            raise UserError(f"{file}: is missing or cut; {remedy}")
    assert sum(part.rows for part in parts) == num_samples
    try:
        return Features(folder, parts)
    except BadFileError as error:
        raise UserError(f"{folder}: holds a file that is damaged ({error}); {remedy}") from error


def holds_features(folder: Path, key: Key, num_samples: int) -> bool:
    """Return whether the folder can be opened with this key; remove a stale or damaged manifest."""
    if not (folder / MANIFEST).is_file():
        return False
    try:
        open_features(folder, key, num_samples)
    except UserError as error:
        logger.info("%s", error)
        (folder / MANIFEST).unlink(missing_ok=True)
        return False
    return True


def write_part(folder: Path, number: int, rows: int, batches: Iterable[Tensor]) -> Part | None:
    """Write a process's share, float32 (rows, d), from batches (b, d); return None if empty."""
    if rows == 0:
        return None
    name = f"features-{number:05d}.npy"
    array: NDArray[np.float32] | None = None
    done = 0
    with atomic_write(folder / name) as temporary:
        for batch in batches:
            if array is None:
                shape = (rows, batch.shape[1])
                array = np.lib.format.open_memmap(temporary, "w+", np.float32, shape)
            array[done : done + len(batch)] = batch.numpy()
            done += len(batch)
        assert done == rows and array is not None, (done, rows)
        assert isinstance(array, np.memmap)
        array.flush()
    return Part(name, rows, (folder / name).stat().st_size)


def write_manifest(folder: Path, key: Key, parts: list[Part]) -> None:
    """Write the manifest that joins the parts in their order."""
    content = {"format": FORMAT, "key": key, "parts": [asdict(part) for part in parts]}
    write_json(folder / MANIFEST, content, indent=1)
