"""Existing tars in WebDataset's layout, to shuffle and cut again."""

from collections.abc import Iterator
from pathlib import Path

from dist_vse.common.errors import UserError
from dist_vse.data.index import INDEX_NAME, is_remote, read_index
from shards.index.wds_reader import plain_tars, read_samples
from shards.manifest import read_planned
from shards.record import Member, Record
from shards.sources.paths import existing


def read_tars(path: Path, *, split: str | None = None, name: str = "") -> Iterator[Record]:
    """Yield the samples of a tar, or of all tars in a folder in the order of their names.

    `name` is the URL that `path` is a copy of.

    In a folder with an index, these are the tars that it names. Captions are the JSON's `captions`
    or `caption`, else the `.txt`. `split` puts all samples into one; without it a sample is of the
    split that the index says, or that its JSON names, or of train. The JSON's other fields are
    kept. A sample without an image or with broken JSON is a bad one.

    Raises UserError if a tar is compressed or cut, or one that the folder's index names is remote
    or missing, or the run that makes them has not ended.
    """
    tars = _tars_in(path) if path.is_dir() else [(existing(path), "")]
    for tar, of_index in tars:
        for sample in read_samples(tar, name):
            offset, num_bytes = sample.image or (0, 0)  # no bytes: a bad sample
            fields = dict(sample.fields)
            own, key = fields.pop("split", None), fields.pop("key", None)
            languages = fields.pop("languages", ())
            if not isinstance(languages, list) or len(languages) != len(sample.captions):
                languages = ()
            yield Record(
                image=Member(tar, offset, num_bytes, name),
                captions=sample.captions,
                split=split or of_index or (own if isinstance(own, str) else "train"),
                key=key if isinstance(key, str) else sample.key,
                extra=fields,
                languages=tuple(languages),
                fault=sample.fault,
            )


def _tars_in(folder: Path) -> list[tuple[Path, str]]:
    """Return the folder's tars, each with the split that an index says, or "".

    Raises UserError if one that the index names is not there, or a run there has not ended.
    """
    for cut in read_planned(folder):
        raise UserError(
            f"{folder}: the run that makes split {cut!r} was cut; run it to the end first"
        )
    if not (folder / INDEX_NAME).is_file():
        return [(tar, "") for tar in plain_tars(folder)]
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
