"""Keep a run from writing over tars that it reads, or that are not its own."""

from collections.abc import Iterable, Sequence
from pathlib import Path

from dist_vse.errors import UserError
from dist_vse.index import INDEX_NAME, is_remote
from shards.receipts import RECEIPTS_NAME, read_receipts
from shards.record import Member, Record


def check_output(folder: Path, records: Iterable[Record]) -> None:
    """Check that `folder` is a place where the records' shards may be written.

    Raises UserError if it is a URL, holds tars that the records lie in, or tars of others that
    the shards would replace.
    """
    check_local(folder)
    splits, tars = set[str](), set[Path]()
    for record in records:
        splits.add(record.split)
        if isinstance(record.image, Member):
            tars.add(Path(record.image.path))
    for tar in sorted(tars):
        if tar.resolve().parent == folder.resolve():
            raise UserError(f"{tar}: is read, and would be written over; give another OUT")
    known, has_receipts = read_receipts(folder), (folder / RECEIPTS_NAME).is_file()
    for split in sorted(splits):
        for tar in sorted(folder.glob(f"{split}-[0-9]*.tar")):
            if not has_receipts or (tar.name in known and known[tar.name].side):
                raise UserError(f"{tar}: is not of `dist-vse shard`; move it, or give another OUT")


def check_indexable(names: Sequence[str], folder: Path) -> None:
    """Check that none of the tars, named as the index in `folder` would, was written there by us.

    Raises UserError for one that was, or a folder that is a URL.
    """
    check_local(folder)
    known = read_receipts(folder)
    for name in names:
        if name in known and not known[name].side:
            raise UserError(
                f"{folder / name}: was made by `dist-vse shard` and is in {folder / INDEX_NAME} "
                "already; train with that, or give another folder by --out"
            )


def check_local(folder: Path) -> None:
    """Raise UserError for a URL."""
    if is_remote(str(folder)):
        raise UserError(f"{folder}: is a URL; give a local folder, and copy it there afterwards")
