"""Build a data set: plan the shards, make those that are not there, write the index last."""

from collections.abc import Callable, Iterable, Sequence
from contextlib import closing
from functools import partial
from itertools import chain
from pathlib import Path

from dist_vse.errors import UserError
from dist_vse.index import INDEX_NAME, Index, Shard, Split, offsets_name, read_index, write_index
from shards.plan import Task, plan_shards
from shards.pool import ordered_map
from shards.receipts import (
    SKIPPED_NAME,
    Receipt,
    Skipped,
    append_receipt,
    read_receipts,
    write_receipts,
    write_skipped,
)
from shards.record import Record
from shards.write import is_whole, write_shard

Advance = Callable[[int], None]
"""Is told the number of samples done since it was told last."""


def build_dataset(
    records: Sequence[Record],
    folder: Path,
    *,
    shard_size: int,
    seed: int,
    max_bad: int,
    workers: int,
    advance: Advance,
) -> list[Receipt]:
    """Bring `folder` to hold the records as shards; return their receipts, sorted by name.

    Shards that are whole already are kept, so that an interrupted run goes on where it was;
    the bytes are the same for any number of workers. Finished splits in the folder that the
    records do not name stay. One build at a time may write to a folder.

    Raises UserError for more bad samples than `max_bad`, or a split without a good one.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tasks = plan_shards(records, shard_size=shard_size, seed=seed)
    splits = {task.split for task in tasks}
    known = read_receipts(folder)
    of_others = [receipt for receipt in known.values() if receipt.split not in splits]
    kept = _kept(tasks, folder, known, workers, advance)
    missing = [task for task in tasks if task.name not in kept]
    stale = known.keys() - kept.keys() - {receipt.name for receipt in of_others}
    if missing or stale:
        _publish(folder, splits, [])  # an index never tells of shards that may not be there
        _clean(folder, stale, splits)
    write_receipts(folder, [*of_others, *kept.values()])

    done: list[Receipt] = []
    skipped: list[Skipped] = []
    # Closed at once where the budget is overdrawn: shards that have not begun are dropped.
    with closing(ordered_map(partial(write_shard, folder=folder), missing, workers)) as made:
        for receipt in chain(kept.values(), made):
            done.append(receipt)
            skipped += receipt.skipped
            _check_budget(folder, skipped, len(records), max_bad)
            if receipt.name not in kept:
                append_receipt(folder, receipt)
                advance(receipt.num_samples + len(receipt.skipped))
    _check_splits(done, splits)

    done.sort(key=lambda receipt: receipt.name)
    write_receipts(folder, [*of_others, *done])
    write_skipped(folder, [entry for r in (*of_others, *done) for entry in r.skipped])
    _publish(folder, splits, done)
    return done


def _kept(
    tasks: Sequence[Task],
    folder: Path,
    known: dict[str, Receipt],
    workers: int,
    advance: Advance,
) -> dict[str, Receipt]:
    """Return the receipts of the tasks whose shards are whole already, by shard name."""
    recorded = [(task, known[task.name]) for task in tasks if task.name in known]
    whole = ordered_map(partial(_is_whole, folder=folder), recorded, workers)
    kept = {}
    for (task, receipt), ok in zip(recorded, whole, strict=True):
        if ok:
            kept[task.name] = receipt
            advance(len(task.records))
    return kept


def _is_whole(recorded: tuple[Task, Receipt], folder: Path) -> bool:
    task, receipt = recorded
    return is_whole(task, folder, receipt)


def _clean(folder: Path, stale: Iterable[str], splits: Iterable[str]) -> None:
    """Remove shards that are of no use any more, and what a killed run left half written."""
    for name in stale:
        (folder / name).unlink(missing_ok=True)
        (folder / offsets_name(name)).unlink(missing_ok=True)
    for split in splits:
        for leftover in [*folder.glob(f"{split}-*.tar.tmp"), *folder.glob(f"{split}-*.npy.tmp")]:
            leftover.unlink()


def _check_budget(folder: Path, skipped: Sequence[Skipped], num_records: int, max_bad: int) -> None:
    """Raise UserError, naming the sample that was one too many, if `skipped` exceeds `max_bad`."""
    if len(skipped) <= max_bad:
        return
    entry = skipped[max_bad]
    sample = f"sample {entry.key!r} ({entry.path}): {entry.reason}"
    if max_bad == 0:
        raise UserError(
            f"{sample}; mend or remove it, or skip and list bad samples with --max-bad 0.1%"
        )
    write_skipped(folder, skipped)
    raise UserError(
        f"{sample}; that makes {max_bad + 1} bad of {num_records} samples where --max-bad allows "
        f"{max_bad}; mend those in {folder / SKIPPED_NAME}, or raise --max-bad"
    )


def _check_splits(done: Iterable[Receipt], splits: Iterable[str]) -> None:
    filled = {receipt.split for receipt in done if receipt.num_samples}
    for split in sorted(splits):
        if split not in filled:
            raise UserError(f"split {split!r}: every sample is bad; mend the images or captions")


def _publish(folder: Path, splits: Iterable[str], receipts: Sequence[Receipt]) -> None:
    """Write the index with `splits` made of the receipts' shards; other splits stay in it.

    A shard that lost all its samples is left out; without any split there is no index.
    """
    path = folder / INDEX_NAME
    content = dict(read_index(folder).splits) if path.is_file() else {}
    for split in splits:
        content.pop(split, None)
        of_split = [r for r in receipts if r.split == split and r.num_samples]
        shards = [Shard(r.name, r.num_samples, r.num_bytes, r.sha256) for r in of_split]
        if shards:
            content[split] = Split(shards, sum(r.num_captions for r in of_split))
    if content:
        write_index(Index(folder, content))
    else:
        path.unlink(missing_ok=True)
