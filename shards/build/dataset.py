"""Build a data set of records: plan the shards, make those that are not there."""

from collections.abc import Collection, Sequence
from pathlib import Path

from dist_vse.shards.build.plan import Options, plan_shards
from dist_vse.shards.build.sync import Advance, ShardBuilder, sync_shards
from dist_vse.shards.build.write import is_whole, write_shard
from dist_vse.shards.error_budget import ErrorBudget
from dist_vse.shards.manifest import ShardEntry
from dist_vse.shards.record import Record


def build_dataset(
    records: Sequence[Record],
    folder: Path,
    options: Options,
    *,
    only: Collection[str] | None = None,
    max_bad: ErrorBudget,
    workers: int,
    advance: Advance,
) -> list[ShardEntry]:
    """Bring `folder` to hold the records as shards; return their entries, sorted by name.

    Shards that are whole already are kept, so that an interrupted run goes on where it was. `only`
    names the splits that are made; keys depend on the records of all.

    Raises UserError for more bad samples than `max_bad`, or a split without a good one.
    """
    tasks = [t for t in plan_shards(records, options) if only is None or t.split in only]
    builder = ShardBuilder(write_shard, is_whole)
    return sync_shards(
        folder,
        tasks,
        builder,
        num_samples=len(records),
        max_bad=max_bad,
        workers=workers,
        advance=advance,
    )
