"""Sync a folder with a list of tasks: keep the shards that are whole, build the rest."""

from collections.abc import Callable, Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Generic, Protocol, TypeVar

from dist_vse.common.errors import UserError
from dist_vse.data.index import INDEX_NAME, Index, Shard, Split, read_index, write_index
from dist_vse.shards.error_budget import ErrorBudget
from dist_vse.shards.manifest import (
    SKIPPED_NAME,
    ShardEntry,
    Skipped,
    append_entry,
    read_manifest,
    read_planned,
    write_manifest,
    write_planned,
    write_skipped,
)
from dist_vse.shards.pool import ordered_map

Advance = Callable[[int], None]
"""Called with the work done since the last call, in the units of the tasks."""


class ShardTask(Protocol):
    """One shard to build."""

    @property
    def name(self) -> str:
        """The tar: a path from the folder, or a URL."""

    @property
    def split(self) -> str:
        """The split that it belongs to."""

    @property
    def units(self) -> int:
        """Its share of the progress."""

    @property
    def files(self) -> tuple[str, ...]:
        """Names of the files that it writes into the folder."""


T = TypeVar("T", bound=ShardTask)


@dataclass(frozen=True)
class ShardBuilder(Generic[T]):
    """How to build a shard, and how to check that it is whole. Both run in worker processes."""

    build: Callable[[T, Path], ShardEntry]
    is_whole: Callable[[T, Path, ShardEntry], bool]


def sync_shards(
    folder: Path,
    tasks: Sequence[T],
    builder: ShardBuilder[T],
    *,
    num_samples: int | None,
    max_bad: ErrorBudget,
    workers: int,
    advance: Advance,
) -> list[ShardEntry]:
    """Build the shards that are not in `folder` yet; return all entries, sorted by name.

    The bytes are the same for any number of workers and after any interruption. Finished splits
    in the folder that no task names stay. One run at a time may write to a folder. A share of bad
    samples refers to `num_samples`; if it is None, it is counted at the end.

    Raises UserError for more bad samples than `max_bad`, or a split without a good one.
    """
    folder.mkdir(parents=True, exist_ok=True)
    splits = {task.split for task in tasks}
    known = read_manifest(folder, [task.name for task in tasks])
    of_others = [entry for entry in known.values() if entry.split not in splits]
    kept = _find_whole(tasks, builder, folder, known, workers, advance)
    missing = [task for task in tasks if task.name not in kept]
    stale = known.keys() - kept.keys() - {entry.name for entry in of_others}
    if missing or stale:
        _publish(folder, splits, [])  # an index never names shards that may be missing
    orphans = _record_plan(folder, tasks)
    _clean(folder, orphans.union(*(known[name].files for name in stale)), splits)
    write_manifest(folder, [*of_others, *kept.values()])

    done: list[ShardEntry] = []
    skipped: list[Skipped] = []
    # Closed when the error budget is exceeded: shards that have not started are dropped.
    build = partial(_build, builder=builder, folder=folder)
    with closing(ordered_map(build, missing, workers)) as made:
        units = {task.name: task.units for task in missing}
        for entry in chain(kept.values(), made):
            done.append(entry)
            skipped += entry.skipped
            if num_samples is not None:
                _check_budget(folder, skipped, num_samples, max_bad)
            if entry.name not in kept:
                append_entry(folder, entry)
                advance(units[entry.name])
    total = sum(entry.num_samples for entry in done) + len(skipped)
    _check_budget(folder, skipped, total, max_bad)
    _check_splits(done, splits)

    done.sort(key=lambda entry: entry.name)
    write_manifest(folder, [*of_others, *done])
    write_skipped(folder, [entry for r in (*of_others, *done) for entry in r.skipped])
    _publish(folder, splits, done)
    planned = read_planned(folder)
    write_planned(folder, {split: planned[split] for split in planned if split not in splits})
    return done


def _record_plan(folder: Path, tasks: Iterable[ShardTask]) -> set[str]:
    """Record the tasks' files before work starts; return a killed run's that no task makes."""
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


def _find_whole(
    tasks: Sequence[T],
    builder: ShardBuilder[T],
    folder: Path,
    known: dict[str, ShardEntry],
    workers: int,
    advance: Advance,
) -> dict[str, ShardEntry]:
    """Return the entries of the tasks whose shards are whole already, by shard name."""
    recorded = [(task, known[task.name]) for task in tasks if task.name in known]
    whole = ordered_map(partial(_is_whole, builder=builder, folder=folder), recorded, workers)
    kept = {}
    for (task, entry), ok in zip(recorded, whole, strict=True):
        if ok:
            kept[task.name] = entry
            advance(task.units)
    return kept


def _build(task: T, builder: ShardBuilder[T], folder: Path) -> ShardEntry:
    return builder.build(task, folder)


def _is_whole(recorded: tuple[T, ShardEntry], builder: ShardBuilder[T], folder: Path) -> bool:
    task, entry = recorded
    return builder.is_whole(task, folder, entry)


def _clean(folder: Path, files: Iterable[str], splits: Iterable[str]) -> None:
    """Remove our files that are no longer used, and what a killed run left half written."""
    for name in files:
        (folder / name).unlink(missing_ok=True)
    for split in splits:
        for suffix in ("tar", "npy", "jsonl"):
            for leftover in folder.glob(f"{split}[-.]*.{suffix}.tmp"):
                leftover.unlink()


def _check_budget(
    folder: Path, skipped: Sequence[Skipped], num_samples: int, max_bad: ErrorBudget
) -> None:
    """Raise UserError, naming the sample that was one too many, if `skipped` exceeds `max_bad`."""
    allowed = max_bad.allowed(num_samples)
    if len(skipped) <= allowed:
        return
    entry = skipped[allowed]
    sample = f"sample {entry.key!r} ({entry.path}): {entry.reason}"
    if allowed == 0:
        raise UserError(
            f"{sample}; fix or remove it, or skip and list bad samples with --max-bad 0.1%"
        )
    write_skipped(folder, skipped)
    raise UserError(
        f"{sample}; that makes {allowed + 1} bad of {num_samples} samples where --max-bad allows "
        f"{allowed}; fix those in {folder / SKIPPED_NAME}, or raise --max-bad"
    )


def _check_splits(done: Sequence[ShardEntry], splits: Iterable[str]) -> None:
    filled = {entry.split for entry in done if entry.num_samples}
    for split in sorted(splits):
        if split in filled:
            continue
        if bad := [sample for r in done if r.split == split for sample in r.skipped]:
            raise UserError(
                f"split {split!r}: every sample is bad (the first: {bad[0].path}: "
                f"{bad[0].reason}); fix the images or captions"
            )
        raise UserError(f"split {split!r}: no samples in {_names(done, split)}; give other tars")


def _names(entries: Iterable[ShardEntry], split: str) -> str:
    names = sorted(entry.name for entry in entries if entry.split == split)
    return names[0] + (f" and {len(names) - 1} more" if len(names) > 1 else "")


def _publish(folder: Path, splits: Iterable[str], entries: Sequence[ShardEntry]) -> None:
    """Write the index with `splits` made of the entries' shards; other splits stay in it.

    A shard that lost all its samples is left out; without any split there is no index.
    """
    path = folder / INDEX_NAME
    content = dict(read_index(folder).splits) if path.is_file() else {}
    for split in splits:
        content.pop(split, None)
        of_split = [r for r in entries if r.split == split and r.num_samples]
        shards = [Shard(r.name, r.num_samples, r.num_bytes, r.sha256, r.side) for r in of_split]
        if shards:
            content[split] = Split(shards, sum(r.num_captions for r in of_split))
    if content:
        write_index(Index(folder, content))
    else:
        path.unlink(missing_ok=True)
