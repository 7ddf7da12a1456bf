"""The gradient contract of a config: all checks, on all ranks, and what came of them."""

from dataclasses import dataclass

from dist_vse import distributed
from dist_vse.config import TrainConfig
from dist_vse.verify.loss import check_loss
from dist_vse.verify.step import check_step
from dist_vse.verify.table import Row, render, verdict


@dataclass(frozen=True)
class Result:
    """Alike on all ranks."""

    rows: list[Row]
    world_size: int
    device: str
    name: str
    transport: str

    @property
    def code(self) -> int:
        """Return the exit code: 0 if all is exact, else 1."""
        return 0 if all(row.exact for row in self.rows) else 1


def check(config: TrainConfig) -> Result:
    """Run all checks; every rank of the group calls this, and gets rank 0's result."""
    rows = distributed.broadcast_object([*check_loss(config), *check_step(config)])
    return Result(
        rows,
        distributed.world_size(),
        distributed.device().type,
        config.loss.name,
        config.loss.transport,
    )


def describe(result: Result) -> str:
    """Return the table and the verdict."""
    title = (
        f"{result.name} ({result.transport}) on {result.world_size} processes ({result.device}) "
        "against one process in float64"
    )
    return f"{render(title, result.rows)}\n\n{verdict(result.rows, result.world_size)}"
