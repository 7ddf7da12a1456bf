"""Thumbnails of samples, as data URIs: what the model saw, read from the shards by key."""

import base64
import io
from collections.abc import Iterable
from pathlib import Path

from PIL import Image

from dist_vse.common.errors import UserError
from dist_vse.data.decode import Transform, decode_image
from dist_vse.data.index import INDEX_NAME, Index, may_run_code, read_index
from dist_vse.data.reader import ShardReader
from dist_vse.data.vectors import is_vector

THUMBNAIL = Transform(size=160)  # shown at up to 112 CSS pixels, so sharp on dense screens too


def thumbnails(index: Index, split: str, keys: Iterable[str]) -> dict[str, str]:
    """Return a data URI for each key, reading the split's metadata until all are found.

    Raises UserError if the split lacks a key.
    """
    wanted = set(keys)
    found: dict[str, str] = {}
    reader = ShardReader(index, split, max_open=1)
    try:
        for number in range(index.split(split).num_samples):
            place = reader.place(number)
            if (key := reader.key(*place)) in wanted:
                found[key] = _data_uri(reader.image(*place))
                wanted.remove(key)
            if not wanted:
                break
    finally:
        reader.close()
    if wanted:
        raise UserError(
            f"{index.root}: split {split!r} lacks {len(wanted)} of the examples' images, such as "
            f"{min(wanted)!r}; give the data set that was evaluated"
        )
    return found


def _data_uri(data: bytes) -> str:
    """Shrink an image file; PNG where that is smaller (drawings), else JPEG (photographs)."""
    if is_vector(data):  # nothing to look at
        image = Image.new("RGB", (THUMBNAIL.size, THUMBNAIL.size), "lightgrey")
    else:
        image = Image.fromarray(decode_image(data, THUMBNAIL).transpose(1, 2, 0))
    png, jpeg = io.BytesIO(), io.BytesIO()
    image.quantize(64).save(png, "PNG", optimize=True)
    image.save(jpeg, "JPEG", quality=82, optimize=True)
    kind, buffer = min((("png", png), ("jpeg", jpeg)), key=lambda item: item[1].tell())
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def names_commands(index: Index) -> bool:
    """Return whether shards are commands: a report runs none, whoever asks for it."""
    return any(may_run_code(s.path) for split in index.splits.values() for s in split.shards)


def open_data(index_dir: Path | None, configured: str) -> Index | None:
    """Return the index given, or else the run's own where it is still there."""
    if index_dir is not None:
        return read_index(index_dir)
    path = Path(configured)
    there = path.is_file() or (path / INDEX_NAME).is_file()
    return read_index(path) if there else None
