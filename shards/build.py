"""Build a data set of records: plan the shards, make those that are not there."""

from collections.abc import Sequence
from pathlib import Path

from shards.bring import Advance, Maker, bring_to
from shards.budget import Budget
from shards.plan import Options, plan_shards
from shards.receipts import Receipt
from shards.record import Record
from shards.write import is_whole, write_shard


def build_dataset(
    records: Sequence[Record],
    folder: Path,
    options: Options,
    *,
    max_bad: Budget,
    workers: int,
    advance: Advance,
) -> list[Receipt]:
    """Bring `folder` to hold the records as shards; return their receipts, sorted by name.

    Shards that are whole already are kept, so that an interrupted run goes on where it was.

    Raises UserError for more bad samples than `max_bad`, or a split without a good one.
    """
    tasks = plan_shards(records, options)
    maker = Maker(write_shard, is_whole)
    return bring_to(
        folder,
        tasks,
        maker,
        num_samples=len(records),
        max_bad=max_bad,
        workers=workers,
        advance=advance,
    )
