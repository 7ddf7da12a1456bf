"""Predictions compared with what `dist-vse bench scale` measured on the calibrated machine."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dist_vse.common.errors import UserError
from dist_vse.common.reading import read_json
from dist_vse.config import TrainConfig
from dist_vse.tools.plan.choose import Plan, price
from dist_vse.tools.plan.hardware import Hardware
from dist_vse.tools.plan.settings import Settings, settings_of
from dist_vse.tools.plan.work import Work

TIME_BOUND, MEMORY_BOUND = 0.15, 0.10  # errors that the plan is held to


@dataclass(frozen=True)
class Checked:
    """A measured row, and what was predicted for it."""

    row: dict[str, Any]
    plan: Plan

    @property
    def measured_seconds(self) -> float:
        """Return the fastest step: calibration takes the fastest round as well."""
        steps: list[float] = self.row["all_step_seconds"]
        return min(steps)

    @property
    def time_error(self) -> float:
        """Return the error of the seconds as a share of what was measured."""
        return self.plan.seconds.total / self.measured_seconds - 1

    @property
    def memory_error(self) -> float:
        """Return the error of the peak as a share of what was measured."""
        measured: float = self.row["memory_bytes"]["peak"]
        return self.plan.memory.total / measured - 1


def read_report(path: Path) -> dict[str, Any]:
    """Read what `bench scale --out` wrote. Raises UserError if it is something else."""
    try:
        report = read_json(path)
        if report.get("benchmark") == "scale":
            return report
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(f"{path}: can't be read ({error})") from None
    raise UserError(f"{path}: no numbers of `dist-vse bench scale --out`")


def check_rows(
    report: dict[str, Any], config: TrainConfig, work: Work, hardware: Hardware
) -> list[Checked]:
    """Predict every row of one process group on one node; others are left out."""
    rows = [row for row in report["rows"] if row["runs"] == 1 and row["nodes"] == 1]
    on_cpu = hardware.cores > 0
    return [
        Checked(row, price(work, settings_of_row(row, config, on_cpu=on_cpu), hardware))
        for row in rows
        if row["precision"] == work.precision
    ]


def settings_of_row(row: dict[str, Any], config: TrainConfig, *, on_cpu: bool) -> Settings:
    """Return the settings of a measured row; what it does not state is the config's."""
    batch, ranks = row["global_batch"], row["world_size"]
    whole = settings_of(config, global_batch=batch, world_size=ranks, on_cpu=on_cpu)
    return replace(
        whole,
        chunk_size=row["chunk_size"],
        keep_graphs=row["keep_graphs"],
        zero_stage=row["zero_stage"],
        coalesce=row["coalesce"],
        loss=row["loss"],
        transport=row["transport"],
    )
