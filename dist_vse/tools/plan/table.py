"""The tables that `dist-vse plan` prints."""

from collections.abc import Sequence

from rich.table import Table

from dist_vse.common.terminal import plain
from dist_vse.common.units import GIB
from dist_vse.tools.plan.check import MEMORY_BOUND, TIME_BOUND, Checked
from dist_vse.tools.plan.choose import Plan
from dist_vse.tools.report.numbers import figure


def plan_table(plans: Sequence[Plan], title: str) -> Table:
    """Return what is recommended, a row a number of ranks."""
    table = _table(
        title, "GPUs", "batch", "s a step", "pairs/s", "efficiency", "GiB of", "chunk", "chunks",
        "kept", "ZeRO", "captions", "S kept GiB",
    )  # fmt: skip
    for plan in plans:
        settings = plan.settings
        table.add_row(
            f"{settings.world_size:,}",
            f"{settings.global_batch:,}",
            figure(plan.seconds.total),
            figure(plan.pairs_per_s),
            f"{plan.seconds.efficiency:.0%}",
            f"{plan.memory.total / GIB:.1f} {plan.rank_memory / GIB:.1f}",
            f"{settings.chunk:,}",
            str(settings.num_chunks),
            str(settings.kept),
            str(settings.zero_stage),
            settings.transport if settings.world_size > 1 else "",
            figure(settings.kept_similarities / GIB),
            style=None if plan.fits else "red",
        )
    return table


def seconds_table(plans: Sequence[Plan]) -> Table:
    """Return the seconds of a step by part, and what a rank sends."""
    names = list(plans[0].seconds.parts())
    table = _table("seconds by part", "GPUs", *(_words(n) for n in names), "GiB sent a GPU")
    for plan in plans:
        parts = (figure(value) for value in plan.seconds.parts().values())
        table.add_row(f"{plan.settings.world_size:,}", *parts, figure(plan.sent / GIB))
    return table


def memory_table(plans: Sequence[Plan]) -> Table:
    """Return the memory of a rank by part, at the fullest moment."""
    names = list(plans[0].memory.parts())
    table = _table("GiB a GPU by part, at its peak", "GPUs", *names, "when")
    for plan in plans:
        parts = (figure(value / GIB) for value in plan.memory.parts().values())
        table.add_row(f"{plan.settings.world_size:,}", *parts, _words(plan.memory.phase))
    return table


def check_table(checked: Sequence[Checked]) -> Table:
    """Return predictions compared with what was measured, with the errors."""
    table = _table(
        f"predicted and measured (bounds: {TIME_BOUND:.0%} of the time, {MEMORY_BOUND:.0%} of the "
        "memory)",
        "row", "W", "batch", "chunk", "kept", "ZeRO", "loss", "s", "predicted", "error",
        "MiB", "predicted", "error",
    )  # fmt: skip
    for one in checked:
        settings, peak = one.plan.settings, one.row["memory_bytes"]["peak"]
        table.add_row(
            plain(one.row.get("varied") or one.row["series"]),
            str(settings.world_size),
            f"{settings.global_batch:,}",
            str(settings.chunk),
            str(settings.kept),
            str(settings.zero_stage),
            plain(f"{settings.loss} {settings.transport}"),
            figure(one.measured_seconds),
            figure(one.plan.seconds.total),
            _error(one.time_error, TIME_BOUND),
            figure(peak / 2**20),
            figure(one.plan.memory.total / 2**20),
            _error(one.memory_error, MEMORY_BOUND),
        )
    return table


def parts_table(checked: Sequence[Checked]) -> Table:
    """Return seconds by part, predicted / measured."""
    names = list(checked[0].plan.seconds.parts())
    table = _table("seconds by part, predicted / measured", "row", "W", *(_words(n) for n in names))
    for one in checked:
        parts = one.plan.seconds.parts()
        table.add_row(
            plain(one.row.get("varied") or one.row["series"]),
            str(one.plan.settings.world_size),
            *(f"{figure(parts[n])} / {figure(one.row['seconds'][n])}" for n in names),
        )
    return table


def _table(title: str, *headings: str) -> Table:
    table = Table(title=title, title_justify="left")
    for heading in headings:
        words = heading in ("row", "loss", "when", "captions")
        table.add_column(_words(heading), justify="left" if words else "right")
    return table


def _error(error: float, bound: float) -> str:
    text = f"{error:+.1%}"
    return text if abs(error) <= bound else f"[red]{text}[/red]"


def _words(name: str) -> str:
    return name.replace("_", " ")
