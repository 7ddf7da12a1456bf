"""Existing tars in WebDataset's layout, to shuffle and cut again."""

import bz2
import gzip
import lzma
import os
import shutil
import tempfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

from dist_vse.common.errors import UserError, first_line
from dist_vse.data.index import INDEX_NAME, is_remote, read_index
from dist_vse.shards.index.wds_reader import is_compressed, plain_tars, read_samples
from dist_vse.shards.manifest import read_planned
from dist_vse.shards.record import Member, Record
from dist_vse.shards.sources.paths import existing, where_instead


def read_tars(
    path: Path,
    *,
    split: str | None = None,
    name: str = "",
    caption_key: str | None = None,
    scratch: Path | None = None,
) -> Iterator[Record]:
    """Yield the samples of a tar, or of all tars in a folder in the order of their names.

    `name` is the URL that `path` is a copy of. A compressed tar is unpacked into `scratch` first.

    In a folder with an index, these are the tars that it names. Captions are the JSON's `captions`
    or `caption`, else the `.txt`. `split` puts all samples into one; without it a sample is of the
    split that the index says, or that its JSON names, or of train. The JSON's other fields are
    kept. A sample without an image or with broken JSON is a bad one. `caption_key` names another
    field or member of captions.

    Raises UserError if a tar is cut or compressed with zstd, or one that the folder's index names
    is remote or missing, or the run that makes them has not ended.
    """
    tars = _tars_in(path) if path.is_dir() else [(existing(path), "")]
    for tar, of_index in tars:
        called = name
        if is_compressed(tar.name):
            tar, called = _unpacked(tar, scratch), name or str(tar)
        for sample in read_samples(tar, called, caption_key=caption_key):
            offset, num_bytes = sample.image or (0, 0)  # no bytes: a bad sample
            fields = dict(sample.fields)
            own, key = fields.pop("split", None), fields.pop("key", None)
            yield Record(
                image=Member(tar, offset, num_bytes, called),
                captions=sample.captions,
                split=split or of_index or (own if isinstance(own, str) else "train"),
                key=key if isinstance(key, str) else sample.key,
                extra=fields,
                languages=sample.languages,
                fault=sample.fault,
            )


def _tars_in(folder: Path) -> list[tuple[Path, str]]:
    """Return the folder's tars, each with the split that an index says, or "".

    Raises UserError if one that the index names is not there, or a run there has not ended.
    """
    for cut, files in read_planned(folder).items():
        if not any(name.endswith(".tar") for name in files):
            continue  # side files of an index only: the tars are whole
        raise UserError(
            f"{folder}: the run that makes split {cut!r} was cut; run it to the end first"
        )
    if not (folder / INDEX_NAME).is_file():
        tars_here = [(tar, "") for tar in plain_tars(folder, compressed=True)]
        if not tars_here:
            raise UserError(f"{folder}: no tars here; {where_instead(folder, '.tar')}")
        return tars_here
    tars = []
    for name, split in read_index(folder).splits.items():
        for shard in split.shards:
            if is_remote(shard.path):
                raise UserError(
                    f"{shard.path}: is remote, and the index in {folder} names it; give the URLs "
                    "of the tars as INPUT"
                )
            if not (folder / shard.path).is_file():
                raise UserError(
                    f"{folder / shard.path}: is missing, and the index names it; try `dist-vse "
                    f"shard repair {folder}`"
                )
            tars.append((folder / shard.path, name))
    return tars


_OPENERS: dict[bytes, Callable[..., Any]] = {
    b"\x1f\x8b": gzip.open,
    b"BZh": bz2.open,
    b"\xfd7zXZ\x00": lzma.open,
}


def _unpacked(tar: Path, scratch: Path | None) -> Path:
    """Return a local copy of a compressed tar, not compressed, with the same time."""
    with tar.open("rb") as file:
        start = file.read(8)
    opener = next((of for magic, of in _OPENERS.items() if start.startswith(magic)), None)
    if opener is None:
        raise UserError(f"{tar}: is compressed in a way that is not read; unpack it")
    handle, name = tempfile.mkstemp(dir=scratch or tempfile.gettempdir(), suffix=".tar")
    try:
        with opener(tar) as packed, open(handle, "wb") as copy:
            content: IO[bytes] = packed
            shutil.copyfileobj(content, copy)
    except (gzip.BadGzipFile, EOFError, zlib.error, lzma.LZMAError, OSError) as error:
        raise UserError(f"{tar}: cannot be unpacked ({first_line(error)})") from error
    status = tar.stat()
    os.utime(name, ns=(status.st_mtime_ns, status.st_mtime_ns))
    return Path(name)
