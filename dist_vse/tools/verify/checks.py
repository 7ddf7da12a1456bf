"""All gradient checks of a config, on all ranks, and their result."""

from dataclasses import dataclass

from dist_vse import distributed
from dist_vse.config import TrainConfig
from dist_vse.tools.verify.loss import check_loss
from dist_vse.tools.verify.step import check_step
from dist_vse.tools.verify.table import Row, render, verdict


@dataclass(frozen=True)
class Result:
    """Alike on all ranks."""

    title: str
    rows: list[Row]
    world_size: int
    code: int
    """The exit code: 0 if all is exact, else 1."""


def check(config: TrainConfig) -> Result:
    """Run all checks; every rank of the group calls this, and gets rank 0's result."""
    rows = distributed.broadcast_object([*check_loss(config), *check_step(config)])
    world_size, loss = distributed.world_size(), config.loss
    title = (
        f"{loss.name} ({loss.transport}) on {world_size} processes ({distributed.device().type}), "
        "against one process in float64"
    )
    return Result(title, rows, world_size, 0 if all(row.exact for row in rows) else 1)


def describe(result: Result) -> str:
    """Return the table and the verdict."""
    return f"{render(result.title, result.rows)}\n\n{verdict(result.rows, result.world_size)}"
