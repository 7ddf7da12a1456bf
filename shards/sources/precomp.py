"""Precomputed image features as VSE++ and SCAN lay them out.

A folder holds, for each of train, dev and test, `train_ims.npy` (n, d) and `train_caps.txt`, one
caption a line. Captions stand in the order of the images, as many for each: five as a rule. Where
there is a row for every caption, equal rows that follow each other are one image.
"""

from collections.abc import Iterator
from pathlib import Path

from dist_vse.common.errors import UserError
from dist_vse.common.reading import BadFileError, read_array
from dist_vse.data.vectors import vector_file
from dist_vse.shards.record import Record
from dist_vse.shards.sources.paths import existing_file, existing_folder, read_lines
from dist_vse.shards.sources.stored_images import StoredImages

SPLITS = {"train": "train", "dev": "val", "val": "val", "test": "test", "testall": "testall"}


def read_precomp(path: Path, *, scratch: Path | None = None) -> Iterator[Record]:
    """Yield the images of all splits in the folder's order; their vectors go into `scratch`.

    Raises UserError for a folder without a split, or one whose files do not fit together.
    """
    folder = existing_folder(path)
    there = [name for name in SPLITS if (folder / f"{name}_ims.npy").is_file()]
    if not there:
        raise UserError(
            f"{path}: no train_ims.npy, dev_ims.npy or test_ims.npy here; give the folder that "
            "holds them with train_caps.txt and so on"
        )
    stored = StoredImages(scratch)
    records = [record for name in there for record in _read_split(folder, name, stored)]
    stored.close()
    yield from records


def _read_split(folder: Path, name: str, stored: StoredImages) -> Iterator[Record]:
    import numpy as np  # here: other sources do without it

    where = folder / f"{name}_ims.npy"
    lines = read_lines(existing_file(folder / f"{name}_caps.txt"))
    captions = [line.strip() for line in (lines if lines[-1] else lines[:-1])]
    try:
        array = read_array(where, memory_map=True)
    except BadFileError as error:
        raise UserError(f"{where}: can't be read ({error}); copy it again") from error
    if array.ndim != 2 or not array.shape[1]:
        raise UserError(
            f"{where}: has the shape {array.shape}, and must be (images, numbers); average the "
            "regions of an image first: numpy.save(path, array.mean(1))"
        )
    if not len(array) or len(captions) % len(array):
        raise UserError(
            f"{where}: has {len(array)} rows, and {name}_caps.txt {len(captions)} captions; there "
            "must be as many captions for each row"
        )
    each, number, start, before = len(captions) // len(array), 0, 0, b""
    for stop in range(1, len(array) + 1):
        row = before or np.ascontiguousarray(array[start], "<f4").tobytes()
        after = b"" if stop == len(array) else np.ascontiguousarray(array[stop], "<f4").tobytes()
        before = after
        if each == 1 and after == row:
            continue
        finite = bool(np.isfinite(array[start]).all())
        yield Record(
            image=stored.add(vector_file(row), f"{where} row {start}"),
            captions=tuple(captions[start * each : stop * each]),
            split=SPLITS[name],
            key=f"{name}-{number:06d}",
            fault="" if finite else "its vector has numbers that are not finite",
        )
        number, start = number + 1, stop
