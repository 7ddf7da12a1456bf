"""Check that a run does not overwrite tars that it reads, or that are not its own."""

from collections.abc import Collection, Iterable, Sequence
from pathlib import Path

from dist_vse.common.errors import UserError
from dist_vse.data.index import INDEX_NAME, is_remote, read_index
from dist_vse.shards.manifest import read_manifest, read_planned
from dist_vse.shards.record import Member, Record


def check_output(folder: Path, records: Iterable[Record], splits: Collection[str]) -> None:
    """Check that `folder` is a place where the records' shards of `splits` may be written.

    Raises UserError if it holds tars that the records lie in, or tars of others that the shards
    could replace.
    """
    tars = {Path(r.image.path) for r in records if isinstance(r.image, Member)}
    for tar in sorted(tars):
        if tar.resolve().parent == folder.resolve():
            raise UserError(f"{tar}: is read, and would be overwritten; give another OUT")
    ours = _own_tars(folder)
    for split in sorted(splits):
        for tar in sorted(folder.glob(f"{split}-[0-9]*.tar")):
            if tar.name not in ours:
                raise UserError(
                    f"{tar}: was not made by `dist-vse shard`; move it, or give another OUT"
                )


def _own_tars(folder: Path) -> set[str]:
    """Return the names of the tars that we made, or that a run that was cut may have made."""
    content = read_index(folder).splits.values() if (folder / INDEX_NAME).is_file() else ()
    listed = [shard for split in content for shard in split.shards]
    ours = {shard.path for shard in listed if not shard.side}
    ours |= {entry.name for entry in read_manifest(folder).values() if not entry.side}
    return ours.union(*read_planned(folder).values())


def check_indexable(names: Sequence[str], folder: Path) -> None:
    """Check that none of the tars, named as the index in `folder` would, was written there by us.

    Raises UserError for one that was, or a folder that is a URL.
    """
    check_local(folder)
    ours = _own_tars(folder)
    for name in names:
        if name in ours:
            raise UserError(
                f"{folder / name}: was made by `dist-vse shard` and is in {folder / INDEX_NAME} "
                "already, or will be once that run ends; train with that, or give another folder "
                "by --out"
            )


def check_local(folder: Path) -> None:
    """Raise UserError for a URL."""
    if is_remote(str(folder)):
        raise UserError(f"{folder}: is a URL; give a local folder, and copy it there afterwards")
