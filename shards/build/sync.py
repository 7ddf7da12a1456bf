"""Bring a folder to hold what is asked: keep the shards that are whole, make the rest."""

from collections.abc import Callable, Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Generic, Protocol, TypeVar

from dist_vse.common.errors import UserError
from dist_vse.data.index import INDEX_NAME, Index, Shard, Split, read_index, write_index
from shards.error_budget import Budget
from shards.manifest import (
    SKIPPED_NAME,
    Receipt,
    Skipped,
    append_receipt,
    read_planned,
    read_receipts,
    write_planned,
    write_receipts,
    write_skipped,
)
from shards.pool import ordered_map

Advance = Callable[[int], None]
"""Is told the work done since it was told last, in the units of the tasks."""


class AnyTask(Protocol):
    """One shard to be made."""

    @property
    def name(self) -> str:
        """The tar: a path from the folder, or a URL."""

    @property
    def split(self) -> str:
        """The split that it belongs to."""

    @property
    def units(self) -> int:
        """How much of the progress it is."""

    @property
    def files(self) -> tuple[str, ...]:
        """The files that it makes, by their names in the folder."""


T = TypeVar("T", bound=AnyTask)


@dataclass(frozen=True)
class Maker(Generic[T]):
    """How to make a shard, and how to see that it is there; both run in worker processes."""

    make: Callable[[T, Path], Receipt]
    is_whole: Callable[[T, Path, Receipt], bool]


def bring_to(
    folder: Path,
    tasks: Sequence[T],
    maker: Maker[T],
    *,
    num_samples: int | None,
    max_bad: Budget,
    workers: int,
    advance: Advance,
) -> list[Receipt]:
    """Make the tasks' shards that are not in `folder` yet; return all receipts, sorted by name.

    The bytes are the same for any number of workers and after any interruption. Finished splits
    in the folder that no task names stay. One run at a time may write to a folder. `num_samples`
    is the whole that a share of bad samples refers to; where unknown, it is counted at the end.

    Raises UserError for more bad samples than `max_bad`, or a split without a good one.
    """
    folder.mkdir(parents=True, exist_ok=True)
    splits = {task.split for task in tasks}
    known = read_receipts(folder)
    of_others = [receipt for receipt in known.values() if receipt.split not in splits]
    kept = _kept(tasks, maker, folder, known, workers, advance)
    missing = [task for task in tasks if task.name not in kept]
    stale = known.keys() - kept.keys() - {receipt.name for receipt in of_others}
    if missing or stale:
        _publish(folder, splits, [])  # an index never tells of shards that may not be there
    orphans = _note_plan(folder, tasks)
    _clean(folder, orphans.union(*(known[name].files for name in stale)), splits)
    write_receipts(folder, [*of_others, *kept.values()])

    done: list[Receipt] = []
    skipped: list[Skipped] = []
    # Closed at once where the budget is overdrawn: shards that have not begun are dropped.
    with closing(ordered_map(partial(_make, maker=maker, folder=folder), missing, workers)) as made:
        units = {task.name: task.units for task in missing}
        for receipt in chain(kept.values(), made):
            done.append(receipt)
            skipped += receipt.skipped
            if num_samples is not None:
                _check_budget(folder, skipped, num_samples, max_bad)
            if receipt.name not in kept:
                append_receipt(folder, receipt)
                advance(units[receipt.name])
    total = sum(receipt.num_samples for receipt in done) + len(skipped)
    _check_budget(folder, skipped, total, max_bad)
    _check_splits(done, splits)

    done.sort(key=lambda receipt: receipt.name)
    write_receipts(folder, [*of_others, *done])
    write_skipped(folder, [entry for r in (*of_others, *done) for entry in r.skipped])
    _publish(folder, splits, done)
    planned = read_planned(folder)
    write_planned(folder, {split: planned[split] for split in planned if split not in splits})
    return done


def _note_plan(folder: Path, tasks: Iterable[AnyTask]) -> set[str]:
    """Note the tasks' files before any is made; return those of a cut run that no task makes."""
    wanted: dict[str, set[str]] = {}
    for task in tasks:
        wanted.setdefault(task.split, set()).update(task.files)
    planned, orphans = read_planned(folder), set[str]()
    for split, files in wanted.items():
        earlier = set(planned.get(split, ()))
        orphans |= earlier - files
        planned[split] = sorted(earlier | files)
    write_planned(folder, planned)
    return orphans


def _kept(
    tasks: Sequence[T],
    maker: Maker[T],
    folder: Path,
    known: dict[str, Receipt],
    workers: int,
    advance: Advance,
) -> dict[str, Receipt]:
    """Return the receipts of the tasks whose shards are whole already, by shard name."""
    recorded = [(task, known[task.name]) for task in tasks if task.name in known]
    whole = ordered_map(partial(_is_whole, maker=maker, folder=folder), recorded, workers)
    kept = {}
    for (task, receipt), ok in zip(recorded, whole, strict=True):
        if ok:
            kept[task.name] = receipt
            advance(task.units)
    return kept


def _make(task: T, maker: Maker[T], folder: Path) -> Receipt:
    return maker.make(task, folder)


def _is_whole(recorded: tuple[T, Receipt], maker: Maker[T], folder: Path) -> bool:
    task, receipt = recorded
    return maker.is_whole(task, folder, receipt)


def _clean(folder: Path, files: Iterable[str], splits: Iterable[str]) -> None:
    """Remove our files that are of no use any more, and what a killed run left half written."""
    for name in files:
        (folder / name).unlink(missing_ok=True)
    for split in splits:
        for suffix in ("tar", "npy", "jsonl"):
            for leftover in folder.glob(f"{split}[-.]*.{suffix}.tmp"):
                leftover.unlink()


def _check_budget(
    folder: Path, skipped: Sequence[Skipped], num_samples: int, max_bad: Budget
) -> None:
    """Raise UserError, naming the sample that was one too many, if `skipped` exceeds `max_bad`."""
    allowed = max_bad.allowed(num_samples)
    if len(skipped) <= allowed:
        return
    entry = skipped[allowed]
    sample = f"sample {entry.key!r} ({entry.path}): {entry.reason}"
    if allowed == 0:
        raise UserError(
            f"{sample}; mend or remove it, or skip and list bad samples with --max-bad 0.1%"
        )
    write_skipped(folder, skipped)
    raise UserError(
        f"{sample}; that makes {allowed + 1} bad of {num_samples} samples where --max-bad allows "
        f"{allowed}; mend those in {folder / SKIPPED_NAME}, or raise --max-bad"
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
        shards = [Shard(r.name, r.num_samples, r.num_bytes, r.sha256, r.side) for r in of_split]
        if shards:
            content[split] = Split(shards, sum(r.num_captions for r in of_split))
    if content:
        write_index(Index(folder, content))
    else:
        path.unlink(missing_ok=True)
